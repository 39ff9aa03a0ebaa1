"""What the command prints and writes of a search's result."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd
from pandas.api.types import is_numeric_dtype
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tl_nodeprune.circuit import Evaluation
from tl_nodeprune.nodes import figures
from tl_nodeprune.search import PruneResult, held_out_sentence

_WIDTH = 120  # of tables, where nothing says how wide the page is

VERDICTS = ("no circuit", "the budget is untested")  # how the search's warnings begin that say why it does not converge
_SHOWN = 8  # sizes of the frontier
_SAME_TOKEN = 0.5  # share of prompts: with the full model's most likely token on fewer a circuit is not said to have converged


def show(result: PruneResult, report: Evaluation, why: str, met: str) -> None:
    """Print the number held out, what it means, and the sizes. why: of a result that has not converged; met: what one that has is."""
    verdict = {True: "Converged", False: "NOT converged", None: "Untested"}[result.converged]
    reason = met if result.converged else why.removeprefix(f"{VERDICTS[1]}: ") or "the budget is not known to hold on prompts held out."
    if result.converged and report.exact_match < _SAME_TOKEN:
        verdict = "Within the budget, which is of KL"
        reason += (f"; but its most likely token is the full model's on only {report.exact_match:.0%} of these prompts, so it is not "
                   "a copy of the model. (Where many answers are about as likely, one token says little.)")
    print(f"\n{held_out_sentence(result)}\n{verdict}: {reason}")
    if result.stopped:
        print(f"Stopped by the {result.stopped}: this is the best so far.")
    circuit = result.circuit
    print(f"{circuit.size:,} of {circuit.size_total:,} leaf nodes ({1 - circuit.sparsity:.1%}), {circuit.parameters:,} of "
          f"{circuit.parameters_total:,} weights, {result.seconds:.0f} s.")
    print("\nSize against KL, from the same run:")
    _frontier(result)
    print("\nLive nodes by layer:")
    print_table(circuit.summary().rename_axis("").reset_index())  # "layer" is a column too
    print(f"\nOn held-out prompts:\n{report}\n")


def print_table(table: pd.DataFrame, looks: Mapping[str, str] | None = None) -> None:
    """Print a frame: numbers to three figures, or as `looks` says by column, NaN left empty."""
    shown = Table(box=None, pad_edge=False)
    for name in table.columns:
        shown.add_column(Text(str(name)), justify="right" if is_numeric_dtype(table[name]) else "left", overflow="fold")
    for row in table.itertuples(index=False):
        shown.add_row(*(Text(_cell(value, (looks or {}).get(str(name)))) for name, value in zip(table.columns, row, strict=True)))
    console = Console()
    Console(width=console.width if console.is_terminal else _WIDTH).print(shown)


def _cell(value: Any, look: str | None) -> str:
    if isinstance(value, float) and math.isnan(value):
        return ""
    number = value.item() if isinstance(value, np.number) else value
    return look.format(value) if look else figures(number) if isinstance(number, int | float) else str(value)


def _frontier(result: PruneResult) -> None:
    """Print some of the frontier's sizes, evenly among its rows."""
    table = result.frontier
    rows = sorted({round(i * (len(table) - 1) / (_SHOWN - 1)) for i in range(_SHOWN)} if len(table) else ())
    names = {"nodes": "nodes", "share": "share", "kl": "KL held out", "search_kl": "KL searched", "accuracy": "right"}
    looks = {"nodes": "{:,}", "share": "{:.2%}", "right": "{:.0%}"}
    if rows:
        print_table(table.iloc[rows][list(names)].rename(columns=names), looks)


def as_json(settings: dict[str, Any], result: PruneResult, report: Evaluation) -> dict[str, Any]:
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
