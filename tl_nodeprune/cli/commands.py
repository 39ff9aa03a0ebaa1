"""Commands about circuits that are there, and `rank`: each checks its files, loads the model, saves what it found, then prints it."""

from __future__ import annotations

import argparse
import io
import json
import math
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from tl_nodeprune.circuit import Circuit, NodeScores, evaluate, files
from tl_nodeprune.cli.inputs import add_model_and_task, check_page, check_source, inputs_of, make_folder, model_of, prompts_of
from tl_nodeprune.cli.output import print_table
from tl_nodeprune.evidence import compare, explain, report
from tl_nodeprune.masks import as_ablation
from tl_nodeprune.mib import write as write_mib
from tl_nodeprune.nodes import GRANULARITIES, GateKey, check_counts, check_granularities, find_nodes, node_name
from tl_nodeprune.search import rank

_SHOWN = 20  # nodes of a ranking that are printed
_FORMATS = {"evaluate": (".json",), "explain": (".txt", ".csv"), "report": (".md", ".csv"), "rank": (".csv", ".json", ".pt"),
            "compare": (".csv",)}


def add(commands: Any) -> None:
    """Add the commands to a parser's."""
    judge = _add(commands, "evaluate", _evaluate, "how faithful a saved circuit is, beside the full and the fully ablated model",
                 "file for the figures, .json")
    judge.add_argument("circuit", help="a circuit.safetensors that `prune` or Circuit.save wrote")
    judge.add_argument("--ablation", help="interchange, mean or zero (default: the one that the circuit was found under)")
    evidence = _add(commands, "report", _report, "what speaks for a saved circuit and what against it", "file for the report, .md or .csv")
    evidence.add_argument("circuit", help="a circuit.safetensors that `prune` or Circuit.save wrote")
    evidence.add_argument("--n-random", type=int, default=100, help="random circuits of its size (default: %(default)s)")
    evidence.add_argument("--max-units", type=int, default=64, help="heads and blocks taken out one at a time (default: %(default)s)")
    meaning = _add(commands, "explain", _explain, "what a saved circuit does, in three sentences and ten nodes",
                   "file for the explanation, .txt or .csv")
    meaning.add_argument("circuit", help="a circuit.safetensors that `prune` or Circuit.save wrote")
    meaning.add_argument("--nodes", type=int, default=10, help="heads and blocks shown (default: %(default)s)")
    ranking = _add(commands, "rank", _rank, "a score for every node, without a budget",
                   "file for all scores: .csv, or .json or .pt as the MIB board reads them")
    ranking.add_argument("--ablation", default="interchange", help="interchange, mean or zero (default: %(default)s)")
    ranking.add_argument("--granularities", nargs="+", metavar="G", help=f"some of {', '.join(GRANULARITIES)} (default: all)")
    ranking.add_argument("--layers", nargs="+", type=int, metavar="L", help="which to rank in (default: all)")
    ranking.add_argument("--steps", type=int, help="of the search (default: more for more nodes)")
    for parser in (judge, evidence, meaning, ranking):
        parser.add_argument("--batch-size", type=int, default=64, help="prompts per forward (default: %(default)s)")
        add_model_and_task(parser, seed=1 if parser is not ranking else 0, prompts=200 if parser is ranking else 64,
                           seed_of="the named tasks' prompts and what is sampled at random")
    several = _add(commands, "compare", _compare, "which nodes saved circuits share, beside chance", "file for the nodes, .csv")
    several.add_argument("circuits", nargs="+", metavar="NAME=FILE", help="two circuits or more of one model, as ioi=a.safetensors")
    several.add_argument("--level", nargs="+", default=["head"], metavar="G", help="granularities to compare at (default: head)")


def _add(commands: Any, name: str, run: Any, what: str, out: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=what, description=what[0].upper() + what[1:] + ".")
    parser.add_argument("--out", help=out)
    parser.set_defaults(command=run, name=name)
    return parser


def _check_out(args: argparse.Namespace, read: dict[str, Path]) -> None:
    if args.out is not None:
        check_page(args.out, "--out")
        if args.out.suffix not in (allowed := _FORMATS[args.name]):
            raise ValueError(f"--out {str(args.out)!r}; give a file that ends in {' or '.join(allowed)}.")
        files.check_apart({"--out": args.out}, read)


def _read(args: argparse.Namespace) -> tuple[Circuit, Any, Any]:
    """The circuit, the model and the prompts of a command line, after a look at the files to write."""
    check_source(args)
    check_counts(batch_size=args.batch_size)
    _check_out(args, inputs_of(args) | {"the circuit": args.circuit})
    circuit = Circuit.load(args.circuit)
    if getattr(args, "ablation", None) is not None:
        circuit = circuit.under(args.ablation)
    model = model_of(args)
    circuit.check_fits(model)
    prompts = prompts_of(args, model)
    _make_out(args)
    return circuit, model, prompts


def _make_out(args: argparse.Namespace) -> None:
    if args.out is not None:
        make_folder("--out", args.out.parent)
        files.check_target(args.out)


def _save(args: argparse.Namespace, text: str) -> None:
    """Before anything is printed."""
    if args.out is not None:
        files.write(args.out, text)


def _say(args: argparse.Namespace) -> None:
    if args.out is not None:
        print(f"Written: {args.out}")


def _evaluate(args: argparse.Namespace) -> None:
    circuit, model, prompts = _read(args)
    found = evaluate(model, circuit, prompts, batch_size=args.batch_size)
    figures = asdict(found) | {"faithfulness": None if math.isnan(found.faithfulness) else found.faithfulness}
    _save(args, json.dumps(figures, indent=2, allow_nan=False) + "\n")
    print(f"{found.n_prompts} prompts, {found.ablation} ablation; KL in nats.")
    print_table(found.to_frame().rename_axis("").reset_index())
    _say(args)


def _report(args: argparse.Namespace) -> None:
    check_counts(n_random=args.n_random, max_units=args.max_units)
    circuit, model, prompts = _read(args)
    found = report(model, circuit, prompts, n_random=args.n_random, max_units=args.max_units, seed=args.seed, batch_size=args.batch_size)
    _save(args, found.to_frame().to_csv() if args.out is not None and args.out.suffix == ".csv" else found.to_markdown())
    print(found)
    print_table(found.to_frame().drop(columns="passed").reset_index())
    _say(args)


def _explain(args: argparse.Namespace) -> None:
    check_counts(nodes=args.nodes)
    circuit, model, prompts = _read(args)
    found = explain(model, circuit, prompts, nodes=args.nodes, batch_size=args.batch_size)
    _save(args, found.to_frame().to_csv(index=False) if args.out is not None and args.out.suffix == ".csv" else f"{found}\n")
    print(found)
    _say(args)


def _rank(args: argparse.Namespace) -> None:
    check_source(args)
    as_ablation(args.ablation)
    check_granularities(args.granularities, GRANULARITIES)
    check_counts(steps=1 if args.steps is None else args.steps, batch_size=args.batch_size)
    _check_out(args, inputs_of(args))
    model = model_of(args)
    space = find_nodes(model).restrict(args.granularities, args.layers)
    if args.out is not None and args.out.suffix != ".csv" and (kinds := {key.granularity for key in space.free()} & {"attn", "layer"}):
        raise ValueError(f"--out {str(args.out)!r}: the MIB board has no {' or '.join(sorted(kinds))} nodes; write a .csv.")
    prompts = prompts_of(args, model)
    _make_out(args)
    scores = rank(model, prompts, steps=args.steps, batch_size=args.batch_size, seed=args.seed, granularities=args.granularities,
                  layers=args.layers, ablation=args.ablation)
    table = _table(scores)
    if args.out is not None and args.out.suffix != ".csv":
        write_mib(model, scores, args.out)
    else:
        table.to_csv(text := io.StringIO(), index=False)
        _save(args, text.getvalue())
    print(f"The {min(_SHOWN, len(table))} of {len(table):,} leaf nodes that come first, from {len(prompts)} prompts:")
    print_table(table.head(_SHOWN))
    _say(args)


def _table(scores: NodeScores) -> pd.DataFrame:
    rows = []
    for key, values in scores.gates.items():
        rows += _rows(GateKey(*key), values)
    return pd.DataFrame(rows, columns=["node", "granularity", "layer", "score"]).sort_values("score", ascending=False, kind="stable")


def _rows(key: GateKey, values: torch.Tensor) -> list[tuple[str, str, int, float]]:
    indices = product(*(range(size) for size in values.shape))
    return [(node_name(key.granularity, key.layer, *index), key.granularity, key.layer, score)
            for index, score in zip(indices, values.reshape(-1).tolist(), strict=True)]


def _compare(args: argparse.Namespace) -> None:
    named = dict(_named(text) for text in args.circuits)
    if len(named) < len(args.circuits):
        raise ValueError("two of the circuits have one name; give each a name of its own, as ioi=a.safetensors.")
    check_granularities(args.level, GRANULARITIES)
    _check_out(args, {f"the circuit {name!r}": path for name, path in named.items()})
    found = compare({name: Circuit.load(path) for name, path in named.items()}, args.level)
    _make_out(args)
    _save(args, found.nodes.to_csv(index=False))
    print(found)
    _say(args)


def _named(text: str) -> tuple[str, Path]:
    name, separator, path = text.partition("=")
    if not separator or not name or not path:
        raise ValueError(f"{text!r} is not a circuit with a name; give NAME=FILE, as ioi=a.safetensors.")
    return name, Path(path)
