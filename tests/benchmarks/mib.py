"""CPR and CMD (MIB, arXiv:2504.13151): our rankings beside attribution, trained scores, magnitude and chance, on held-out prompts.

`python tests/benchmarks/mib.py --out DIR` writes results.json after each measurement and table.md at the end. What DIR holds already is not
run again. The stories3M tasks need TL_NODEPRUNE_MODELS.

Half of the prompts that the full model answers right to score on, the others to judge on; the same split for every method. Two levels:
"neuron", every leaf node (head dims, MLP neurons, MLP output dims), and "node", heads and MLP blocks. With --bounds, where nodes are so
few that all circuits of the sizes can be run, the best of each size on the prompts judged on: no ranking can reach more.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

sys.path[:0] = [str(Path(__file__).resolve().parent)] if str(Path(__file__).resolve().parent) not in sys.path else []

import baselines  # noqa: E402
import frontier  # noqa: E402
import report  # noqa: E402
from trained import STEPS, TRAINED  # noqa: E402

import tl_nodeprune as tlnp  # noqa: E402
from tl_nodeprune.evidence.runs import CircuitRuns  # noqa: E402
from tl_nodeprune.masks.landscape import Landscape  # noqa: E402
from tl_nodeprune.masks.node_masks import masks_off  # noqa: E402
from tl_nodeprune.nodes.space import NodeSpace  # noqa: E402

LEVELS: dict[str, tuple[str, ...] | None] = {"neuron": None, "node": ("head", "mlp")}
FOR_CMD, FOR_CPR = "ours, distance (for CMD)", "ours, shortfall (for CPR)"
ALL, FEW = "all circuits of each size", 10_000
OURS = {"ours, KL": tlnp.kl_divergence, FOR_CMD: tlnp.mib.distance, FOR_CPR: tlnp.mib.shortfall}


SCORES: dict[str, Callable[[Landscape], Tensor]] = {name: score for name, score in baselines.SCORES.items()
                                                   if name != "magnitude, weight norm"}


def measure(task: str, level: str, seed: int, options: argparse.Namespace, add: Callable[..., None], done: set[str]) -> None:
    """Every method on one task, level and seed that is not `done`."""
    model, prompts = frontier.load(task, options.toy_prompts)
    train, test = prompts.split(0.5, seed=seed)

    def judge(method: str, make: Callable[[], tlnp.NodeScores]) -> None:
        if method in done:
            return
        start = time.process_time()
        scores = make()
        seconds = time.process_time() - start
        curve, own = (tlnp.mib.evaluate(model, scores, which) for which in (test, train))
        add(task=task, level=level, seed=seed, method=method, cpr=curve.cpr, cmd=curve.cmd, f=curve.f, nodes=curve.nodes, train_cpr=own.cpr,
            train_cmd=own.cmd, train_f=own.f, seconds=seconds, scored_on=len(train), judged_on=len(test))

    with baselines.attached(model, LEVELS[level]) as masks:
        if options.bounds and ALL not in done and circuits_of(masks.space.free_total()) <= FEW:
            add(task=task, level=level, seed=seed, method=ALL, judged_on=len(test), **bounds(model, masks.space, test))
        with masks.inactive():
            land = baselines.landscape(masks, train)
            for method, score in SCORES.items():
                if level == "neuron" or not method.startswith("magnitude"):  # of single neurons
                    judge(method, lambda score=score: tlnp.NodeScores.from_flat(score(land), land.space))  # type: ignore[misc]
            for method, train_scores in TRAINED.items():
                steps = options.trained_steps or STEPS[method]
                judge(method, lambda make=train_scores, steps=steps: tlnp.NodeScores.from_flat(  # type: ignore[misc]
                    make(land, steps=steps, seed=seed), land.space))
            for draw in range(options.draws):
                lot = torch.rand(land.n, generator=torch.Generator().manual_seed(100 * seed + draw))
                judge(f"random {draw}", lambda lot=lot: tlnp.NodeScores.from_flat(lot, land.space))  # type: ignore[misc]
        for method, loss in OURS.items():
            judge(method, lambda loss=loss: tlnp.rank(masks, train, loss=loss, steps=options.steps, seed=seed, progress=False))  # type: ignore[misc]


def counts(n: int) -> list[int]:
    """How many of `n` nodes each size below 1 is, as the board counts."""
    return [int(size * n) for size in tlnp.mib.SIZES[:-1]]


def circuits_of(n: int) -> int:
    return sum(math.comb(n, count) for count in set(counts(n)))


def bounds(model: Any, space: NodeSpace, prompts: tlnp.PromptPairs) -> dict[str, Any]:
    """f nearest to 1 and the highest f of all circuits of each size, and the CMD and CPR that follow: of nested circuits or not."""
    start, n = time.process_time(), space.free_total()
    with masks_off(model):
        runs = CircuitRuns(model, prompts, space, tlnp.Ablation(), batch_size=256)

        def f_of(count: int) -> Tensor:
            kept = (torch.zeros(n).index_fill_(0, torch.tensor(nodes, dtype=torch.long), 1.0) for nodes in combinations(range(n), count))
            return (runs(tlnp.NodeScores.from_flat(one, space).top(count) for one in kept).logit_diff.mean(1) - ablated) / (full - ablated)

        full, ablated = float(runs.full.logit_diff.mean()), float(runs([tlnp.Circuit.empty(space)]).logit_diff.mean())
        found = {count: f_of(count) for count in set(counts(n))}
    nearest, highest = ([float(f[pick(f)]) for count in counts(n) for f in [found[count]]] + [1.0]
                        for pick in (lambda f: (1 - f).abs().argmin(), lambda f: f.argmax()))
    cmd, cpr = tlnp.mib.area(tlnp.mib.SIZES, [abs(1 - f) for f in nearest]), tlnp.mib.area(tlnp.mib.SIZES, highest)
    return {"cmd": cmd, "cpr": cpr, "f": nearest, "nodes": [*counts(n), n], "seconds": time.process_time() - start}


def table(rows: list[dict[str, Any]]) -> str:
    """CPR and CMD by method, the two figures to reach, each by our ranking that is made for it, and what bounds them."""
    frame = pd.DataFrame(rows)
    frame["method"] = frame["method"].str.replace(r"^random \d+$", "random, mean", regex=True)
    parts = []
    for (task, level), some in frame.groupby(["task", "level"], sort=False):
        means = some.groupby("method", sort=False)[["cmd", "cpr", "train_cmd", "train_cpr", "seconds"]].mean().round(4)
        others, trained = means[means.index.str.startswith("attribution")], means[means.index.isin(list(TRAINED))]
        floor = some[some["method"] != ALL].groupby("seed")["f"].agg(lowest_cmd).mean()
        parts += [f"## {task}, {level} level, seeds {some['seed'].unique().tolist()}\n", report.markdown(means.reset_index()),
                  f"CMD, ours / best attribution: {means.loc[FOR_CMD, 'cmd'] / others['cmd'].min():.2f} (to reach: 0.5). Were f at each "
                  f"size the highest of any method here, up to 1: {floor:.4f}, {floor / others['cmd'].min():.2f} of the best "
                  f"attribution's.\n",
                  f"CPR, ours and best attribution: {means.loc[FOR_CPR, 'cpr']:.3f}, {others['cpr'].max():.3f} (to reach: above it).\n"]
        if len(trained):
            parts.append(f"Best of the trained scores: CMD {trained['cmd'].min():.4f}, CPR {trained['cpr'].max():.3f}.\n")
        if ALL in means.index:
            least = means.loc[ALL, "cmd"]
            parts.append(f"Of all circuits of each size the best on the prompts judged on: CMD {least:.4f}, "
                         f"{least / others['cmd'].min():.2f} of the best attribution's; CPR {means.loc[ALL, 'cpr']:.3f}. No ranking can "
                         "reach more.\n")
    return "\n".join(parts)


def lowest_cmd(curves: pd.Series[Any]) -> float:
    """The CMD of a ranking that has at each size the highest f of all, but never more than 1."""
    return tlnp.mib.area(tlnp.mib.SIZES, [max(1 - max(at), 0.0) for at in zip(*curves, strict=True)])


def main(arguments: list[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", default=[*frontier.TOYS, "stories3M/ioi6", "stories3M/pronoun_name"],
                        choices=[*frontier.TOYS, *frontier.STORIES], metavar="TASK")
    parser.add_argument("--levels", nargs="+", default=list(LEVELS), choices=list(LEVELS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, help="of our searches; by default more for more nodes")
    parser.add_argument("--trained-steps", type=int, help="of the trained baselines; by default " +
                        ", ".join(f"{name} {steps}" for name, steps in STEPS.items()))
    parser.add_argument("--toy-prompts", type=int, default=200, help="of each task of the embedded model")
    parser.add_argument("--draws", type=int, default=3, help="random rankings")
    parser.add_argument("--bounds", action="store_true", help="run all circuits of each size where they are at most " + str(FEW))
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "results.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []

    def add(**row: Any) -> None:
        rows.append(row)
        path.write_text(json.dumps(rows, indent=1) + "\n")
        print(f"{row['task']} {row['level']} {row['method']}: CMD {row['cmd']:.4f} CPR {row['cpr']:.4f}", flush=True)

    for task in options.tasks:
        if task in frontier.STORIES and not os.environ.get("TL_NODEPRUNE_MODELS"):
            print(f"TL_NODEPRUNE_MODELS is not set: {task} is left out.", flush=True)
            continue
        for level in options.levels:
            for seed in options.seeds:
                done = {row["method"] for row in rows if (row["task"], row["level"], row["seed"]) == (task, level, seed)}
                measure(task, level, seed, options, add, done)
    (options.out / "table.md").write_text(table(rows))
    print(table(rows))
    return options.out


if __name__ == "__main__":
    main()
