"""How many weights the live nodes of a model need."""

from __future__ import annotations

import torch
from einops import reduce

from tl_nodeprune.nodes.space import GateKey, Gates, NodeSpace, spread


def count_parameters(space: NodeSpace, live: Gates) -> int:
    """Weight-matrix entries of the blocks that the live nodes need (no biases, norms, embeddings).

    A key head is needed while a query head of its group is live, a value dim while one of the group reads it; a neuron costs
    its row in W_in (and W_gate) and, in W_out, one entry per live output dim. What no finer node owns counts whole while any node of
    its attention, MLP or block is live: a router and experts, projections that heads share, a hybrid's other mixers.
    """
    total, owned = 0, space.matrices
    for layer in range(space.n_layers):
        attn, mlp, block = (GateKey(name, layer) for name in ("attn", "mlp", "layer"))
        z, neurons, outs = (_live_leaf(space, live, GateKey(name, layer)) for name in ("attn_neuron", "mlp_neuron", "mlp_out"))
        if z is not None:
            total += _with_rest(owned.get(attn), _attention(space, z), _attention(space, torch.ones_like(z)))
        elif attn in owned and bool(_live_leaf(space, live, attn)):
            total += owned[attn]
        if neurons is not None and outs is not None:
            total += _with_rest(owned.get(mlp), _mlp(space, neurons, outs), _mlp(space, torch.ones_like(neurons), torch.ones_like(outs)))
        elif mlp in owned and outs is not None and outs.any():
            total += owned[mlp]
        if block in owned and (block not in space.present or bool(_live_leaf(space, live, block))):
            total += owned[block]
    return total


def _attention(space: NodeSpace, z: torch.Tensor) -> int:
    groups = reduce(z, "(group head) d_head -> group d_head", "any", group=space.kv_heads)
    return space.d_model * (z.shape[1] * int(z.any(1).sum() + groups.any(1).sum()) + int(z.sum() + groups.sum()))


def _mlp(space: NodeSpace, neurons: torch.Tensor, outs: torch.Tensor) -> int:
    n, o = int(neurons.sum()), int(outs.sum())
    return n * (space.d_model * (2 if space.gated_mlp else 1) + o) if o else 0


def _with_rest(whole: int | None, part: int, of: int) -> int:
    """A part of the `of` weights that nodes own, and what there is beyond these; the whole where nodes would own more than there is."""
    if whole is None or not part:
        return part
    return part + whole - of if whole >= of else whole


def _live_leaf(space: NodeSpace, live: Gates, key: GateKey) -> torch.Tensor | None:
    """Which of the finest nodes are live, gated themselves or through the nearest gate above; None where the model lacks them."""
    if key not in space.present:
        return None
    nearest = [k for k in (key, *space.ancestors(key)) if k in live][:1]
    gate = spread(live[nearest[0]], len(space.present[key])) if nearest else torch.ones((), dtype=torch.bool)
    return gate.cpu().expand(space.present[key])
