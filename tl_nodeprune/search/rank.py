"""`rank`: the run's order of all nodes by itself, as scores, so that the best k of them are a circuit for every k."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from tl_nodeprune.circuit import NodeScores
from tl_nodeprune.masks import Ablation, Landscape, LossFn, NodeMasks, distance, kl_divergence
from tl_nodeprune.nodes import check_seed, check_types, figures
from tl_nodeprune.prompts import PromptPairs
from tl_nodeprune.search.attached import on_model
from tl_nodeprune.search.budget import Budget
from tl_nodeprune.search.run import Run, Settings, going, searchable


def rank(masks: NodeMasks | nn.Module, prompts: PromptPairs, *, loss: LossFn = kl_divergence, steps: int | None = None,
         batch_size: int = 64, step_prompts: int | None = None, cache_bytes: int = 2 << 30, seed: int = 0, progress: bool = True,
         granularities: str | Iterable[str] | None = None, layers: int | Iterable[int] | None = None,
         ablation: str | Ablation | None = None) -> NodeScores:
    """A score for every leaf node such that the best k of them, for every k, are a circuit of low loss: `1 - (place - 1) / n`.

    It is `prune`'s run without a cut, all sizes alike, on all of the prompts. Nothing is held out. The masks stay as they are.

    masks: attached masks, searched over. Or a model, which gets masks for the length of the call.
    prompts: pairs to search on.
    loss: fn(circuit_logits, full_logits, prompts) -> [batch]; its mean is lowered at each size. KL(full || circuit), nats, by default. For
        MIB see `mib.distance` (CMD) and `mib.shortfall` (CPR). By KL and `mib.distance` pairs are searched on in both directions where
        `prune` does that.
    steps: of the training, as in `prune`.
    batch_size: prompts per forward.
    step_prompts: prompts per step, as in `prune`.
    cache_bytes: bytes, 2 GiB by default. Stand-ins are kept up to this, and recomputed above it.
    seed: same seed, same machine, same scores.
    progress: whether to show a bar.
    granularities: with a model, which nodes to gate, as in `add_node_masks`. None: all that the model has.
    layers: with a model, which layers, as in `add_node_masks`. None: all.
    ablation: with a model, as in `add_node_masks`, but not "optimal". None: "interchange".

    Raises: ValueError for a loss that is the same with every node ablated, or "optimal" ablation, whose constants differ from size to
    size; and what `prune` raises.
    """
    given = locals()
    check_types(rank, given)
    if not isinstance(masks, NodeMasks) or granularities is not None or layers is not None or ablation is not None:
        return on_model(rank, **given)
    check_seed(seed)
    settings = Settings(steps, batch_size, step_prompts, cache_bytes, seed)
    if masks.asked_ablation.name == "optimal":
        raise ValueError('"optimal" ablation learns constants that differ from size to size, so there is no one ranking under it; '
                         'attach the masks with "interchange", "mean" or "zero".')
    searchable(masks, prompts, stacklevel=3)
    with going(masks, "rank", settings, progress) as bar, masks.inactive():
        run = Run(masks, prompts, None, Budget(loss), settings, bar, both_ways=loss in (kl_divergence, distance))
        _check_varies(run.landscape)
        run.train()
    return run.scores()


def _check_varies(landscape: Landscape) -> None:
    """Raises ValueError where ablating every node leaves the loss as it is."""
    ends = torch.stack([torch.ones(landscape.n, dtype=torch.float32), torch.zeros(landscape.n, dtype=torch.float32)])
    full, ablated = landscape.losses(ends, torch.arange(landscape.n_prompts)).loss.mean(-1).tolist()
    if abs(full - ablated) <= 1e-6 * max(abs(full), abs(ablated)):
        raise ValueError(f"the loss is constant: {figures(full)} for the full model and {figures(ablated)} with every node ablated, so no "
                         "node is better than another. Are these the right corrupted prompts?")
