"""The command `tl-nodeprune`: the demo, pruning a model, and a page about a circuit, from a shell."""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import warnings
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
from tl_nodeprune.search import PruneResult
from tl_nodeprune.viz import overview, save_html
from tl_nodeprune.viz.values import held_out

_PATCHED = 32  # prompts that effects of single nodes are measured on
_MAX_KL = 0.05  # nats, where no budget is given
_SHOWN = 8  # sizes of the frontier
_SAME_TOKEN = 0.5  # share of prompts: with the full model's most likely token on fewer a circuit is not said to have converged
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_VERDICTS = ("no circuit", "the budget is untested")  # how the search's warnings begin that say why it does not converge


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
    budget = prune.add_mutually_exclusive_group()
    budget.add_argument("--max-kl", type=float, help=f"nats at the answer positions, on prompts held out (default: {_MAX_KL})")
    budget.add_argument("--max-nodes", type=_count, help="instead: leaf nodes at most, a share (0.1) or a count (200)")
    prune.add_argument("--agreement", type=float, help="share of prompts answered as by the full model (default: 0.98 up to 0.05 nats)")
    prune.add_argument("--out", type=Path, required=True, help="folder for circuit.safetensors and report.json")
    prune.add_argument("--ablation", default="interchange", help="interchange, mean, zero or optimal (default: %(default)s)")
    prune.add_argument("--granularities", nargs="+", metavar="G", help=f"some of {', '.join(GRANULARITIES)} (default: all)")
    prune.add_argument("--layers", nargs="+", type=int, metavar="L", help="which to search in (default: all)")
    prune.add_argument("--steps", type=int, help="of the search (default: more for more nodes)")
    prune.add_argument("--batch-size", type=int, default=64, help="prompts per forward (default: %(default)s)")
    prune.add_argument("--time-limit", type=float, metavar="SECONDS", help="for the search; the best so far is kept then")
    prune.add_argument("--checkpoint", type=Path, metavar="FOLDER", help="keep the state here; a search that was broken off goes on")
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
    parser.add_argument("--dtype", default="float32", choices=tuple(_DTYPES), help="of the model's weights (default: %(default)s)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model from the Hugging Face hub")


def _count(text: str) -> float | int:
    """A count (200) or a share (0.1)."""
    return int(text) if text.strip().lstrip("+-").isdigit() else float(text)


def _demo(args: argparse.Namespace) -> None:
    _check_page(args.html)
    model, prompts = toy.load(args.task)
    print(f"The embedded model: {model.cfg.n_layers} layers, {model.cfg.n_heads} heads, d_model {model.cfg.d_model}. Task: {args.task}.")
    print(f"  clean:     {model.tokenizer.decode(prompts.clean[0][prompts.attention_mask[0]])}")  # type: ignore[index]
    print(f"  corrupted: {model.tokenizer.decode(prompts.corrupted[0][prompts.attention_mask[0]])}")  # type: ignore[index]
    train, test = prompts.split(0.75, seed=0)
    result, why = _find(model, train, test, max_kl=_MAX_KL)
    _show(result, evaluate(model, result.circuit, test), why, f"within {_MAX_KL} nats there")
    _write_page(args.html, model, result, test, args.task)


def _show_page(args: argparse.Namespace) -> None:
    _check_page(args.html)
    _check_task(args.task)
    circuit = Circuit.load(args.circuit)
    model = load_model(args.model, args.device, args.dtype, trust_remote_code=args.trust_remote_code)
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
    max_kl = _MAX_KL if args.max_kl is None and args.max_nodes is None else args.max_kl
    _check_asked(args, max_kl)
    model = load_model(args.model, args.device, args.dtype, trust_remote_code=args.trust_remote_code)
    train, test = _prompts(args, model).split(0.75, seed=args.seed)
    _make_folder(args.out)
    asked = {"max_kl": max_kl, "max_nodes": args.max_nodes, "agreement": args.agreement, "steps": args.steps, "seed": args.seed,
             "time_limit": args.time_limit}
    result, why = _find(model, train, test, granularities=args.granularities, layers=args.layers, ablation=args.ablation,
                        batch_size=args.batch_size, checkpoint=args.checkpoint, **asked)
    result.circuit.save(args.out / "circuit.safetensors")  # before anything else that could fail
    report = evaluate(model, result.circuit, test, batch_size=args.batch_size)
    settings = asked | {"model": args.model, "task": args.task, "dtype": args.dtype, "prompts": len(train), "held_out": len(test)}
    (args.out / "report.json").write_text(json.dumps(_as_json(settings, result, report), indent=2, allow_nan=False) + "\n")
    met = f"within {max_kl} nats there" if max_kl is not None else f"of at most {args.max_nodes} nodes; no KL was asked for"
    _show(result, report, why, met)
    print(f"Written: {args.out / 'circuit.safetensors'}, {args.out / 'report.json'}")
    if args.html:
        _write_page(args.html, model, result, test, Path(args.task).stem)


def _check_asked(args: argparse.Namespace, max_kl: float | None) -> None:
    """All that can be wrong without a look at the model or the prompts."""
    if max_kl is not None and not 0 < max_kl < math.inf:
        raise ValueError(f"--max-kl {max_kl}; it must be a finite number above 0.")
    if args.time_limit is not None and not 0 < args.time_limit < math.inf:
        raise ValueError(f"--time-limit {args.time_limit}; it must be a finite number of seconds above 0.")
    _check_task(args.task)
    as_ablation(args.ablation)
    check_agreement(args.agreement)
    if args.agreement is not None and max_kl is None:
        raise ValueError("--agreement goes with --max-kl, not with --max-nodes.")
    check_granularities(args.granularities, GRANULARITIES)
    check_counts(steps=1 if args.steps is None else args.steps, batch_size=args.batch_size)
    if args.html:
        _check_page(args.html)
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {str(args.out)!r} is a file; give a folder, which need not exist yet.")


def _make_folder(path: Path) -> None:
    """Make the folder, and see that files can be written there: an error comes now, not after the search."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ValueError(f"--out {str(path)!r} cannot be written: {error}") from error


def _check_task(task: str) -> None:
    if task not in tasks.ROWS and not Path(task).is_file():
        raise ValueError(f"--task {task!r} is no task ({', '.join(tasks.ROWS)}) and no file.")


def _prompts(args: argparse.Namespace, model: Any) -> PromptPairs:
    named = args.task in tasks.ROWS
    prompts = tasks.make(args.task, model, args.prompts, args.seed) if named else PromptPairs.from_jsonl(model, args.task)
    right = prompts.correct(model)
    print(f"The model answers {len(right)} of {len(prompts)} prompts right; the circuit is for those.")
    return right


def load_model(name: str, device: str, dtype: str = "float32", *, trust_remote_code: bool = False) -> Any:
    """A model by its Hugging Face name or folder, or the embedded one for "toy". Raises ValueError where the device cannot be used."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise ValueError(f"--device {device!r} cannot be used here, 'cpu' can: {error}") from error
    if name == "toy":
        return toy.load(n=1)[0].to(device).to(_DTYPES[dtype])
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(name, device=device, dtype=_DTYPES[dtype], trust_remote_code=trust_remote_code).eval()


def _find(model: Any, train: PromptPairs, test: PromptPairs, *, granularities: Sequence[str] | None = None,
          layers: Sequence[int] | None = None, ablation: str = "interchange", **search: Any) -> tuple[PruneResult, str]:
    """A search that is judged on `test`, and why it does not converge."""
    masks = add_node_masks(model, granularities, layers, ablation)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            result = masks.prune(train, held_out=test, **search)
    finally:
        masks.remove()
    why = [str(warning.message) for warning in caught if str(warning.message).startswith(_VERDICTS)]
    for warning in caught:
        if str(warning.message) not in why:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return result, " ".join(why)


def _show(result: PruneResult, report: Evaluation, why: str, met: str) -> None:
    """Print the number held out, what it means, and the sizes. why: of a result that has not converged; met: what one that has is."""
    verdict = {True: "Converged", False: "NOT converged", None: "Untested"}[result.converged]
    reason = met if result.converged else why.removeprefix(f"{_VERDICTS[1]}: ") or "the budget is not known to hold on prompts held out."
    if result.converged and report.exact_match < _SAME_TOKEN:
        verdict = "Within the budget, which is of KL"
        reason += (f"; but its most likely token is the full model's on only {report.exact_match:.0%} of these prompts, so it is no copy "
                   "of the model. (Where many answers are about as likely, one token says little.)")
    print(f"\n{held_out(result)}\n{verdict}: {reason}")
    if result.stopped:
        print(f"Stopped by the {result.stopped}: this is the best so far.")
    circuit = result.circuit
    print(f"{circuit.size:,} of {circuit.size_total:,} leaf nodes ({1 - circuit.sparsity:.1%}), {circuit.parameters:,} of "
          f"{circuit.parameters_total:,} weights, {result.seconds:.0f} s.")
    print(f"\nSize against KL, from the same run:\n{_frontier(result)}")
    print(f"\nLive nodes by layer:\n{circuit.summary().to_string()}\n\nOn held-out prompts:\n{report}\n")


def _frontier(result: PruneResult) -> str:
    """Some of the frontier's sizes, evenly among its rows."""
    table = result.frontier
    rows = sorted({round(i * (len(table) - 1) / (_SHOWN - 1)) for i in range(_SHOWN)} if len(table) else ())
    looks = {"nodes": "{:,}", "share": "{:.2%}", "kl": "{:.4f}", "search_kl": "{:.4f}", "accuracy": "{:.0%}"}
    names = ["nodes", "share", "KL held out", "KL searched", "right"]
    return str(table.iloc[rows][list(looks)].to_string(index=False, header=names, formatters=[look.format for look in looks.values()]))


def _as_json(settings: dict[str, Any], result: PruneResult, report: Evaluation) -> dict[str, Any]:
    circuit = result.circuit
    return {
        "settings": settings | {"ablation": circuit.ablation.name, "granularities": list(circuit.space.granularities)},
        "kl": _or_null(result.kl), "interval": [_or_null(end) for end in result.interval], "accuracy": _or_null(result.accuracy),
        "search_kl": _or_null(result.search_kl), "converged": result.converged, "p_value": _or_null(result.p_value),
        "minimal": result.minimal, "tested": result.tested, "ruled_out": result.ruled_out, "stopped": result.stopped,
        "seconds": result.seconds, "peak_memory_bytes": result.peak_memory,
        "live": circuit.count(), "nodes": circuit.space.totals(), "weights": [circuit.parameters, circuit.parameters_total],
        "frontier": json.loads(result.frontier.to_json(orient="records", double_precision=15)),
        "held_out": asdict(report) | {"faithfulness": _or_null(report.faithfulness)},
    }


def _or_null(value: float) -> float | None:
    return None if math.isnan(value) else value
