"""The command `tl-nodeprune`: the demo, and pruning a model from a shell."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from tl_nodeprune import tasks, toy
from tl_nodeprune.evaluation import Evaluation, evaluate
from tl_nodeprune.masks import add_node_masks
from tl_nodeprune.nodes import GRANULARITIES
from tl_nodeprune.prompts import PromptPairs
from tl_nodeprune.pruning import PruneResult


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit status: 0, or 2 where the input was wrong (one line on stderr says how)."""
    args = _parser().parse_args(argv)
    try:
        args.command(args)
    except (ValueError, RuntimeError, ArithmeticError, OSError) as error:
        print("tl-nodeprune:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tl-nodeprune", description="Find the nodes of a transformer that a task needs.")
    commands = parser.add_subparsers(required=True)
    demo = commands.add_parser("demo", help="find a circuit in the small model that comes with the package")
    demo.add_argument("--task", default="ioi", choices=tuple(tasks.ROWS))
    demo.set_defaults(command=_demo)
    prune = commands.add_parser("prune", help="find a circuit in a model of yours")
    prune.add_argument("--model", required=True, help="a Hugging Face name or folder, or 'toy' for the embedded model")
    prune.add_argument("--task", required=True, help=f"{', '.join(tasks.ROWS)}, or a .jsonl file (clean, corrupted, answer, wrong)")
    prune.add_argument("--max-kl", type=float, default=0.05, help="nats at the answer positions (default: %(default)s)")
    prune.add_argument("--out", type=Path, required=True, help="folder for circuit.safetensors and report.json")
    prune.add_argument("--ablation", default="interchange", help="interchange, mean, zero or optimal (default: %(default)s)")
    prune.add_argument("--granularities", nargs="+", metavar="G", help=f"some of {', '.join(GRANULARITIES)} (default: all)")
    prune.add_argument("--prompts", type=int, default=200, help="how many, for the named tasks (default: %(default)s)")
    prune.add_argument("--seed", type=int, default=0)
    prune.add_argument("--device", default="cpu")
    prune.set_defaults(command=_prune)
    return parser


def _demo(args: argparse.Namespace) -> None:
    model, prompts = toy.load(args.task)
    print(f"The embedded model: {model.cfg.n_layers} layers, {model.cfg.n_heads} heads, d_model {model.cfg.d_model}. Task: {args.task}.")
    print(f"  clean:     {model.tokenizer.decode(prompts.clean[0][prompts.attention_mask[0]])}")  # type: ignore[index]
    print(f"  corrupted: {model.tokenizer.decode(prompts.corrupted[0][prompts.attention_mask[0]])}")  # type: ignore[index]
    train, test = prompts.split(0.75, seed=0)
    result, report = _find(model, train, test, max_kl=0.05)
    _show(result, report)


def _prune(args: argparse.Namespace) -> None:
    if args.max_kl <= 0:
        raise ValueError(f"--max-kl {args.max_kl}; it must be above 0.")
    if args.task not in tasks.ROWS and not Path(args.task).is_file():
        raise ValueError(f"--task {args.task!r} is no task ({', '.join(tasks.ROWS)}) and no file.")
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {str(args.out)!r} is a file; give a folder, which need not exist yet.")
    model = load_model(args.model, args.device)
    named = args.task in tasks.ROWS
    prompts = tasks.make(args.task, model, args.prompts, args.seed) if named else PromptPairs.from_jsonl(model, args.task)
    right = prompts.correct(model)
    print(f"The model answers {len(right)} of {len(prompts)} prompts right; the circuit is for those.")
    train, test = right.split(0.75, seed=args.seed)
    result, report = _find(model, train, test, max_kl=args.max_kl, ablation=args.ablation, granularities=args.granularities, seed=args.seed)
    _show(result, report)
    args.out.mkdir(parents=True, exist_ok=True)
    result.circuit.save(args.out / "circuit.safetensors")
    settings = {"model": args.model, "task": args.task, "max_kl": args.max_kl, "seed": args.seed, "prompts": len(train)}
    (args.out / "report.json").write_text(json.dumps(_as_json(settings, result, report), indent=2) + "\n")
    print(f"Written: {args.out / 'circuit.safetensors'}, {args.out / 'report.json'}")


def load_model(name: str, device: str) -> Any:
    """A model by its Hugging Face name or folder, or the embedded one for "toy". Raises ValueError where the device cannot be used."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise ValueError(f"--device {device!r} cannot be used here, 'cpu' can: {error}") from error
    if name == "toy":
        return toy.load(n=1)[0].to(device)
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(name, device=device).eval()


def _find(model: Any, train: PromptPairs, test: PromptPairs, *, max_kl: float, ablation: str = "interchange",
          granularities: Sequence[str] | None = None, seed: int = 0) -> tuple[PruneResult, Evaluation]:
    masks = add_node_masks(model, granularities, ablation=ablation)
    try:
        result = masks.prune(train, max_kl=max_kl, seed=seed)
    finally:
        masks.remove()
    return result, evaluate(model, result.circuit, test)


def _show(result: PruneResult, report: Evaluation) -> None:
    print(f"\nLive nodes by layer:\n{result.circuit.summary().to_string()}")
    print(f"\nOn held-out prompts:\n{report}")
    print(f"\n{'Within' if result.converged else 'NOT within'} the budget: KL {result.kl:.4f} nats on the prompts of the search. "
          f"{result.circuit.size:,} of {result.circuit.size_total:,} leaf nodes ({1 - result.circuit.sparsity:.1%}), "
          f"{result.circuit.parameters:,} of {result.circuit.parameters_total:,} weights, {result.seconds:.0f} s.")


def _as_json(settings: dict[str, Any], result: PruneResult, report: Evaluation) -> dict[str, Any]:
    circuit = result.circuit
    return {
        "settings": settings | {"ablation": circuit.ablation.name, "granularities": list(circuit.space.granularities)},
        "converged": result.converged, "kl": result.kl, "seconds": result.seconds, "peak_memory_bytes": result.peak_memory,
        "live": circuit.count(), "nodes": circuit.space.totals(), "weights": [circuit.parameters, circuit.parameters_total],
        "held_out": asdict(report),
    }
