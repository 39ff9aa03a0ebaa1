"""From trained masks to a circuit and back, and a circuit as one vector of its leaf nodes."""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor

from tl_nodeprune.circuit.circuit import Circuit
from tl_nodeprune.masks import NodeMasks, gate_name
from tl_nodeprune.nodes import check_types


def to_circuit(masks: NodeMasks) -> Circuit:
    """The thresholded, consistent circuit of the scores now. Raises: FloatingPointError for a score that is NaN."""
    for key in masks.space.shapes:
        if masks.score(key).isnan().any():
            raise FloatingPointError(f"NaN in the scores of {gate_name(key)}: they do not say whether these nodes are kept.")
    return Circuit(masks.space, {key: masks.gate.kept(masks.score(key)) for key in masks.space.shapes}, masks.ablation)


def set_to(masks: NodeMasks, circuit: Circuit) -> None:
    """Set the gates to a circuit: live ones fully open, all others fully closed.

    Raises: ValueError where the circuit lacks one of these gates or has it in another shape; nothing is set then.
    """
    check_types(set_to, locals())
    have = circuit.space.shapes
    for key, shape in masks.space.shapes.items():
        if have.get(key) != shape:
            raise ValueError(f"these masks gate {key.hook} with {key.granularity} nodes {list(shape)}, the circuit has "
                             f"{list(have[key]) if key in have else 'none there'}; of other granularities give "
                             f"circuit.at({list(masks.space.granularities)}).")
    with torch.no_grad():
        for key in masks.space.shapes:
            score, live = masks.score(key), circuit.live(*key).to(masks.score(key).device)
            score.copy_(torch.where(live, masks.gate.open_score, masks.gate.closed_score))


def leaves_of(circuit: Circuit) -> Bool[Tensor, "node"]:
    """Which leaf nodes are kept, as one vector in the order of `NodeSpace.free`."""
    return torch.cat([circuit.live(*key).flatten() for key in circuit.space.free()])
