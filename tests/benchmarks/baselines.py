"""Circuits by other means, of a size given: attribution, magnitude, chance, and TransformerLens' own attribution.

A method scores the leaf nodes of a `Landscape`, flat [node]; the best of them are the circuit, as many as make it of the size given
once those that change nothing are left out (`lift`). Call all of it with the masks inactive.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import tl_nodeprune as tlnp
from tl_nodeprune.masks.landscape import Landscape
from tl_nodeprune.masks.reference import Reference
from tl_nodeprune.nodes.hooks import capture_nodes
from tl_nodeprune.nodes.space import GateKey, NodeSpace
from tl_nodeprune.prompts.pairs import positions

FULL, ABLATED, PATH = (1.0,), (0.0,), tuple((i + 0.5) / 10 for i in range(10))
"""Points on the straight path from the ablated run (0) to the full model (1); the gradient is averaged over them."""
IG_10, IG_5 = (tuple((i + 1) / n for i in range(n)) for n in (10, 5))
"""The points of integrated gradients as the field takes them: the end of each step, the full model the last."""


PAPER_GRANULARITIES = ("attn", "mlp", "head", "attn_neuron", "mlp_neuron", "mlp_out")  # "layer" is off by default there


@contextmanager
def attached(model: Any, granularities: tuple[str, ...] | None = None) -> Iterator[tlnp.NodeMasks]:
    masks = model.add_node_masks(granularities)
    try:
        yield masks
    finally:
        model.remove_node_masks()


def lost_logit_diff(logits: Tensor, full: Tensor, prompts: tlnp.PromptPairs) -> Tensor:
    return -prompts.logit_diff(logits)


def pure_kl(logits: Tensor, full: Tensor, prompts: tlnp.PromptPairs) -> Tensor:
    """KL(full || circuit), another function than the library's own, to which a landscape adds a hinge."""
    return tlnp.kl_divergence(logits, full)


def landscape(masks: tlnp.NodeMasks, prompts: tlnp.PromptPairs, *, batch_size: int = 64, cache_bytes: int = 2 << 30) -> Landscape:
    """Over the leaf nodes of attached masks, as `prune` has it."""
    hooks = tuple(dict.fromkeys(key.hook for key in masks.space.free()))
    return Landscape(masks.space, Reference(masks.model, prompts, masks.ablation, hooks, batch_size=batch_size, cache_bytes=cache_bytes))


def gradient(land: Landscape, loss: Any, points: Sequence[float], most: int | None = None) -> Tensor:
    """Minus the loss' gradient to the gates, mean over points of the path and prompts (the first `most`): what opening a node gains."""
    here, total = Landscape(land.space, land.reference, loss), torch.zeros(land.n, device=land.device)
    rows = torch.arange(land.n_prompts)[:most]
    for chunk in land.reference.chunks(rows):
        for point in points:
            total -= here.gradient(torch.full((len(chunk), here.n), point), chunk, step=0)[1].sum(0)
    return total / (len(points) * len(rows))


def by_hook(land: Landscape, values: dict[str, Tensor]) -> Tensor:
    """Scores by hook name, each of its leaf gate's shape, as the landscape's flat vector."""
    return torch.cat([values[key.hook].detach().flatten() for key in land.keys])


def magnitude(land: Landscape) -> Tensor:
    """Norm over prompts and positions of a node's activation, clean - corrupted."""
    hooks, squares = land.reference.hooks, dict[str, Tensor]()
    for some in land.reference.prompts.batches(land.reference.batch_size):
        clean, corrupted = (capture_nodes(land.reference.model, tokens, hooks) for tokens in (some.clean, some.corrupted))
        for hook in hooks:
            squares[hook] = squares.get(hook, 0) + (clean[hook] - corrupted[hook])[some.attention_mask].float().pow(2).sum(0)
    return by_hook(land, {hook: total.sqrt() for hook, total in squares.items()})


def weight_norm(land: Landscape) -> Tensor:
    """Norm of the weights by which a node writes; for an output dim of an MLP, of those by which it is written."""
    model = land.reference.model
    w_o, w_out = model.W_O, model.W_out
    norms = {"attn_neuron": w_o.norm(dim=-1), "mlp_neuron": w_out.norm(dim=-1), "mlp_out": w_out.norm(dim=-2)}
    return torch.cat([norms[key.granularity][key.layer].detach().flatten() for key in land.keys])


ATTRIBUTIONS: dict[str, tuple[Any, tuple[float, ...], bool]] = {
    "attribution, logit diff, at the full model": (lost_logit_diff, FULL, False),
    "attribution, logit diff, at the ablated run": (lost_logit_diff, ABLATED, False),
    "attribution, logit diff, integrated": (lost_logit_diff, PATH, False),
    "attribution, integrated gradients, 10 steps": (lost_logit_diff, IG_10, False),
    "attribution, integrated gradients, 5 steps": (lost_logit_diff, IG_5, False),
    "attribution, KL, at the ablated run": (pure_kl, ABLATED, True),  # at the full model it is 0
    "attribution, KL, integrated": (pure_kl, PATH, True),
}
"""Of each: the loss, the points of the path, and whether the score is the gradient itself (else its absolute value)."""
SIGNED = {f"{name}, signed": (loss, points, True) for name, (loss, points, signed) in ATTRIBUTIONS.items() if not signed}


def attribution(land: Landscape, loss: Any, points: Sequence[float], signed: bool, most: int | None = None) -> Tensor:
    found = gradient(land, loss, points, most)
    return found if signed else found.abs()


def _attribution(loss: Any, points: Sequence[float], signed: bool) -> Callable[[Landscape], Tensor]:
    return lambda land: attribution(land, loss, points, signed)


SCORES: dict[str, Callable[[Landscape], Tensor]] = {
    **{name: _attribution(*how) for name, how in {**ATTRIBUTIONS, **SIGNED}.items()},
    "magnitude, clean - corrupted": magnitude,
    "magnitude, weight norm": weight_norm,
}


def top(land: Landscape, scores: Tensor, size: int) -> tlnp.Circuit:
    """The leaf nodes with the highest scores: as few as have `size` live ones with an effect, or more."""
    order = scores.cpu().argsort(descending=True)

    def first(k: int) -> tlnp.Circuit:
        kept = torch.zeros(land.n, dtype=torch.bool)
        kept[order[:k]] = True
        return lift(tlnp.Circuit(land.space, land.gates(kept.float()), land.with_coarse(land.ablation_now())), land.space)

    return first(bisect_left(range(land.n), size, key=lambda k: first(k).size))


def random(land: Landscape, size: int, seed: int) -> tlnp.Circuit:
    return top(land, torch.rand(land.n, generator=torch.Generator().manual_seed(seed)), size)


def lens_attribution(land: Landscape, size: int) -> tlnp.Circuit:
    """Whole heads and MLP blocks in the order of |score| of TransformerLens' `attribution_patch` (logit difference, summed over
    positions), until `size` leaf nodes or more are kept; so never fewer than the others have.

    Raises: ImportError on TransformerLens 3; whatever it raises itself, as on frozen weights. Call it with no masks attached.
    """
    from transformer_lens.tools.analysis.attribution_patching import attribution_patch

    scores: dict[tuple[str, int, int | None], float] = {}
    prompts = land.reference.prompts
    for i, end in enumerate(positions(prompts).tolist()):
        pair, width = prompts[i], slice(0, end + 1)  # no padding: it takes no attention mask
        result = attribution_patch(land.reference.model, pair.clean[:, width], pair.corrupted[:, width],
                                   lambda logits, pair=pair: pair.logit_diff(logits[:, -1]).sum())
        for node, score in result.node_scores.items():
            place = (node.kind, node.layer, node.head)
            scores[place] = scores.get(place, 0.0) + score
    ids, kept = land.gates(torch.arange(land.n)), torch.zeros(land.n, dtype=torch.bool)
    for kind, layer, head in sorted(scores, key=lambda place: -abs(scores[place])):
        if int(kept.sum()) >= size:
            break
        if kind == "attn_head_out":
            kept[ids[GateKey("attn_neuron", layer)][head]] = True
        elif kind == "mlp_out":
            kept[torch.cat([ids[GateKey(name, layer)] for name in ("mlp_neuron", "mlp_out")])] = True
    return tlnp.Circuit(land.space, land.gates(kept.float()), land.with_coarse(land.ablation_now()))


def lift(circuit: tlnp.Circuit, space: NodeSpace) -> tlnp.Circuit:
    """The same circuit over all nodes of `space`: what was not gated is open, less those nodes that change nothing.

    Without effect is a neuron of an MLP that has no live output dim, and an output dim of one without live neuron: under
    interchange ablation the MLP then writes what it writes in the corrupted run, to the bit of rounding.
    """
    gates = {key: circuit.live(*key) if key in circuit.space.shapes else torch.ones(shape) for key, shape in space.shapes.items()}
    for layer in space.layers:
        neurons, outs = (gates.get(GateKey(name, layer)) for name in ("mlp_neuron", "mlp_out"))
        if neurons is not None and outs is not None and not (neurons.any() and outs.any()):
            neurons.zero_()
            outs.zero_()
    return tlnp.Circuit(space, gates, circuit.ablation)
