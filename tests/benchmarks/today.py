"""The figures of the search before issue 20 on stories3M, and how a run compares with them at the same held-out KL."""

from __future__ import annotations

from typing import Any

import baselines
import numpy as np
import pandas as pd

import tl_nodeprune as tlnp
from tl_nodeprune.nodes.space import NodeSpace

TODAY_BUDGET = 0.05
TODAY: dict[str, tuple[int, float, float]] = {
    "stories3M/ioi0": (1598, 0.062, 108.0), "stories3M/ioi4": (602, 0.065, 84.0), "stories3M/ioi6": (214, 0.041, 96.0),
    "stories3M/pronoun_gender_noun": (1028, 0.054, 153.0), "stories3M/subject_tracking": (323, 0.050, 96.0),
    "stories3M/pronoun_name": (242, 0.035, 59.0),
}
"""Nodes, KL on the bench's other half, CPU seconds of `prune(max_kl=.05)`: half of the pairs searched, seed 1, one thread. Source: the
figures to reach of issue 20, measured on main 97b3907."""
SIZES, SMALLER, LARGER = 12, 4, 8  # sizes that the run's order is cut at: from today's nodes / SMALLER to today's * LARGER
SMALLER_RATIO, TIME_RATIO, WORST_TIME = 0.85, 0.5, 1.0  # what issue 20 asks for: median of nodes, median of seconds, largest of seconds


def against_today(task: str, result: tlnp.PruneResult, model: Any, space: NodeSpace, test: tlnp.PromptPairs) -> dict[str, Any]:
    """The run's order cut at `SIZES` sizes, each judged on the bench's other half, and the size whose KL there is today's.

    size_at_today: of the bare order. finished_at_today: the same times what the finish saves at its own KL, an estimate.
    """
    nodes, kl, _ = TODAY[task]
    assert result.ranking is not None
    low, high = max(nodes / SMALLER, 1), min(nodes * LARGER, result.ranking.n)
    sizes = sorted({round(size) for size in np.geomspace(low, high, SIZES)})
    cut = [baselines.lift(result.ranking.top(size), space) for size in sizes]
    live, found = [max(circuit.size, 1) for circuit in cut], [tlnp.evaluate(model, circuit, test).kl for circuit in cut]
    finished, its_kl = baselines.lift(result.circuit, space), tlnp.evaluate(model, result.circuit, test).kl
    here, at_its_kl = size_at(live, found, kl), size_at(live, found, its_kl)
    return {"cut_sizes": live, "cut_kl": found, "size_at_today": here, "finished_at_today": here * finished.size / at_its_kl}


def size_at(sizes: list[int], kl: list[float], wanted: float) -> float:
    """The size at which the KL first comes down to a value, linear in the logarithms of both; NaN where no size, or every size, does."""
    for (a, above), (b, below) in zip(zip(sizes, kl, strict=True), zip(sizes[1:], kl[1:], strict=True), strict=False):
        if above > wanted >= below:
            share = np.log(above / wanted) / np.log(above / max(below, 1e-12))
            return float(a * (b / a) ** share)
    return float("nan")


def today_table(entries: list[dict[str, Any]]) -> pd.DataFrame:
    """A row per task that was run for `today`: measured, today's, and ratios."""
    rows = []
    for e in entries:
        if e.get("kind") == "today" and e["task"] in TODAY:
            nodes, kl, seconds = TODAY[e["task"]]
            rows.append({"task": e["task"], "seed": e["seed"], "nodes": e["size"], "held-out KL": e["kl"], "CPU s": e["seconds"],
                         "converged": {True: "yes", False: "no", None: "untested"}[e["converged"]], "nodes today": nodes, "KL today": kl,
                         "CPU s today": seconds, "KL / max_kl": e["kl"] / TODAY_BUDGET, "nodes / today's": e["size"] / nodes,
                         "order's size at today's KL / today's": e["size_at_today"] / nodes,
                         "finished, estimated, / today's": e["finished_at_today"] / nodes, "s / today's": e["seconds"] / seconds})
    return pd.DataFrame(rows)
