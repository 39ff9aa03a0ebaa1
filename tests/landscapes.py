"""Landscapes over the embedded model, for the tests of several packages."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import tl_nodeprune as tlnp
from tl_nodeprune.masks.landscape import Landscape
from tl_nodeprune.masks.reference import Reference
from tl_nodeprune.nodes.probe import find_nodes

Toy = tuple[Any, tlnp.PromptPairs]


def landscape_of(toy: Toy, granularities: tuple[str, ...] | None = None, ablation: str = "interchange", **options: Any) -> Landscape:
    model, prompts = toy
    space = find_nodes(model).restrict(granularities)
    fitted = tlnp.Ablation(ablation).fit(model, prompts, space.hooks)
    hooks = tuple(dict.fromkeys(key.hook for key in space.free()))
    return Landscape(space, Reference(model, prompts, fitted, hooks, **{"batch_size": 10, **options}))


def circuit_of(landscape: Landscape, kept: Tensor) -> tlnp.Circuit:
    """Kept nodes as a circuit, with the ablation and its constants as they are now."""
    ablation = landscape.with_coarse(landscape.ablation_now())
    return tlnp.Circuit(landscape.space, landscape.gates(kept.float()), ablation)


def random_kept(landscape: Landscape, share: float, seed: int = 0) -> Tensor:
    return torch.rand(landscape.n, generator=torch.Generator().manual_seed(seed)) < share


def all_rows(landscape: Landscape) -> Tensor:
    return torch.arange(landscape.n_prompts)
