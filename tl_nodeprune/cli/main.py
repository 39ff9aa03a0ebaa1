"""The command `tl-nodeprune`: the demo, pruning a model, and a page about a circuit, from a shell."""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tl_nodeprune
from tl_nodeprune import toy
from tl_nodeprune.circuit import Circuit, evaluate, files
from tl_nodeprune.cli import commands, shell
from tl_nodeprune.cli.inputs import (
    CIRCUIT,
    REPORT,
    add_model_and_task,
    check_page,
    check_source,
    count_or_share,
    inputs_of,
    make_folder,
    model_of,
    pass_on,
    prompts_of,
)
from tl_nodeprune.cli.output import VERDICTS, as_json, show
from tl_nodeprune.evidence import COARSE, activation_patching
from tl_nodeprune.masks import as_ablation
from tl_nodeprune.nodes import GRANULARITIES, check_agreement, check_counts, check_granularities
from tl_nodeprune.prompts import PromptPairs, tasks
from tl_nodeprune.search import CHECKPOINT, PruneResult, prune
from tl_nodeprune.viz import overview, save_html

_PATCHED = 32  # prompts that effects of single nodes are measured on
_MAX_KL = 0.05  # nats, where no budget is given


EPILOG = """\
examples:
  tl-nodeprune demo
  tl-nodeprune prune --model gpt2 --task ioi --granularities head mlp --max-kl 0.2 --out results
  tl-nodeprune prune --model gpt2 --task prompts.jsonl --max-nodes 20 --granularities head mlp --out results
  tl-nodeprune show results/circuit.safetensors --model gpt2 --task ioi --html circuit.html
  tl-nodeprune evaluate results/circuit.safetensors --model gpt2 --task ioi
  tl-nodeprune explain results/circuit.safetensors --model gpt2 --task ioi
  tl-nodeprune report results/circuit.safetensors --model gpt2 --task ioi --out report.md
  tl-nodeprune rank --model gpt2 --task ioi --granularities head mlp --out scores.csv
  tl-nodeprune compare ioi=a/circuit.safetensors pronoun=b/circuit.safetensors

exit status: 0; 1 for an error that the command does not know; 2 where the input is wrong or a file cannot be written; 130 after Ctrl-C.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit status, see `shell.run`; raises SystemExit(2) for an unknown option, as argparse does."""
    return shell.run("tl-nodeprune", lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> None:
    args = _parser().parse_args(argv)
    args.line = shlex.join(["tl-nodeprune", *(sys.argv[1:] if argv is None else argv)])
    for name in ("model", "task", "circuit", "html", "out", "checkpoint", "device_map", "revision"):
        if getattr(args, name, None) == "":
            raise ValueError(f"{'' if name == 'circuit' else '--'}{name.replace('_', '-')} is ''; give a name.")
    for name in ("circuit", "html", "out", "checkpoint"):
        if getattr(args, name, None) is not None:
            setattr(args, name, Path(getattr(args, name)))
    args.command(args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tl-nodeprune", description="Find the nodes of a transformer that a task needs.",
                                     formatter_class=argparse.RawDescriptionHelpFormatter, epilog=EPILOG)
    parser.add_argument("--version", action="version", version=f"tl-nodeprune {tl_nodeprune.__version__}")
    subcommands = parser.add_subparsers(required=True, metavar="COMMAND")
    demo = subcommands.add_parser("demo", help="find a circuit in the small model that comes with the package")
    demo.add_argument("--task", default="ioi", choices=tuple(tasks.ROWS))
    demo.add_argument("--html", default=str(Path("out") / "demo.html"), help="the page to write (default: %(default)s)")
    demo.set_defaults(command=_demo)
    show = subcommands.add_parser("show", help="say what is in a saved circuit; with --html a page about it: summary, figures, kept nodes")
    show.add_argument("circuit", help="a circuit.safetensors that `prune` or Circuit.save wrote")
    show.add_argument("--html", help="a page to write, for which --model and --task are needed too; it needs no network")
    show.add_argument("--no-effects", action="store_true", help="leave out the effects of single heads and blocks, one run each")
    add_model_and_task(show, seed=1, prompts=64, seed_of="the named tasks' prompts", required=False)
    show.set_defaults(command=_show)
    prune = subcommands.add_parser("prune", help="find a circuit in a model of yours")
    budget = prune.add_mutually_exclusive_group()
    budget.add_argument("--max-kl", type=float, help=f"nats at the answer positions, on prompts held out (default: {_MAX_KL})")
    budget.add_argument("--max-nodes", type=count_or_share, help="instead: leaf nodes at most, a share (0.1) or a count (200)")
    prune.add_argument("--agreement", type=float, help="share of prompts answered as by the full model (default: 0.98 up to 0.05 nats)")
    prune.add_argument("--out", required=True, help="folder for circuit.safetensors and report.json")
    prune.add_argument("--ablation", default="interchange", help="interchange, mean, zero or optimal (default: %(default)s)")
    prune.add_argument("--granularities", nargs="+", metavar="G", help=f"some of {', '.join(GRANULARITIES)} (default: all)")
    prune.add_argument("--layers", nargs="+", type=int, metavar="L", help="which to search in (default: all)")
    prune.add_argument("--steps", type=int, help="of the search (default: more for more nodes)")
    prune.add_argument("--batch-size", type=int, default=64, help="prompts per forward (default: %(default)s)")
    prune.add_argument("--time-limit", type=float, metavar="SECONDS", help="for the search; the best so far is kept then")
    prune.add_argument("--checkpoint", metavar="FOLDER", help="keep the state here; a search that was broken off goes on")
    prune.add_argument("--html", help="also write a page about the circuit, on the prompts held out")
    add_model_and_task(prune, seed=0, prompts=200, seed_of="the named tasks' prompts, the split and the search")
    prune.set_defaults(command=_prune)
    commands.add(subcommands)
    return parser


def _demo(args: argparse.Namespace) -> None:
    check_page(args.html)
    make_folder("--html", args.html.parent)
    model, prompts = toy.load(args.task)
    print(f"The embedded model: {model.cfg.n_layers} layers, {model.cfg.n_heads} heads, d_model {model.cfg.d_model}. Task: {args.task}.")
    print(f"  clean:     {model.tokenizer.decode(prompts.clean[0][prompts.attention_mask[0]])}")  # type: ignore[index]
    print(f"  corrupted: {model.tokenizer.decode(prompts.corrupted[0][prompts.attention_mask[0]])}")  # type: ignore[index]
    train, test = prompts.split(0.75, seed=0)
    result, why = _find(model, train, test, max_kl=_MAX_KL)
    report = evaluate(model, result.circuit, test)
    _write_page(args.html, model, result, test, args.task, command=args.line)
    show(result, report, why, f"within {_MAX_KL} nats there")
    _say_page(args.html)


def _show(args: argparse.Namespace) -> None:
    missing = [f"--{name}" for name in ("html", "model", "task") if getattr(args, name) is None]
    if not missing:
        return _show_page(args)
    if len(missing) < 3:
        raise ValueError(f"{' and '.join(missing)} missing: a page needs --html, --model and --task. Give all of them, or none, to be told "
                         "what is in the file.")
    circuit = Circuit.load(args.circuit)
    print(f"{circuit}\n\nLive nodes by layer:\n{circuit.summary().to_string()}")


def _show_page(args: argparse.Namespace) -> None:
    check_page(args.html)
    check_source(args)
    files.check_apart({"--html": args.html}, inputs_of(args) | {"the circuit": args.circuit})
    circuit = Circuit.load(args.circuit)
    model = model_of(args)
    circuit.check_fits(model)
    prompts = prompts_of(args, model)
    make_folder("--html", args.html.parent)
    _write_page(args.html, model, circuit, prompts, Path(args.task).stem, effects=not args.no_effects, command=args.line,
                note="Figures on the prompts of the search are too good. The page that `tl-nodeprune prune --html` writes is on others.")
    _say_page(args.html)


def _write_page(path: Path, model: Any, circuit: Circuit | PruneResult, prompts: PromptPairs, task: str, *, effects: bool = True,
                note: str = "", command: str = "") -> None:
    gated = (circuit.circuit if isinstance(circuit, PruneResult) else circuit).space.granularities
    some = prompts[:_PATCHED]
    found = activation_patching(model, some) if effects and some.has_corrupted and any(name in gated for name in COARSE) else None
    summary, *figures = overview(model, circuit, prompts, task=task, effects=found, command=command)
    save_html(path, summary, *[note] * bool(note), *figures, title=f"Circuit: {task}")


def _say_page(path: Path) -> None:
    print(f"A page to look at, figures and kept nodes: {path.absolute()}")


def _prune(args: argparse.Namespace) -> None:
    max_kl = _MAX_KL if args.max_kl is None and args.max_nodes is None else args.max_kl
    _check_asked(args, max_kl)
    model = model_of(args)
    train, test = prompts_of(args, model).split(0.75, seed=args.seed)
    _make_outputs(args)
    asked = {"max_kl": max_kl, "max_nodes": args.max_nodes, "agreement": args.agreement, "steps": args.steps, "seed": args.seed,
             "time_limit": args.time_limit}
    result, why = _find(model, train, test, granularities=args.granularities, layers=args.layers, ablation=args.ablation,
                        batch_size=args.batch_size, checkpoint=args.checkpoint, **asked)
    result.circuit.save(args.out / CIRCUIT, task=args.task)  # before anything else that could fail
    (args.out / REPORT).unlink(missing_ok=True)  # an earlier circuit's
    report = evaluate(model, result.circuit, test, batch_size=args.batch_size)
    settings = asked | {"model": args.model, "task": args.task, "dtype": args.dtype, "prompts": len(train), "held_out": len(test)}
    files.write(args.out / REPORT, json.dumps(as_json(settings, result, report), indent=2, allow_nan=False) + "\n")
    met = f"within {max_kl} nats there" if max_kl is not None else f"of at most {args.max_nodes} nodes; no KL was asked for"
    try:
        if args.html:
            _write_page(args.html, model, result, test, Path(args.task).stem, command=args.line)
    finally:
        show(result, report, why, met)
        print(f"Written: {args.out / CIRCUIT}, {args.out / REPORT}")
    if args.html:
        _say_page(args.html)


def _check_asked(args: argparse.Namespace, max_kl: float | None) -> None:
    """All that can be wrong without a look at the model or the prompts."""
    if max_kl is not None and not 0 < max_kl < math.inf:
        raise ValueError(f"--max-kl {max_kl}; it must be a finite number above 0.")
    if args.time_limit is not None and not 0 < args.time_limit < math.inf:
        raise ValueError(f"--time-limit {args.time_limit}; it must be a finite number of seconds above 0.")
    if (most := args.max_nodes) is not None and not (most >= 1 if isinstance(most, int) else 0 < most <= 1):
        raise ValueError(f"--max-nodes {most}; give a share above 0 and up to 1.0, or a count of 1 or more.")
    check_source(args, least=2)
    as_ablation(args.ablation)
    check_agreement(args.agreement)
    if args.agreement is not None and max_kl is None:
        raise ValueError("--agreement goes with --max-kl, not with --max-nodes.")
    check_granularities(args.granularities, GRANULARITIES)
    check_counts(**{"--steps": 1 if args.steps is None else args.steps, "--batch-size": args.batch_size})
    if args.html:
        check_page(args.html)
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {str(args.out)!r} is a file; give a folder, which need not exist yet.")
    files.check_apart(_outputs(args) | {"--out": args.out}, inputs_of(args))
    if args.checkpoint:
        files.check_apart(_outputs(args), {"the folder of --checkpoint": args.checkpoint})


def _outputs(args: argparse.Namespace) -> dict[str, Path]:
    """The files that `prune` writes, by what they are called."""
    outputs = {"the circuit": args.out / CIRCUIT, "the report": args.out / REPORT}
    if args.html:
        outputs = {"--html": args.html} | outputs
    return outputs | ({"the checkpoint": args.checkpoint / CHECKPOINT} if args.checkpoint else {})


def _make_outputs(args: argparse.Namespace) -> None:
    """Make the folders, and see that all files can be written: an error comes now, not after the search."""
    for name in ("checkpoint", "html", "out"):
        if path := getattr(args, name):
            make_folder(f"--{name}", path.parent if name == "html" else path)
    for path in _outputs(args).values():
        files.check_target(path)


def _find(model: Any, train: PromptPairs, test: PromptPairs, *, granularities: Sequence[str] | None = None,
          layers: Sequence[int] | None = None, ablation: str = "interchange", **search: Any) -> tuple[PruneResult, str]:
    """A search that is judged on `test`, and why it does not converge."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        result = prune(model, train, held_out=test, granularities=granularities, layers=layers, ablation=ablation, **search)
    why = [str(warning.message) for warning in caught if str(warning.message).startswith(VERDICTS)]
    pass_on(warning for warning in caught if str(warning.message) not in why)
    return result, " ".join(why)
