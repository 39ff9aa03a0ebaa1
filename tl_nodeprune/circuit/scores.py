"""Scores of nodes: an order of all of them, so that the best k are a circuit for every k."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Tensor

from tl_nodeprune.circuit.circuit import Circuit
from tl_nodeprune.circuit.conversion import leaves_of
from tl_nodeprune.circuit.effects import Effects
from tl_nodeprune.masks import Ablation
from tl_nodeprune.nodes import GateKey, NodeSpace, check_types

SIZES: tuple[float, ...] = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Shares of the nodes at which MIB judges scores (arXiv:2504.13151)."""


@dataclass(frozen=True, eq=False, repr=False)
class NodeScores(Mapping[str, Tensor]):
    """Scores of the nodes that a search decides on (`NodeSpace.free`: the leaves), the best first.

    As a Mapping: hook name -> scores at the shape of the gate tensor there, [head d_head] or [head] for hook_z, [d_mlp], [d_model], [].
    gates: the same by (granularity, layer), float32 on the CPU. ablation: what stands in for a node that is left out.

    Raises: ValueError where a gate tensor is missing, of another shape, or holds NaN or inf; TypeError where it is no tensor.
    """

    gates: Mapping[GateKey, Tensor]
    space: NodeSpace
    ablation: Ablation = Ablation()

    def __post_init__(self) -> None:
        check_types(NodeScores, vars(self))
        self.ablation.check_fits(self.space)
        gates = {}
        for key in self.space.free():
            if key in self.gates and not isinstance(self.gates[key], Tensor):
                raise TypeError(f"scores of the {key.granularity} nodes of layer {key.layer} are {type(self.gates[key]).__name__}; "
                                "give a tensor (torch.as_tensor).")
            if key not in self.gates or tuple(self.gates[key].shape) != self.space.shapes[key]:
                given = list(self.gates[key].shape) if key in self.gates else "missing"
                raise ValueError(f"scores of the {key.granularity} nodes of layer {key.layer} are {given}; "
                                 f"expected {list(self.space.shapes[key])}.")
            gates[key] = self.gates[key].detach().float().cpu()
            if not torch.isfinite(gates[key]).all():
                raise ValueError(f"NaN or inf in the scores of the {key.granularity} nodes of layer {key.layer}; "
                                 "give a finite number to each.")
        object.__setattr__(self, "gates", gates)

    def __eq__(self, other: object) -> bool:
        """The same scores for the same nodes."""
        if not isinstance(other, NodeScores) or set(self.gates) != set(other.gates):
            return False
        return all(torch.equal(gate, other.gates[key]) for key, gate in self.gates.items())

    __hash__ = None  # type: ignore[assignment]

    @classmethod
    def from_flat(cls, flat: Tensor, space: NodeSpace, ablation: Ablation = Ablation()) -> NodeScores:  # noqa: B008 (frozen)
        """From one vector [node] over the free gate tensors, in the order of `NodeSpace.free`. Raises: ValueError for another shape."""
        check_types(NodeScores.from_flat, locals())
        sizes = [math.prod(space.shapes[key]) for key in space.free()]
        if flat.shape != (sum(sizes),):
            raise ValueError(f"flat is {tuple(flat.shape)}; it must hold one score for each of the {sum(sizes)} nodes.")
        pieces = zip(space.free(), flat.split(sizes), strict=True)
        return cls({key: piece.view(space.shapes[key]) for key, piece in pieces}, space, ablation)

    @classmethod
    def from_effects(cls, effects: Effects, *, absolute: bool = False, ablation: Ablation = Ablation()) -> NodeScores:  # noqa: B008
        """From activation or attribution patching. What helps ranks first, in either direction; absolute: what matters most, either way."""
        check_types(NodeScores.from_effects, locals())
        sign = 1 if effects.direction == "denoise" else -1
        gates = {key: effects.gates[key].abs() if absolute else sign * effects.gates[key] for key in effects.space.free()}
        return cls(gates, effects.space, ablation)

    @classmethod
    def from_circuit(cls, circuit: Circuit, within: NodeScores | None = None) -> NodeScores:
        """Kept nodes above all cut ones, each side in the order of `within` (None: as they come)."""
        check_types(NodeScores.from_circuit, locals())
        space, kept = circuit.space, leaves_of(circuit)
        if within is not None and within.space.shapes != space.shapes:
            raise ValueError("the circuit and the scores are over different nodes; of other granularities give "
                             f"circuit.at({list(within.space.granularities)}).")
        order = within.flat if within is not None else torch.zeros(len(kept), dtype=torch.float32)
        return cls.from_flat(ranks(kept_first(kept, order)), space, circuit.ablation)

    def __getitem__(self, hook: str) -> Tensor:
        found = [gate for key, gate in self.gates.items() if key.hook == hook]
        if not found:
            raise KeyError(f"{hook!r} has no scores; scored are {', '.join(self)}.")
        return found[0].clone()

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(key.hook for key in self.gates))

    def __len__(self) -> int:
        return len({key.hook for key in self.gates})

    @property
    def flat(self) -> Tensor:
        """All scores as one vector [node]."""
        return torch.cat([gate.flatten() for gate in self.gates.values()])

    @property
    def n(self) -> int:
        """How many nodes are scored."""
        return sum(gate.numel() for gate in self.gates.values())

    def top(self, size: float | int) -> Circuit:
        """The circuit of the best nodes: a float is a share, an int a count. Of equal scores the first come first.

        Raises: ValueError for a share outside 0 to 1 or a count outside 0 to n.
        """
        check_types(NodeScores.top, locals())
        count = self.count(size)
        kept = torch.zeros(self.n, dtype=torch.float32)
        kept[self.flat.argsort(descending=True, stable=True)[:count]] = 1
        scores = NodeScores.from_flat(kept, self.space)
        gates = {key: scores.gates.get(key, torch.ones(shape, dtype=torch.float32)) for key, shape in self.space.shapes.items()}
        return Circuit(self.space, gates, self.ablation)

    def count(self, size: float | int) -> int:
        """How many nodes a share is: the nearest, at least one."""
        check_types(NodeScores.count, locals())
        counted = isinstance(size, Integral)
        if isinstance(size, bool) or not 0 <= size <= (self.n if counted else 1):
            raise ValueError(f"size={size}; give a share of 0.0 to 1.0 as a float, or a count of 0 to {self.n} as an int.")
        return int(size) if counted else max(round(size * self.n), 1) if size else 0

    def __repr__(self) -> str:
        counts = ", ".join(f"{sum(g.numel() for k, g in self.gates.items() if k.granularity == name)} {name}"
                           for name in dict.fromkeys(key.granularity for key in self.gates))
        return f"NodeScores({counts}; ablation={self.ablation.name!r})"


def check_sizes(sizes: Sequence[float]) -> None:
    """Raises ValueError where sizes are not ascending shares above 0 that end at 1."""
    ascending = all(a < b for a, b in zip(sizes, sizes[1:], strict=False))
    if len(sizes) < 2 or not ascending or not sizes[0] > 0 or sizes[-1] != 1:
        raise ValueError(f"sizes={tuple(sizes)}; give two or more shares of the nodes, ascending, above 0, the last one 1.0.")


def kept_first(kept: Tensor, scores: Tensor) -> Tensor:
    """Keys [node] by which kept nodes come before all others, each side in the order of its scores."""
    return len(kept) * kept - scores.argsort(descending=True, stable=True).argsort()


def ranks(keys: Tensor) -> Tensor:
    """`1 - place / n`: 1 for the highest key, 1 / n for the lowest."""
    return 1 - keys.argsort(descending=True, stable=True).argsort().float() / len(keys)  # a default dtype may make ranks equal
