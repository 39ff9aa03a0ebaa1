"""Units of a circuit: the heads, blocks or single nodes that are taken out and put in one at a time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

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
    gates = gates_of(circuit)
    for unit in units:
        for key, mine in unit.members(circuit.space).items():
            gates[key] &= ~(mine if only is None else mine & only.live(*key))
    return Circuit(circuit.space, gates, circuit.ablation)


def opened(circuit: Circuit, units: Iterable[Unit]) -> Circuit:
    """The circuit with these units, whole, and what it takes for them to be read: every gate above; and an MLP neuron that no output
    dim reads gets all of that MLP's, an output dim that no neuron feeds all neurons."""
    gates, space = gates_of(circuit), circuit.space
    for unit in units:
        for key, mine in unit.members(space).items():
            gates[key] |= mine
            for parent in space.ancestors(key):
                gates[parent] |= True
            other = GateKey("mlp_out" if key.granularity == "mlp_neuron" else "mlp_neuron", key.layer)
            if key.granularity in ("mlp_neuron", "mlp_out") and other in gates and not gates[other].any():
                gates[other] |= True
    return Circuit(space, gates, circuit.ablation)


def gates_of(circuit: Circuit) -> Gates:
    """Gates that decide as they are; all others follow from them."""
    free = set(circuit.space.free())
    return {key: circuit.live(*key) if key in free else torch.ones(shape, dtype=torch.bool) for key, shape in circuit.space.shapes.items()}
