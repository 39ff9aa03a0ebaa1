"""The Mechanistic Interpretability Benchmark's measures of node scores, CPR and CMD (arXiv:2504.13151)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
from torch import Tensor

from tl_nodeprune.circuit import SIZES, Circuit, Effects, NodeScores, check_sizes
from tl_nodeprune.evidence import CircuitRuns
from tl_nodeprune.masks import Ablation, as_ablation, distance, masks_off, shortfall
from tl_nodeprune.mib.format import board_count, read, write
from tl_nodeprune.nodes import GateKey, check_counts, check_ready, check_types, figures, find_nodes
from tl_nodeprune.prompts import PromptPairs

__all__ = ["SIZES", "FaithfulnessCurve", "area", "distance", "evaluate", "read", "shortfall", "write"]


@dataclass(frozen=True)
class FaithfulnessCurve:
    """How much of the task the best nodes do, size by size: `f(k) = (m(C_k) - m(0)) / (m(full) - m(0))`.

    m: the mean logit difference over prompts, logits; C_k: the share k of the nodes with the highest scores, all others ablated; 0: all
    nodes ablated. f may be below 0 and above 1. sizes: k; nodes: how many of those that have scores, rounded down as the board does (0 for
    a small share, where f is 0); f: f(k).
    full, ablated: m(full), m(0). ablation, n_prompts: what it holds for.
    """

    sizes: tuple[float, ...]
    nodes: tuple[int, ...]
    f: tuple[float, ...]
    full: float
    ablated: float
    ablation: str
    n_prompts: int

    @property
    def cpr(self) -> float:
        """Integrated circuit performance ratio: the area under f over k, by trapezoids. Higher is better; it can exceed 1."""
        return area(self.sizes, self.f)

    @property
    def cmd(self) -> float:
        """Integrated circuit-model distance: the area of |1 - f| over k, by trapezoids. 0 is best."""
        return area(self.sizes, [abs(1 - f) for f in self.f])

    def to_frame(self) -> pd.DataFrame:
        """A row per size: size (share), nodes, f."""
        return pd.DataFrame({"size": self.sizes, "nodes": self.nodes, "f": self.f})

    def __repr__(self) -> str:
        curve = ", ".join(f"{size:.1%}: {f:.3f}" for size, f in zip(self.sizes, self.f, strict=True))
        return (f"FaithfulnessCurve(CPR {figures(self.cpr)}, CMD {figures(self.cmd)}; f at {curve}; {self.n_prompts} prompts, "
                f"{self.ablation} ablation)")


def area(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The area under a curve given at sizes, linear in between and in the size itself, from the first size to the last."""
    check_types(area, locals())
    if len(sizes) != len(values):
        raise ValueError(f"sizes has {len(sizes)} numbers and values {len(values)}; they must be as many.")
    if not all(map(math.isfinite, (*sizes, *values))):
        raise ValueError(f"sizes={tuple(sizes)} or values={tuple(values)} hold a NaN or inf.")
    points = list(zip(sizes, values, strict=True))
    return sum((right - left) * (a + b) / 2 for (left, a), (right, b) in zip(points, points[1:], strict=False))


def evaluate(model: Any, scores: NodeScores | Effects | Mapping[str, Tensor], prompts: PromptPairs, *, sizes: Sequence[float] = SIZES,
             ablation: str | Ablation | None = None, batch_size: int = 64, progress: bool = False) -> FaithfulnessCurve:
    """Run the best nodes by their scores at each of the board's sizes; see `FaithfulnessCurve`.

    scores: of `rank`, or effects of `crosscheck` (what helps ranks first), or any mapping hook name -> scores [head d_head] or [head] for
        hook_z, [d_mlp], [d_model], []: what no key names is kept at every size. Higher is better; of equal scores the first come first.
    ablation: None: the scores' own, "interchange" for other mappings; one that is not fitted is fitted on these prompts. sizes: shares of
        the nodes, ascending, the last one 1.

    Raises: ValueError for scores that are not of this model's nodes or not finite, scores of a block beside those of what is in it, prompts
    that do not fit it, sizes, and a metric that is the same with every node ablated; TypeError for what is no mapping or no PromptPairs;
    RuntimeError where a circuit is applied or the model is in training mode with dropout; FloatingPointError for NaN or inf logits.
    """
    check_types(evaluate, locals())
    check_sizes(sizes)
    check_counts(batch_size=batch_size)
    with masks_off(model):
        check_ready(model)
        found = as_scores(model, scores)
        prompts.check_fits(model)
        used = (found.ablation if ablation is None else as_ablation(ablation)).fit(model, prompts, found.space.hooks, batch_size=batch_size)
        used.check_fits(found.space)
        runs = CircuitRuns(model, prompts, found.space, used, batch_size=batch_size, progress=progress)
        counts = tuple(board_count(found, float(size)) for size in sizes)
        circuits = [Circuit.empty(found.space), *map(found.top, counts)]
        means = runs(circuits, total=len(circuits), desc="sizes").logit_diff.mean(1).tolist()
    full, ablated = float(runs.full.logit_diff.mean()), means[0]
    if abs(full - ablated) <= runs.resolution:
        raise ValueError(f"the metric is constant: the logit difference is {figures(full)} for the full model and {figures(ablated)} with "
                         f"every node ablated ({used.name}), so there is no share of it to measure. Are these the right corrupted prompts?")
    f = tuple((mean - ablated) / (full - ablated) for mean in means[1:])
    return FaithfulnessCurve(tuple(sizes), counts, f, full, ablated, used.name, len(prompts))


def as_scores(model: Any, scores: NodeScores | Effects | Mapping[str, Tensor]) -> NodeScores:
    """Any mapping hook name -> scores as NodeScores of this model. Raises ValueError where it does not have these nodes."""
    if not isinstance(scores, NodeScores | Mapping):
        raise TypeError(f"scores must be NodeScores, Effects or a mapping from hook name to scores, got {type(scores).__name__}.")
    if isinstance(scores, Effects):
        scores = NodeScores.from_effects(scores)
    have = find_nodes(model)
    if not isinstance(scores, NodeScores):
        gates = {_key_of(hook, tensor, have.present): tensor for hook, tensor in scores.items()}
        if not gates:
            raise ValueError("scores is empty; give a mapping of hook names to scores, as `rank` returns it.")
        space = replace(have, shapes={key: shape for key, shape in have.present.items() if key in gates})
        if double := [key for key in gates if space.covered(key)]:
            below = " and ".join(child.hook for child in space.children(double[0]))
            raise ValueError(f"scores has {double[0].hook!r} and what is in it, {below}: a node is ranked once. Leave one of them out.")
        return NodeScores(gates, space)
    scores.space.check_fits(have, "these scores are of")
    return scores


def _key_of(hook: str, tensor: Tensor, present: Mapping[GateKey, tuple[int, ...]]) -> GateKey:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"scores[{hook!r}] must be a tensor, got {type(tensor).__name__}.")
    here = {key: shape for key, shape in present.items() if key.hook == hook}
    for key, shape in here.items():
        if tuple(tensor.shape) == shape:
            return key
    raise ValueError(f"scores for {hook!r} are {list(tensor.shape)}; this model has "
                     f"{' or '.join(f'{key.granularity} nodes {list(shape)}' for key, shape in here.items()) or 'no nodes'} there.")
