"""What the command prints and writes of a search's result."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any

from tl_nodeprune.circuit import Evaluation
from tl_nodeprune.search import PruneResult, held_out_sentence

VERDICTS = ("no circuit", "the budget is untested")  # how the search's warnings begin that say why it does not converge
_SHOWN = 8  # sizes of the frontier
_SAME_TOKEN = 0.5  # share of prompts: with the full model's most likely token on fewer a circuit is not said to have converged


def show(result: PruneResult, report: Evaluation, why: str, met: str) -> None:
    """Print the number held out, what it means, and the sizes. why: of a result that has not converged; met: what one that has is."""
    verdict = {True: "Converged", False: "NOT converged", None: "Untested"}[result.converged]
    reason = met if result.converged else why.removeprefix(f"{VERDICTS[1]}: ") or "the budget is not known to hold on prompts held out."
    if result.converged and report.exact_match < _SAME_TOKEN:
        verdict = "Within the budget, which is of KL"
        reason += (f"; but its most likely token is the full model's on only {report.exact_match:.0%} of these prompts, so it is no copy "
                   "of the model. (Where many answers are about as likely, one token says little.)")
    print(f"\n{held_out_sentence(result)}\n{verdict}: {reason}")
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
