"""The command `tl-nodeprune`: the demo, pruning a model, and a page about a circuit, from a shell."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from tl_nodeprune import tasks, toy
from tl_nodeprune.ablation import as_ablation
from tl_nodeprune.checks import check_agreement, check_counts
from tl_nodeprune.circuit import Circuit
from tl_nodeprune.crosscheck import COARSE, activation_patching
from tl_nodeprune.evaluation import Evaluation, evaluate
from tl_nodeprune.masks import add_node_masks
from tl_nodeprune.nodes import GRANULARITIES, check_granularities
from tl_nodeprune.prompts import PromptPairs
from tl_nodeprune.pruning import PruneResult
from tl_nodeprune.viz import overview, save_html

_PATCHED = 32  # prompts that effects of single nodes are measured on


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
    demo.add_argument("--html", type=Path, default=Path("out") / "demo.html", help="the page to write (default: %(default)s)")
    demo.set_defaults(command=_demo)
    show = commands.add_parser("show", help="write a page about a saved circuit: summary, figures, kept nodes")
    show.add_argument("circuit", type=Path, help="a circuit.safetensors that `prune` or Circuit.save wrote")
    show.add_argument("--html", type=Path, required=True, help="the page to write; it needs no network")
    show.add_argument("--no-effects", action="store_true", help="leave out the effects of single heads and blocks, one run each")
    _add_model_and_task(show, seed=1, prompts=64, seed_of="the named tasks' prompts")
    show.set_defaults(command=_show_page)
    prune = commands.add_parser("prune", help="find a circuit in a model of yours")
    prune.add_argument("--max-kl", type=float, default=0.05, help="nats at the answer positions (default: %(default)s)")
    prune.add_argument("--agreement", type=float, help="share of prompts answered as by the full model (default: 0.98 up to 0.05 nats)")
    prune.add_argument("--out", type=Path, required=True, help="folder for circuit.safetensors and report.json")
    prune.add_argument("--ablation", default="interchange", help="interchange, mean, zero or optimal (default: %(default)s)")
    prune.add_argument("--granularities", nargs="+", metavar="G", help=f"some of {', '.join(GRANULARITIES)} (default: all)")
    prune.add_argument("--layers", nargs="+", type=int, metavar="L", help="which to search in (default: all)")
    prune.add_argument("--steps", type=int, default=200, help="of the search, at most (default: %(default)s)")
    prune.add_argument("--batch-size", type=int, default=64, help="prompts per forward (default: %(default)s)")
    prune.add_argument("--html", type=Path, help="also write a page about the circuit, on the prompts held out")
    _add_model_and_task(prune, seed=0, prompts=200, seed_of="the named tasks' prompts, the split and the search")
    prune.set_defaults(command=_prune)
    return parser


def _add_model_and_task(parser: argparse.ArgumentParser, *, seed: int, prompts: int, seed_of: str) -> None:
    parser.add_argument("--model", required=True, help="a Hugging Face name or folder, or 'toy' for the embedded model")
    parser.add_argument("--task", required=True, help=f"{', '.join(tasks.ROWS)}, or a .jsonl file (clean, corrupted, answer, wrong)")
    parser.add_argument("--prompts", type=int, default=prompts, help="how many, for the named tasks (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=seed, help=f"of {seed_of} (default: %(default)s)")
    parser.add_argument("--device", default="cpu")


def _demo(args: argparse.Namespace) -> None:
    _check_page(args.html)
    model, prompts = toy.load(args.task)
    print(f"The embedded model: {model.cfg.n_layers} layers, {model.cfg.n_heads} heads, d_model {model.cfg.d_model}. Task: {args.task}.")
    print(f"  clean:     {model.tokenizer.decode(prompts.clean[0][prompts.attention_mask[0]])}")  # type: ignore[index]
    print(f"  corrupted: {model.tokenizer.decode(prompts.corrupted[0][prompts.attention_mask[0]])}")  # type: ignore[index]
    train, test = prompts.split(0.75, seed=0)
    result, report = _find(model, train, test, max_kl=0.05)
    _show(result, report)
    _write_page(args.html, model, result, test, args.task)


def _show_page(args: argparse.Namespace) -> None:
    _check_page(args.html)
    _check_task(args.task)
    circuit = Circuit.load(args.circuit)
    model = load_model(args.model, args.device)
    circuit.check_fits(model)
    _write_page(args.html, model, circuit, _prompts(args, model), Path(args.task).stem, effects=not args.no_effects,
                note="Prompts that the circuit was searched on flatter it. The page that `tl-nodeprune prune --html` writes is on others.")


def _check_page(path: Path) -> None:
    if path.is_dir():
        raise ValueError(f"--html {str(path)!r} is a folder; give the name of a file.")
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir():
        raise ValueError(f"--html {str(path)!r} cannot be written: {str(above)!r} is a file.")


def _write_page(path: Path, model: Any, circuit: Circuit | PruneResult, prompts: PromptPairs, task: str, *, effects: bool = True,
                note: str = "") -> None:
    gated = (circuit.circuit if isinstance(circuit, PruneResult) else circuit).space.granularities
    some = prompts[:_PATCHED]
    found = activation_patching(model, some) if effects and some.has_corrupted and any(name in gated for name in COARSE) else None
    summary, *figures = overview(model, circuit, prompts, task=task, effects=found)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_html(path, summary, *[note] * bool(note), *figures, title=f"Circuit: {task}")
    print(f"A page to look at, figures and kept nodes: {path.absolute()}")


def _prune(args: argparse.Namespace) -> None:
    if args.max_kl <= 0:
        raise ValueError(f"--max-kl {args.max_kl}; it must be above 0.")
    _check_task(args.task)
    as_ablation(args.ablation)
    check_agreement(args.agreement)
    check_granularities(args.granularities, GRANULARITIES)
    check_counts(steps=args.steps, batch_size=args.batch_size)
    if args.html:
        _check_page(args.html)
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {str(args.out)!r} is a file; give a folder, which need not exist yet.")
    model = load_model(args.model, args.device)
    train, test = _prompts(args, model).split(0.75, seed=args.seed)
    result, report = _find(model, train, test, granularities=args.granularities, layers=args.layers, ablation=args.ablation,
                           max_kl=args.max_kl, agreement=args.agreement, steps=args.steps, batch_size=args.batch_size, seed=args.seed)
    _show(result, report)
    args.out.mkdir(parents=True, exist_ok=True)
    result.circuit.save(args.out / "circuit.safetensors")
    settings = {"model": args.model, "task": args.task, "max_kl": args.max_kl, "agreement": args.agreement, "seed": args.seed,
                "prompts": len(train)}
    (args.out / "report.json").write_text(json.dumps(_as_json(settings, result, report), indent=2, allow_nan=False) + "\n")
    print(f"Written: {args.out / 'circuit.safetensors'}, {args.out / 'report.json'}")
    if args.html:
        _write_page(args.html, model, result, test, Path(args.task).stem)


def _check_task(task: str) -> None:
    if task not in tasks.ROWS and not Path(task).is_file():
        raise ValueError(f"--task {task!r} is no task ({', '.join(tasks.ROWS)}) and no file.")


def _prompts(args: argparse.Namespace, model: Any) -> PromptPairs:
    named = args.task in tasks.ROWS
    prompts = tasks.make(args.task, model, args.prompts, args.seed) if named else PromptPairs.from_jsonl(model, args.task)
    right = prompts.correct(model)
    print(f"The model answers {len(right)} of {len(prompts)} prompts right; the circuit is for those.")
    return right


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


def _find(model: Any, train: PromptPairs, test: PromptPairs, *, granularities: Sequence[str] | None = None,
          layers: Sequence[int] | None = None, ablation: str = "interchange", **search: Any) -> tuple[PruneResult, Evaluation]:
    masks = add_node_masks(model, granularities, layers, ablation)
    try:
        result = masks.prune(train, **search)
    finally:
        masks.remove()
    return result, evaluate(model, result.circuit, test)


def _show(result: PruneResult, report: Evaluation) -> None:
    print(f"\nLive nodes by layer:\n{result.circuit.summary().to_string()}")
    print(f"\nOn held-out prompts:\n{report}")
    print(f"\n{'Converged' if result.converged else 'NOT converged'}: KL {result.kl:.4f} nats on the prompts of the search. "
          f"{result.circuit.size:,} of {result.circuit.size_total:,} leaf nodes ({1 - result.circuit.sparsity:.1%}), "
          f"{result.circuit.parameters:,} of {result.circuit.parameters_total:,} weights, {result.seconds:.0f} s.")


def _as_json(settings: dict[str, Any], result: PruneResult, report: Evaluation) -> dict[str, Any]:
    circuit = result.circuit
    return {
        "settings": settings | {"ablation": circuit.ablation.name, "granularities": list(circuit.space.granularities)},
        "converged": result.converged, "kl": result.kl, "seconds": result.seconds, "peak_memory_bytes": result.peak_memory,
        "live": circuit.count(), "nodes": circuit.space.totals(), "weights": [circuit.parameters, circuit.parameters_total],
        "p_value": _or_null(result.p_value), "minimal": result.minimal, "gap": _or_null(result.gap),
        "held_out": asdict(report) | {"faithfulness": _or_null(report.faithfulness)},
    }


def _or_null(value: float) -> float | None:
    return None if math.isnan(value) else value
