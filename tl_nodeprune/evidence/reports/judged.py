"""A circuit beside the full model, the ablated model and its complement, and its units: what every part of a report starts from."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from tl_nodeprune.circuit import Circuit
from tl_nodeprune.evidence.runs import CircuitRuns
from tl_nodeprune.evidence.units import Unit, closed

NOTHING = 1e-6  # nats: a KL that is rounding


class JudgedCircuit:
    """A circuit, the runs to judge it by, and its units.

    kept: units with a live node; tried: those of them that are taken out one at a time, at most `max_units`, at random; spare: units that
    are not kept whole. Raises: ValueError where ablating all nodes changes nothing.
    """

    def __init__(self, runs: CircuitRuns, circuit: Circuit, units: Sequence[Unit], *, max_units: int, generator: torch.Generator) -> None:
        self.runs, self.circuit, self.units, self.generator = runs, circuit, units, generator
        self.kept = [unit for unit in units if unit.kept(circuit)]
        self.tried = self._some(self.kept, max_units)
        self.spare = [unit for unit in units if not unit.whole(circuit)]
        empty = Circuit.empty(circuit.space, circuit.ablation)
        self.full = runs.full
        without = closed(Circuit.full(circuit.space, circuit.ablation), self.kept, only=circuit)
        self.itself, self.ablated, self.complement = runs([circuit, empty, without], total=3).split(1, 1, 1)
        self.span = float(self.full.logit_diff.mean() - self.ablated.logit_diff.mean())
        if self.ablated.kl.mean() <= NOTHING and float((self.full.logit_diff - self.ablated.logit_diff).abs().max()) <= runs.resolution:
            raise ValueError(f"the metric is constant: with every node of this circuit ablated ({circuit.ablation.name}) the model "
                             "answers as it does whole, so there is nothing to judge. Are these the right corrupted prompts and layers?")

    @property
    def kl(self) -> float:
        """The circuit's, nats."""
        return float(self.itself.kl.mean())

    def share(self, logits: float) -> float:
        """Logits as a share of what ablating everything costs; NaN where that is nothing."""
        return logits / self.span if abs(self.span) > self.runs.resolution else math.nan

    def below(self, n: int) -> int:
        """A random whole number below n."""
        return int(torch.randint(n, (), generator=self.generator))

    def _some(self, units: list[Unit], most: int) -> list[Unit]:
        order = torch.randperm(len(units), generator=self.generator)[:most].sort().values
        return [units[i] for i in order]
