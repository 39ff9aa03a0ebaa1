"""Minimality: what removing a unit from the circuit does, beside what removing a random one does (Shi et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tl_nodeprune.evidence.reports.judged import JudgedCircuit
from tl_nodeprune.evidence.units import Unit, closed, opened


@dataclass(frozen=True, eq=False)
class UnitEffects:
    """What removing each unit from the circuit does. kl_rise: nats, means over prompts; score_change: logits, mean over prompts of the
    absolute change of the logit difference."""

    units: tuple[Unit, ...]
    kl_rise: Float[Tensor, "unit"]
    score_change: Float[Tensor, "unit"]


def unit_effects(judged: JudgedCircuit) -> UnitEffects:
    """Removing each of the tried units."""
    without = judged.runs((closed(judged.circuit, [unit]) for unit in judged.tried), total=len(judged.tried), desc="units")
    return UnitEffects(tuple(judged.tried), without.kl.mean(1) - judged.kl, (without.logit_diff - judged.itself.logit_diff).abs().mean(1))


def random_effects(judged: JudgedCircuit, draws: int) -> Float[Tensor, "draw"]:
    """What removing a unit at random does: mean absolute change of the logit difference.

    A draw adds a random path to the circuit first (from each layer, with probability 1/2, one unit that is not kept whole), then takes
    one of the path's units out again. Empty where every unit is kept whole.
    """
    if not judged.spare:
        return torch.zeros(0, dtype=torch.float32)
    pairs = []
    for _ in range(draws):
        path = _path(judged)
        lost = path[judged.below(len(path))]
        pairs += [path, [unit for unit in path if unit != lost]]
    score = judged.runs((opened(judged.circuit, path) for path in pairs), total=len(pairs), desc="random units").logit_diff
    return (score[0::2] - score[1::2]).abs().mean(1)


def _path(judged: JudgedCircuit) -> list[Unit]:
    layers: dict[int, list[Unit]] = {}
    for unit in judged.spare:
        layers.setdefault(unit.layer, []).append(unit)
    path = [units[judged.below(len(units))] for units in layers.values() if judged.below(2)]
    return path or [judged.spare[judged.below(len(judged.spare))]]
