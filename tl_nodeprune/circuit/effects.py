"""Effects of single nodes, in a circuit's own keys and shapes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from tl_nodeprune.nodes import GateKey, NodeSpace, check_types, spread

DIRECTIONS: tuple[str, ...] = ("denoise", "noise")


@dataclass(frozen=True, eq=False, repr=False)
class Effects(Mapping[str, Tensor]):
    """What putting one node's activation from the other run into this run adds to the metric, node by node.

    As a Mapping: hook name -> effects at the hook's shape, as a circuit's masks; where several granularities share a hook point (head and
    attn_neuron; mlp and mlp_out), the finest one measured, a head's effect standing at each of its dims. `of(granularity)` has every one.

    gates: by (granularity, layer), shaped as the gate tensors, float32 on the CPU.
    direction: "denoise" (clean activation into the corrupted run) or "noise" (corrupted activation into the clean run).
    method: "activation patching" (exact) or "attribution patching" (first order).
    clean, corrupted: the metric of the two runs without a patch, mean over prompts. n_prompts: how many.
    """

    gates: Mapping[GateKey, Tensor]
    space: NodeSpace
    direction: str
    method: str
    clean: float
    corrupted: float
    n_prompts: int

    def __getitem__(self, hook: str) -> Tensor:
        if hook not in self.space.hooks:
            raise KeyError(f"{hook!r} was not patched; patched were {', '.join(self.space.hooks)}.")
        finest, width = self.space.at(hook)[-1], self.space.width(hook)
        return spread(self.gates[finest], len(width)).expand(width).clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self.space.hooks)

    def __len__(self) -> int:
        return len(self.space.hooks)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Effects) or set(self.gates) != set(other.gates):
            return False
        return self.direction == other.direction and all(torch.equal(gate, other.gates[key]) for key, gate in self.gates.items())

    __hash__ = None  # type: ignore[assignment]

    @property
    def granularities(self) -> tuple[str, ...]:
        """The granularities measured, coarse to fine."""
        return self.space.granularities

    def of(self, granularity: str) -> dict[int, Float[Tensor, "..."]]:
        """The effects of one granularity's nodes: layer -> tensor shaped as the gate tensor ("head" [head], "mlp" []).

        Raises: KeyError for a granularity that was not measured.
        """
        check_types(Effects.of, locals())
        if granularity not in self.granularities:
            raise KeyError(f"granularity {granularity!r} was not patched; patched were {', '.join(self.granularities)}.")
        keys = sorted((key for key in self.gates if key.granularity == granularity), key=lambda key: key.layer)
        return {key.layer: self.gates[key].clone() for key in keys}

    def normalised(self) -> Effects:
        """Effects on the metric normalised to 0 in the corrupted run and 1 in the clean run: `effect / (m(clean) - m(corrupted))`.

        1: that node alone brings all of it back ("denoise"); -1: without that node all of it is lost ("noise").
        """
        gates = {key: gate / (self.clean - self.corrupted) for key, gate in self.gates.items()}
        return replace(self, gates=gates, clean=1.0, corrupted=0.0)

    def to_frame(self) -> pd.DataFrame:
        """A row per node, the largest absolute effect first: granularity, layer, index (within the layer), effect."""
        rows = [{"granularity": key.granularity, "layer": key.layer, "index": tuple(index), "effect": float(gate[tuple(index)])}
                for key, gate in self.gates.items() for index in torch.ones(gate.shape).nonzero().tolist()]
        return pd.DataFrame(rows).sort_values("effect", key=lambda column: -column.abs(), kind="stable", ignore_index=True)

    def __repr__(self) -> str:
        counts = ", ".join(f"{total} {name}" for name, total in self.space.totals().items())
        return (f"Effects({counts}; {self.method}, {self.direction}; metric {self.clean:.4g} clean, {self.corrupted:.4g} corrupted, "
                f"{self.n_prompts} prompts)")
