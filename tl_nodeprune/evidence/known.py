"""Circuits of the literature, as lists of heads and MLPs, and how far a circuit agrees with one of them beyond chance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import pandas as pd
from scipy import stats

from tl_nodeprune.circuit import Circuit
from tl_nodeprune.masks import Ablation
from tl_nodeprune.nodes import GateKey, NodeSpace, check_counts, check_list, check_node, check_types, find_nodes

__all__ = ["KnownCircuit", "docstring_attn_only_4l", "greater_than_gpt2", "induction_gpt2", "ioi_gpt2", "overlap"]


@dataclass(frozen=True)
class KnownCircuit:
    """A circuit that people have described.

    name: of the task and the model. source: where it is described. roles: what heads do -> heads, as (layer, head). mlps: layers of the
    MLPs that it names; empty where the source studies heads alone. n_layers, n_heads: the model's shape.

    Raises: ValueError for heads or MLPs that such a model lacks, or no head.
    """

    name: str
    source: str
    roles: Mapping[str, tuple[tuple[int, int], ...]]
    mlps: tuple[int, ...] = ()
    n_layers: int = 12
    n_heads: int = 12

    def __post_init__(self) -> None:
        check_types(KnownCircuit, vars(self))
        check_counts(n_layers=self.n_layers, n_heads=self.n_heads)
        roles = {role: tuple(check_node(f"roles[{role!r}]", head) for head in check_list(f"roles[{role!r}]", heads))
                 for role, heads in self.roles.items()}
        limits = (self.n_layers, self.n_heads)
        for role, heads in roles.items():
            for head in heads:
                if len(head) != 2 or not all(0 <= i < n for i, n in zip(head, limits, strict=True)):
                    raise ValueError(f"roles[{role!r}] holds {head}; give (layer, head), of n_layers={self.n_layers} layers of "
                                     f"n_heads={self.n_heads} heads.")
        if not any(roles.values()):
            raise ValueError('roles names no head; give some, such as {"name mover": ((9, 9), (10, 0))}.')
        if wrong := [layer for layer in self.mlps if not 0 <= layer < self.n_layers]:
            raise ValueError(f"mlps holds {wrong[0]}; give layers of 0 to {self.n_layers - 1}.")
        object.__setattr__(self, "roles", MappingProxyType(roles))

    __hash__ = None  # type: ignore[assignment]

    @property
    def heads(self) -> tuple[tuple[int, int], ...]:
        """All heads, in order, as (layer, head)."""
        return tuple(sorted({head for heads in self.roles.values() for head in heads}))

    def circuit(self, model: Any, ablation: str | Ablation = "interchange") -> Circuit:
        """The circuit on a model: these heads are kept and no others, and these MLPs, where the source names any; the others then are not
        gated and stay. A list of heads is no claim that it is faithful under any ablation: `evaluate` says.

        Raises: ValueError for a model of another shape.
        """
        check_types(KnownCircuit.circuit, locals())
        self._check_shape(find_nodes(model), "this model")
        nodes = {"head": self.heads} | ({"mlp": tuple((layer,) for layer in self.mlps)} if self.mlps else {})
        return Circuit.from_nodes(model, nodes, ablation)

    def _check_shape(self, space: NodeSpace, whose: str) -> None:
        heads = {layer: space.present.get(GateKey("head", layer), ("none",))[0] for layer in range(space.n_layers)}
        if space.n_layers != self.n_layers or set(heads.values()) != {self.n_heads}:
            told = ", ".join(map(str, dict.fromkeys(heads.values())))
            raise ValueError(f"{self.name} is a circuit of a model with {self.n_layers} layers of {self.n_heads} heads; {whose} has "
                             f"{space.n_layers} layers of {told} heads.")

    def __repr__(self) -> str:
        lines = [f"{self.name} ({self.source})", *(f"  {role}: {', '.join(f'{layer}.{head}' for layer, head in heads)}"
                                                    for role, heads in self.roles.items())]
        return "\n".join(lines + [f"  MLPs: {', '.join(map(str, self.mlps))}"] * bool(self.mlps))


def ioi_gpt2() -> KnownCircuit:
    """Indirect object identification in GPT-2 small, 26 heads (arXiv:2211.00593); MLPs were not studied."""
    return KnownCircuit("IOI in GPT-2 small", "arXiv:2211.00593", {
        "name mover": ((9, 9), (10, 0), (9, 6)),
        "backup name mover": ((10, 10), (10, 6), (10, 2), (10, 1), (11, 2), (9, 7), (9, 0), (11, 9)),
        "negative name mover": ((10, 7), (11, 10)),
        "S-inhibition": ((7, 3), (7, 9), (8, 6), (8, 10)),
        "induction": ((5, 5), (6, 9), (5, 8), (5, 9)),
        "duplicate token": ((0, 1), (0, 10), (3, 0)),
        "previous token": ((2, 2), (4, 11)),
    })


def greater_than_gpt2() -> KnownCircuit:
    """"The war lasted from 1732 to 17…", a later year, in GPT-2 small (arXiv:2305.00586): middle heads attend to the year, late MLPs raise
    the years after it."""
    return KnownCircuit("greater-than in GPT-2 small", "arXiv:2305.00586", {
        "early": ((0, 1), (0, 3), (0, 5)),
        "attends to the year": ((5, 1), (5, 5), (6, 1), (6, 9), (7, 10), (8, 8), (8, 11), (9, 1)),
    }, mlps=(0, 1, 2, 3, 8, 9, 10, 11))


def docstring_attn_only_4l() -> KnownCircuit:
    """Argument names of a docstring in TransformerLens' "attn-only-4l" (Heimersheim and Janiak 2023; used by ACDC, arXiv:2304.14997)."""
    return KnownCircuit("docstring in attn-only-4l", "Heimersheim and Janiak 2023; arXiv:2304.14997", {
        "argument mover": ((3, 0), (3, 6)),
        "earlier": ((0, 5), (1, 2), (1, 4), (2, 0)),
    }, n_layers=4, n_heads=8)


def induction_gpt2() -> KnownCircuit:
    """Induction heads of GPT-2 small: they attend to what came after the last occurrence of the present token (arXiv:2209.11895)."""
    return KnownCircuit("induction in GPT-2 small", "kind of head: arXiv:2209.11895",
                        {"induction": ((5, 1), (5, 5), (6, 9), (7, 2), (7, 10))})


def overlap(circuit: Circuit, known: KnownCircuit) -> pd.DataFrame:
    """How many of a known circuit's heads a circuit keeps, and how many as many random heads would hold: a row per role, then "all heads".

    A head counts as kept while anything in it is live. known: heads of that role that the circuit has gates for; found: of these kept;
    expected: of these among as many random heads, `known * kept / heads`. recall: found / known; precision: found / kept. p_value: that
    random heads hold as many or more (hypergeometric, one-sided; not corrected for the number of roles). `attrs` of the frame has "kept"
    and "heads": how many are kept, of how many gated.

    Raises: ValueError for a circuit of a model of another shape, or one that has no gates of heads or of their dims.
    """
    check_types(overlap, locals())
    known._check_shape(circuit.space, "the circuit's model")
    if not {"head", "attn_neuron"} & set(circuit.space.granularities):
        raise ValueError(f"circuit gates {', '.join(circuit.space.granularities)}: no heads, so it keeps or cuts a layer's all together.")
    layers = sorted({key.layer for key in circuit.space.shapes if key.granularity in ("head", "attn_neuron")})
    kept, gated = set(circuit.under("zero").at("head", layers=layers).nodes("head")), known.n_heads * len(layers)
    rows = {}
    for role, heads in {**known.roles, "all heads": known.heads}.items():
        there = {head for head in heads if head[0] in layers}
        found, n = len(there & kept), len(there)
        rows[role] = {"known": n, "found": found, "expected": n * len(kept) / gated, "recall": found / n if n else float("nan"),
                      "precision": found / len(kept) if kept else float("nan"),
                      "p_value": float(stats.hypergeom.sf(found - 1, gated, n, len(kept)))}
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("role")
    table.attrs.update(kept=len(kept), heads=gated)
    return table
