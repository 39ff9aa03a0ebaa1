"""A circuit seen at other granularities."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from tl_nodeprune.masks import Ablation
from tl_nodeprune.nodes import GRANULARITIES, PARENTS, GateKey, Gates, NodeSpace, any_below, check_granularities, check_layers, spread


def seen_at(space: NodeSpace, live: Gates, granularities: str | Iterable[str], layers: int | Iterable[int] | None
            ) -> tuple[NodeSpace, Gates]:
    """The nodes of other granularities and which of them are live, see `Circuit.at`."""
    here = {key.granularity for key in space.present}
    names = check_granularities(granularities, tuple(name for name in GRANULARITIES if name in here), space.lacking)
    chosen = space.layers if layers is None else check_layers(layers, space.n_layers)
    shapes = {key: shape for key, shape in space.present.items() if key.granularity in names and key.layer in chosen}
    if not shapes:
        raise ValueError(f"layers {sorted(chosen)} have no {' or '.join(names)} nodes.")
    return replace(space, shapes=shapes), {key: _live(space, live, key).expand(shape) for key, shape in shapes.items()}


def _live(space: NodeSpace, live: Gates, key: GateKey) -> Tensor:
    """Its own gate's, else whether anything below it is live, else, where not all below it is gated, what is above it."""
    shape = space.present[key]
    if key in live:
        return live[key]
    if space.covered(key):
        return any_below([live[child] for child in space.children(key)], len(shape))
    above = GateKey(PARENTS.get(key.granularity, ""), key.layer)
    return spread(_live(space, live, above), len(shape)) if above in space.present else torch.ones((), dtype=torch.bool)


def carried(ablation: Ablation, space: NodeSpace, live: Gates) -> Ablation:
    """An ablation with the constants of these nodes. Raises ValueError where it lacks those of a hook point at which some are closed."""
    if not ablation.constants:
        return ablation
    for key, gate in live.items():
        if key.hook not in ablation.constants and not bool(gate.all()):
            raise ValueError(f"this circuit's {ablation.name!r} ablation has no constants for {key.hook}, where {key.granularity} nodes "
                             f'are cut; say what stands in for them first, as in circuit.under("zero").at({key.granularity!r}), which says '
                             "nothing about which nodes are kept.")
    return replace(ablation, constants={hook: value for hook, value in ablation.constants.items() if hook in space.hooks})


def common(a: NodeSpace, b: NodeSpace) -> tuple[str, ...]:
    """The finest granularities whose nodes both tell apart: gated themselves, or all below them is."""
    both = [name for name in GRANULARITIES if tells_apart(a, name) and tells_apart(b, name)]
    return tuple(name for name in both if not any(PARENTS.get(other) == name for other in both))


def tells_apart(space: NodeSpace, granularity: str) -> bool:
    """Whether circuits over these nodes may keep one of a granularity and cut another: gates there, or of all below."""
    return any(key in space.shapes or space.covered(key) for key in space.present if key.granularity == granularity)
