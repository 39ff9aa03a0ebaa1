"""Size-matched random circuits: does any circuit with as many nodes of each kind do as well?"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from tl_nodeprune.circuit import Circuit
from tl_nodeprune.evidence.reports.judged import NOTHING, JudgedCircuit
from tl_nodeprune.evidence.units import gates_of
from tl_nodeprune.nodes import GateKey


@dataclass(frozen=True, eq=False)
class RandomDraws:
    """Size-matched random circuits, see `SizeMatched`. kl: theirs, nats; p_value: `(1 + those with a KL as low as the circuit's) /
    (draws + 1)`; possible: how many different ones exist; over_layers: whether nodes changed places between layers."""

    kl: Float[Tensor, "draw"] = field(repr=False)
    p_value: float
    possible: float
    over_layers: bool

    @property
    def median(self) -> float:
        """The median KL, nats; NaN where none was drawn."""
        return float(self.kl.quantile(0.5)) if len(self.kl) else math.nan


def random_circuits(judged: JudgedCircuit, draws: int) -> RandomDraws:
    """Run so many random circuits of the same size."""
    null = SizeMatched(judged.circuit)
    if null.possible < 2:
        return RandomDraws(torch.zeros(0, dtype=torch.float32), math.nan, null.possible, null.over_layers)
    kl = judged.runs((null.draw(judged.generator) for _ in range(draws)), total=draws, desc="random circuits").kl.mean(1)
    as_good = int((kl <= judged.kl * (1 + 1e-4) + NOTHING).sum())
    return RandomDraws(kl, (1 + as_good) / (draws + 1), null.possible, null.over_layers)


class SizeMatched:
    """Random circuits with as many live nodes of each kind as a given one.

    As many in every gate tensor: heads change places within their layer, and dims within their head; neurons and output dims within their
    MLP; whole blocks and layers, which are one number each, over the layers. What stands above other gated nodes stays as it is, and so
    does all below one that is closed. Where fewer than `enough` circuits are of that kind,
    everything changes places over all layers instead (`over_layers`). possible: how many different circuits can be drawn.
    """

    def __init__(self, circuit: Circuit, *, enough: int = 100) -> None:
        self.circuit = circuit
        self.over_layers, self.possible = False, self._count(by_layer=True)
        if self.possible < enough:
            self.over_layers, self.possible = True, self._count(by_layer=False)

    def draw(self, generator: torch.Generator) -> Circuit:
        """One of them."""
        gates = gates_of(self.circuit)
        for keys in self._pools(by_layer=not self.over_layers):
            shuffled = _shuffled(self._rows(keys), generator).view(-1)
            sizes = [gates[key].numel() for key in keys]
            gates |= {key: part.view(gates[key].shape) for key, part in zip(keys, shuffled.split(sizes), strict=True)}
        return Circuit(self.circuit.space, gates, self.circuit.ablation)

    def _pools(self, *, by_layer: bool) -> list[list[GateKey]]:
        """Gate tensors between which nodes change places."""
        pools: dict[tuple[str, int], list[GateKey]] = {}
        space = self.circuit.space
        for key in space.finest():
            if any(not self.circuit.live(*parent).any() for parent in space.ancestors(key) if not space.covered(parent)):
                continue
            alone = by_layer and space.shapes[key] != ()
            pools.setdefault((key.granularity, key.layer if alone else -1), []).append(key)
        return list(pools.values())

    def _rows(self, keys: list[GateKey]) -> Tensor:
        """Live nodes [row node]: a row is a head with its dims, or one node."""
        live = [self.circuit.live(*key) for key in keys]
        return torch.cat([one if one.ndim == 2 else one.view(-1, 1) for one in live])

    def _count(self, *, by_layer: bool) -> float:
        logs = sum(_log_arrangements(self._rows(keys)) for keys in self._pools(by_layer=by_layer))
        return math.inf if logs > 300 else float(round(math.exp(logs))) if logs < 30 else math.exp(logs)


def _shuffled(rows: Tensor, generator: torch.Generator) -> Tensor:
    """Rows in another order, and each row's values in another order."""
    order = torch.randperm(len(rows), generator=generator)
    within = torch.rand(rows.shape, generator=generator, dtype=torch.float32).argsort(1)
    return rows[order].gather(1, within)


def _log_arrangements(rows: Tensor) -> float:
    """The logarithm of how many different outcomes `_shuffled` has."""
    counts, width = rows.sum(1).tolist(), rows.shape[1]
    orders = math.lgamma(len(counts) + 1) - sum(math.lgamma(counts.count(c) + 1) for c in set(counts))
    return orders + sum(math.lgamma(width + 1) - math.lgamma(c + 1) - math.lgamma(width - c + 1) for c in counts)
