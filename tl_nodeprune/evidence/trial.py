"""The measurements on a circuit that a report is made of: parts taken out, put in, exchanged for random ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from tl_nodeprune.circuit import Circuit, Metrics, Runs, Scores
from tl_nodeprune.evidence.redundancy import MATTERS, PAIRS_AMONG, RECOVERED, Redundancy, kept_groups, kept_pairs, stand_ins
from tl_nodeprune.evidence.units import SizeMatched, Unit, closed, opened

NOTHING = 1e-6  # nats: a KL that is rounding


@dataclass(frozen=True, eq=False)
class UnitEffects:
    """What removing each unit from the circuit does. kl_rise: nats, means over prompts; score_change: logits, mean over prompts of the
    absolute change of the logit difference."""

    units: tuple[Unit, ...]
    kl_rise: Float[Tensor, "unit"]
    score_change: Float[Tensor, "unit"]


@dataclass(frozen=True, eq=False)
class RandomDraws:
    """Circuits by lot, see `units.SizeMatched`. kl: theirs, nats; p_value: `(1 + those with a KL as low as the circuit's) / (draws + 1)`;
    possible: how many different ones exist; over_layers: whether nodes changed places between layers."""

    kl: Float[Tensor, "draw"] = field(repr=False)
    p_value: float
    possible: float
    over_layers: bool

    @property
    def median(self) -> float:
        """The median KL, nats; NaN where none was drawn."""
        return float(self.kl.quantile(0.5)) if len(self.kl) else math.nan


@dataclass(frozen=True, eq=False)
class Completeness:
    """The circuit knocked out, whole and in part (Wang et al. 2022, arXiv:2211.00593).

    complement: the model without the circuit's nodes. left: its faithfulness, the share of the task's logit difference that it still has
    (0: as with every node ablated). gaps: for subsets K of the circuit's units, each unit in K by a coin's throw,
    `|m(model without K) - m(circuit without K)|`, m the mean logit difference; gap_share: their mean over |m(full) - m(ablated)|.
    """

    complement: Metrics
    left: float
    gaps: Float[Tensor, "subset"] = field(repr=False)
    gap_share: float


class Trial:
    """A circuit, the runs to judge it by, and its units; each method measures one thing.

    kept: units with a live node; tried: those of them that are taken out one at a time, at most `max_units`, by lot; spare: units that
    are not kept whole. Raises: ValueError where ablating all nodes changes nothing.
    """

    def __init__(self, runs: Runs, circuit: Circuit, units: Sequence[Unit], *, max_units: int, generator: torch.Generator) -> None:
        self.runs, self.circuit, self.units, self.generator = runs, circuit, units, generator
        self.kept = [unit for unit in units if unit.kept(circuit)]
        self.tried = self._some(self.kept, max_units)
        self.spare = [unit for unit in units if not unit.whole(circuit)]
        empty = Circuit.empty(circuit.space, circuit.ablation)
        self.full = runs.full
        without = closed(Circuit.full(circuit.space, circuit.ablation), self.kept, only=circuit)
        self.itself, self.ablated, self.complement = runs([circuit, empty, without], total=3).split(1, 1, 1)
        self.span = float(self.full.score.mean() - self.ablated.score.mean())
        if self.ablated.kl.mean() <= NOTHING and float((self.full.score - self.ablated.score).abs().max()) <= runs.resolution:
            raise ValueError(f"the metric is constant: with every node of this circuit ablated ({circuit.ablation.name}) the model "
                             "answers as it does whole, so there is nothing to judge. Are these the right corrupted prompts and layers?")

    @property
    def kl(self) -> float:
        """The circuit's, nats."""
        return float(self.itself.kl.mean())

    def effects(self) -> UnitEffects:
        """Removing each of the tried units."""
        without = self.runs((closed(self.circuit, [unit]) for unit in self.tried), total=len(self.tried), desc="units")
        return UnitEffects(tuple(self.tried), without.kl.mean(1) - self.kl, (without.score - self.itself.score).abs().mean(1))

    def random_effects(self, draws: int) -> Float[Tensor, "draw"]:
        """What removing a unit at random does: mean absolute change of the logit difference.

        A draw adds a random path to the circuit first (from each layer, by a coin's throw, one unit that is not kept whole), then takes
        one of the path's units out again. Empty where every unit is kept whole.
        """
        if not self.spare:
            return torch.zeros(0, dtype=torch.float32)
        pairs = []
        for _ in range(draws):
            path = self._path()
            lost = path[self._below(len(path))]
            pairs += [path, [unit for unit in path if unit != lost]]
        score = self.runs((opened(self.circuit, path) for path in pairs), total=len(pairs), desc="random units").score
        return (score[0::2] - score[1::2]).abs().mean(1)

    def completeness(self, subsets: int) -> Completeness:
        parts = [[unit for unit in self.kept if self._below(2)] for _ in range(subsets if self.kept else 0)]
        full = Circuit.full(self.circuit.space, self.circuit.ablation)
        circuits = (one for part in parts for one in (closed(full, part, only=self.circuit), closed(self.circuit, part)))
        means = self.runs(circuits, total=2 * len(parts), desc="subsets").score.mean(1)
        gaps = (means[0::2] - means[1::2]).abs()
        left = self.share(float(self.complement.score.mean() - self.ablated.score.mean()))
        return Completeness(_metrics(self.complement), left, gaps, abs(self.share(float(gaps.mean()))) if len(gaps) else math.nan)

    def random_circuits(self, draws: int) -> RandomDraws:
        null = SizeMatched(self.circuit)
        if null.possible < 2:
            return RandomDraws(torch.zeros(0, dtype=torch.float32), math.nan, null.possible, null.over_layers)
        kl = self.runs((null.draw(self.generator) for _ in range(draws)), total=draws, desc="random circuits").kl.mean(1)
        as_good = int((kl <= self.kl * (1 + 1e-4) + NOTHING).sum())
        return RandomDraws(kl, (1 + as_good) / (draws + 1), null.possible, null.over_layers)

    def redundancies(self, effects: UnitEffects) -> tuple[list[Redundancy], int, int]:
        """Those found; how many units' stand-ins were looked for; among how many kept units, those of smallest effect, pairs were tried."""
        least, most = MATTERS * float(self.ablated.kl.mean()), (1 - RECOVERED) * float(self.ablated.kl.mean())
        rises = dict(zip(effects.units, effects.kl_rise.tolist(), strict=True))
        needed = {unit: rise for unit, rise in rises.items() if rise >= least}
        slight = sorted((unit for unit in rises if rises[unit] <= most), key=lambda unit: rises[unit])[:PAIRS_AMONG]
        found = stand_ins(self.runs, self.circuit, self.kl, needed, self.units)
        pairs = kept_pairs(self.runs, self.circuit, self.kl, {unit: rises[unit] for unit in slight}, least)
        paired = {unit for pair in pairs for unit in (pair.unit, *pair.others)}
        groups = kept_groups(self.runs, self.circuit, self.kl, {unit: rises[unit] for unit in slight if unit not in paired}, least)
        found += pairs + groups
        return found, len(needed), len(slight)

    def share(self, logits: float) -> float:
        """Logits as a share of what ablating everything costs; NaN where that is nothing."""
        return logits / self.span if abs(self.span) > self.runs.resolution else math.nan

    def _path(self) -> list[Unit]:
        layers: dict[int, list[Unit]] = {}
        for unit in self.spare:
            layers.setdefault(unit.layer, []).append(unit)
        path = [units[self._below(len(units))] for units in layers.values() if self._below(2)]
        return path or [self.spare[self._below(len(self.spare))]]

    def _below(self, n: int) -> int:
        return int(torch.randint(n, (), generator=self.generator))

    def _some(self, units: list[Unit], most: int) -> list[Unit]:
        order = torch.randperm(len(units), generator=self.generator)[:most].sort().values
        return [units[i] for i in order]


def _metrics(one: Scores) -> Metrics:
    return Metrics(float(one.kl.mean()), float((one.score > 0).float().mean()), float(one.score.mean()), float(one.agrees.float().mean()))
