"""The nodes of a transformer: granularities, the hook points they live at, their shapes and their nesting."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from numbers import Integral
from pathlib import Path
from typing import NamedTuple

import torch

GRANULARITIES: tuple[str, ...] = ("layer", "attn", "mlp", "head", "attn_neuron", "mlp_neuron", "mlp_out")
"""Coarse to fine: a granularity stands before every one below it."""

HOOKS: dict[str, str] = {
    "layer": "hook_resid_post",
    "attn": "hook_attn_out",
    "mlp": "hook_mlp_out",
    "head": "attn.hook_z",
    "attn_neuron": "attn.hook_z",
    "mlp_neuron": "mlp.hook_post",
    "mlp_out": "hook_mlp_out",
}
PARENTS: dict[str, str] = {
    "attn": "layer",
    "mlp": "layer",
    "head": "attn",
    "attn_neuron": "head",
    "mlp_neuron": "mlp",
    "mlp_out": "mlp",
}


class GateKey(NamedTuple):
    """One gate tensor: all nodes of one granularity in one layer."""

    granularity: str
    layer: int

    @property
    def hook(self) -> str:
        """The hook point's name, as HookedTransformer spells it (a bridge knows it as an alias)."""
        return f"blocks.{self.layer}.{HOOKS[self.granularity]}"


def node_name(granularity: str, layer: int, *index: int) -> str:
    """As "head 9.6": granularity, layer, index within the layer."""
    return f"{granularity} {'.'.join(map(str, (layer, *index)))}"


@dataclass(frozen=True)
class NodeSpace:
    """The nodes of a model, gated and not: shapes by (granularity, layer), and what it takes to count parameters.

    shapes: of the gate tensors; "layer", "attn", "mlp" are [], "head" [head], "attn_neuron" [head d_head],
        "mlp_neuron" [d_mlp], "mlp_out" [d_model].
    present: the same for every granularity and layer that the model has, whether gated here or not.
    weights: rows of "attn", "mlp" or "layer", layer, how many entries the weight matrices there have; of a block those outside its
        attention and MLP nodes, such as a hybrid's other mixers. Empty: as many as the nodes own.
    lacking: why the model, or a layer of it, lacks a granularity, by the granularity's name.
    """

    shapes: dict[GateKey, tuple[int, ...]]
    present: dict[GateKey, tuple[int, ...]]
    d_model: int
    n_layers: int
    kv_heads: int
    gated_mlp: bool
    model_name: str = ""
    weights: tuple[tuple[str, int, int], ...] = ()
    lacking: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    @property
    def granularities(self) -> tuple[str, ...]:
        have = {key.granularity for key in self.shapes}
        return tuple(name for name in GRANULARITIES if name in have)

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(sorted({key.layer for key in self.shapes}))

    @property
    def hooks(self) -> tuple[str, ...]:
        """Names of the gated hook points, in order of layer and of the forward pass."""
        order = ("attn.hook_z", "hook_attn_out", "mlp.hook_post", "hook_mlp_out", "hook_resid_post")
        names = {key.hook for key in self.shapes}
        return tuple(n for layer in self.layers for o in order if (n := f"blocks.{layer}.{o}") in names)

    def check_fits(self, model: NodeSpace, what: str) -> None:
        """Raises ValueError where a model, given as its nodes, lacks one of these or has it in another shape, or another number of
        layers, residual dims or key heads. `what`: the message's start.

        Warns where only the name is another: models of one shape, such as two checkpoints, take each other's circuits and scores.
        """
        for key, shape in self.shapes.items():
            if model.present.get(key) != shape:
                raise ValueError(f"{what} another model ({self.model_name or 'unnamed'}): it needs {key.hook} with {key.granularity} nodes "
                                 f"{list(shape)}, this model has {list(model.present[key]) if key in model.present else 'none there'}.")
        for name in ("n_layers", "d_model", "kv_heads"):
            if (mine := getattr(self, name)) != (its := getattr(model, name)):
                raise ValueError(f"{what} another model ({self.model_name or 'unnamed'}): {name} is {mine} there and {its} in this one.")
        if other := self.other_name(model.model_name):
            warnings.warn(f"{what} {other}. The nodes have the same shapes, so the call goes on.", stacklevel=4)

    def other_name(self, name: str) -> str:
        """In words, where a model's name is another than this one's, whatever folder either was loaded from; empty where it is the same."""
        same = Path(name).name == Path(self.model_name).name
        return "" if same or not (name and self.model_name) else f"a model called {self.model_name!r}, this one is called {name!r}"

    @property
    def matrices(self) -> dict[GateKey, int]:
        """`weights` by gate key."""
        return {GateKey(name, layer): n for name, layer, n in self.weights}

    def width(self, hook: str) -> tuple[int, ...]:
        """A mask's shape at a hook point: that of the finest granularity living there."""
        return max((shape for key, shape in self.present.items() if key.hook == hook), key=len)

    def activation(self, hook: str) -> tuple[int, ...]:
        """The shape of an activation at a hook point, without batch and pos."""
        return self.width(hook) or (self.d_model,)

    def at(self, hook: str) -> list[GateKey]:
        """The gate tensors that multiply into a hook point's mask, coarse first."""
        keys = [GateKey(name, layer_of(hook)) for name in GRANULARITIES]
        return [key for key in keys if key in self.shapes and key.hook == hook]

    def children(self, key: GateKey) -> list[GateKey]:
        """The nearest gated tensors below a gate tensor (a head's when the attention block between is not gated)."""
        found = []
        for name, parent in PARENTS.items():
            child = GateKey(name, key.layer)
            if parent == key.granularity and child in self.present:
                found += [child] if child in self.shapes else self.children(child)
        return found

    def covered(self, key: GateKey) -> bool:
        """Whether all that lies below a gate is gated too, so that it is dead when everything below it is. Never a block that has
        more weights than those of its attention and MLP nodes."""
        if key in self.matrices and key.granularity == "layer":
            return False
        below = [GateKey(name, key.layer) for name, parent in PARENTS.items() if parent == key.granularity]
        below = [child for child in below if child in self.present]
        if key.granularity == "mlp":
            return any(child in self.shapes for child in below)
        return bool(below) and all(child in self.shapes or self.covered(child) for child in below)

    def ancestors(self, key: GateKey) -> list[GateKey]:
        """The gated tensors above a gate tensor, nearest first."""
        found, name = [], key.granularity
        while name in PARENTS:
            name = PARENTS[name]
            if GateKey(name, key.layer) in self.shapes:
                found.append(GateKey(name, key.layer))
        return found

    def finest(self) -> list[GateKey]:
        """The gate tensors that have nothing gated below them."""
        return [key for key in self.shapes if not self.children(key)]

    def free(self) -> list[GateKey]:
        """The gate tensors of leaf nodes: below them nothing is gated, or not everything, so that they do not follow from what is there. A
        search decides on them and sizes count them; at most one per hook point."""
        return [key for key in self.shapes if not self.covered(key)]

    def free_total(self) -> int:
        """How many nodes a search decides on."""
        return sum(math.prod(self.shapes[key]) for key in self.free())

    def totals(self) -> dict[str, int]:
        """How many nodes there are, by granularity."""
        counts = {name: 0 for name in self.granularities}
        for key, shape in self.shapes.items():
            counts[key.granularity] += math.prod(shape)
        return counts

    def restrict(self, granularities: str | Iterable[str] | None = None, layers: int | Iterable[int] | None = None
                 ) -> NodeSpace:
        """The same space with only some granularities and layers gated.

        Raises: ValueError for an unknown or empty choice, or a granularity or layer that the model lacks.
        """
        chosen = check_granularities(granularities, self.granularities, self.lacking)
        kept_layers = check_layers(layers, self.n_layers)
        shapes = {k: s for k, s in self.shapes.items() if k.granularity in chosen and k.layer in kept_layers}
        if not shapes:
            why = f" ({self.lacking[chosen[0]]})" if chosen[0] in self.lacking else ""
            raise ValueError(f"layers={sorted(kept_layers)} have no node of granularity {chosen}: nothing to gate{why}.")
        return replace(self, shapes=shapes)


def layer_of(hook: str) -> int:
    """The layer in a hook point's name, "blocks.L.…"."""
    return int(hook.split(".")[1])


def check_granularities(given: str | Iterable[str] | None, available: tuple[str, ...],
                        lacking: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """The granularities asked for, in order; all available ones for None. Raises ValueError on any other name; `lacking` says why."""
    if given is None:
        return available
    names = [given] if isinstance(given, str) else list(given)
    for name in names:
        if name not in GRANULARITIES:
            raise ValueError(f"unknown granularity {name!r}; allowed: {', '.join(GRANULARITIES)}.")
        if name not in available:
            why = f" ({lacking[name]})" if lacking and name in lacking else ""
            raise ValueError(f"this model has no {name!r} nodes{why}; it has: {', '.join(available)}. Leave it out.")
    if not names:
        raise ValueError(f"granularities is empty; give one or more of {', '.join(available)}, or None for all.")
    return tuple(name for name in GRANULARITIES if name in names)


def check_layers(given: int | Iterable[int] | None, n_layers: int) -> frozenset[int]:
    """The layers asked for (negative ones count from the end); all for None. Raises ValueError on any other value."""
    if given is None:
        return frozenset(range(n_layers))
    layers = list(given) if isinstance(given, Iterable) else [given]
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, Integral) or not -n_layers <= int(layer) < n_layers:
            raise ValueError(f"layer {layer!r} does not exist; this model has layers 0 to {n_layers - 1}.")
    if not layers:
        raise ValueError(f"layers is empty; give some of 0 to {n_layers - 1}, or None for all.")
    return frozenset(int(layer) % n_layers for layer in layers)


Gates = dict[GateKey, "torch.Tensor"]


def settle(space: NodeSpace, gates: Gates) -> Gates:
    """Live nodes: own gate open, every gate above open, and, where all below is gated, something below live. Bool tensors.

    This is what makes a set of thresholded gates consistent: no live child under a closed parent, no hollow parent.
    """
    live = {key: gates[key].bool() for key in gates}
    fine_first = sorted(live, key=lambda key: -GRANULARITIES.index(key.granularity))
    for key in fine_first:
        if space.covered(key):
            live[key] = live[key] & any_below([live[child] for child in space.children(key)], live[key].ndim)
    for key in reversed(fine_first):
        for parent in space.ancestors(key)[:1]:
            live[key] = live[key] & spread(live[parent], live[key].ndim)
    return live


def spread(coarse: torch.Tensor, ndim: int) -> torch.Tensor:
    """A coarse gate shaped to multiply with gates below it: [] stays, [head] becomes [head 1]."""
    return coarse.unsqueeze(-1) if coarse.ndim and ndim > coarse.ndim else coarse


def any_below(children: list[torch.Tensor], ndim: int) -> torch.Tensor:
    """Whether any node below each of some coarse ones is live, from the gates below at any granularity."""
    anys = [child.flatten(ndim).any(-1) if child.ndim > ndim else child for child in children]
    return torch.stack(anys).any(0)


def combine(space: NodeSpace, hook: str, gates: Gates) -> torch.Tensor:
    """A hook point's mask: the product of its granularities' gates, at the hook's own shape."""
    width = space.width(hook)
    product = None
    for key in space.at(hook):
        gate = spread(gates[key], len(width))
        product = gate if product is None else product * gate
    if product is None:
        raise ValueError(f"{hook} is not gated; gated are {', '.join(space.hooks)}.")
    return product.expand(width)
