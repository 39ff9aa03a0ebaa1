"""Units of a circuit: the heads, blocks or single nodes that are taken out and put in one at a time, and circuits of equal size by lot."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from tl_nodeprune.circuit import Circuit
from tl_nodeprune.nodes import GateKey, Gates, NodeSpace

UNITS: tuple[str, ...] = ("block", "node")
NAMES = {"layer": "layer", "attn": "attention", "mlp": "MLP", "head": "head", "attn_neuron": "head dim", "mlp_neuron": "MLP neuron",
         "mlp_out": "MLP output dim"}
_PARTS = {"attn": ("attn", "head", "attn_neuron"), "mlp": ("mlp", "mlp_neuron", "mlp_out"), "head": ("head", "attn_neuron")}


@dataclass(frozen=True)
class Unit:
    """A node with all that lies below it. granularity, layer, index: as in `Circuit.nodes`; `("head", 9, (6,))` is head 9.6."""

    granularity: str
    layer: int
    index: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{NAMES[self.granularity]} {'.'.join(map(str, (self.layer, *self.index)))}"

    def members(self, space: NodeSpace) -> Gates:
        """The nodes of the unit that decide (see `NodeSpace.free`): bool, by gate tensor."""
        found: Gates = {}
        for key in space.free():
            if key.layer == self.layer and key.granularity in _PARTS.get(self.granularity, (self.granularity,)):
                found[key] = torch.zeros(space.shapes[key], dtype=torch.bool)
                found[key][self.index] = True
            elif key.layer == self.layer and self.granularity == "layer":
                found[key] = torch.ones(space.shapes[key], dtype=torch.bool)
        return found

    def kept(self, circuit: Circuit) -> bool:
        """Whether any node of the unit is live."""
        return any(bool((circuit.live(*key) & mine).any()) for key, mine in self.members(circuit.space).items())

    def whole(self, circuit: Circuit) -> bool:
        """Whether every node of the unit is live."""
        return all(bool((circuit.live(*key) | ~mine).all()) for key, mine in self.members(circuit.space).items())


def units_of(space: NodeSpace, units: str = "block") -> list[Unit]:
    """All units of a space, by layer.

    units: "block": each head (the attention block where no head or head dim is gated), each MLP block, each layer where "layer" is
        gated above something that is not; what is finer goes with them. "node": each node that decides (see `NodeSpace.free`).

    Raises: ValueError for another name.
    """
    if units not in UNITS:
        raise ValueError(f"units={units!r}; allowed: {', '.join(map(repr, UNITS))}.")
    if units == "node":
        return [Unit(key.granularity, key.layer, tuple(map(int, index))) for key in sorted(space.free(), key=lambda key: key.layer)
                for index in torch.ones(space.shapes[key]).nonzero()]
    found: dict[Unit, None] = {}
    for key in sorted(space.free(), key=lambda key: key.layer):
        if key.granularity in ("head", "attn_neuron"):
            found |= {Unit("head", key.layer, (i,)): None for i in range(space.shapes[key][0])}
        else:
            found[Unit("mlp" if key.granularity in _PARTS["mlp"] else key.granularity, key.layer)] = None
    return list(found)


def closed(circuit: Circuit, units: Iterable[Unit], *, only: Circuit | None = None) -> Circuit:
    """The circuit without these units. only: but what of them is not in that circuit stays."""
    gates = _gates(circuit)
    for unit in units:
        for key, mine in unit.members(circuit.space).items():
            gates[key] &= ~(mine if only is None else mine & only.live(*key))
    return Circuit(circuit.space, gates, circuit.ablation)


def opened(circuit: Circuit, units: Iterable[Unit]) -> Circuit:
    """The circuit with these units, whole, and what it takes for them to be read: every gate above; and an MLP neuron that no output
    dim reads gets all of that MLP's, an output dim that no neuron feeds all neurons."""
    gates, space = _gates(circuit), circuit.space
    for unit in units:
        for key, mine in unit.members(space).items():
            gates[key] |= mine
            for parent in space.ancestors(key):
                gates[parent] |= True
            other = GateKey("mlp_out" if key.granularity == "mlp_neuron" else "mlp_neuron", key.layer)
            if key.granularity in ("mlp_neuron", "mlp_out") and other in gates and not gates[other].any():
                gates[other] |= True
    return Circuit(space, gates, circuit.ablation)


def _gates(circuit: Circuit) -> Gates:
    """Gates that decide as they are; all others follow from them."""
    free = set(circuit.space.free())
    return {key: circuit.live(*key) if key in free else torch.ones(shape, dtype=torch.bool) for key, shape in circuit.space.shapes.items()}


class SizeMatched:
    """Circuits by lot with as many live nodes of each kind as a given one.

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
        gates = _gates(self.circuit)
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
