"""Completeness: what the model still does without the circuit, and whether model and circuit lose the same by losing the same parts."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor

from tl_nodeprune.circuit import Circuit, Metrics
from tl_nodeprune.evidence.reports.judged import JudgedCircuit
from tl_nodeprune.evidence.units import closed


@dataclass(frozen=True, eq=False)
class Completeness:
    """The circuit knocked out, whole and in part (Wang et al. 2022, arXiv:2211.00593).

    complement: the model without the circuit's nodes. left: its faithfulness, the share of the task's logit difference that it still has
    (0: as with every node ablated). gaps: for subsets K of the circuit's units, each unit in K with probability 1/2,
    `|m(model without K) - m(circuit without K)|`, m the mean logit difference; gap_share: their mean over |m(full) - m(ablated)|.
    """

    complement: Metrics
    left: float
    gaps: Float[Tensor, "subset"] = field(repr=False)
    gap_share: float


def completeness(judged: JudgedCircuit, subsets: int) -> Completeness:
    """Knock out the whole circuit, and so many random parts of it."""
    parts = [[unit for unit in judged.kept if judged.below(2)] for _ in range(subsets if judged.kept else 0)]
    full = Circuit.full(judged.circuit.space, judged.circuit.ablation)
    circuits = (one for part in parts for one in (closed(full, part, only=judged.circuit), closed(judged.circuit, part)))
    means = judged.runs(circuits, total=2 * len(parts), desc="subsets").logit_diff.mean(1)
    gaps = (means[0::2] - means[1::2]).abs()
    left = judged.share(float(judged.complement.logit_diff.mean() - judged.ablated.logit_diff.mean()))
    return Completeness(judged.complement.means, left, gaps, abs(judged.share(float(gaps.mean()))) if len(gaps) else math.nan)
