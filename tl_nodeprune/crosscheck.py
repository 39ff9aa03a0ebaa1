"""Does another method agree? Effects of single nodes by exact activation patching, in a circuit's own keys and shapes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from tl_nodeprune.ablation import Ablation
from tl_nodeprune.circuit import full_logits
from tl_nodeprune.hooks import check_ready, find_nodes, mask_hooks, temporary_hooks
from tl_nodeprune.masks import masks_off
from tl_nodeprune.nodes import GateKey, NodeSpace
from tl_nodeprune.prompts import PromptPairs

COARSE = ("attn", "mlp", "head")


def activation_patching(model: Any, prompts: PromptPairs, granularities: Iterable[str] = COARSE, *,
                        progress: bool = True) -> dict[str, Tensor]:
    """The effect of restoring one node's clean activation in the corrupted run, by exact patching at all positions.

    `effect = m(corrupted run with this node clean) - m(corrupted run)`, m the mean logit difference at the answer positions.
    Masks that are attached are left out for the while.

    granularities: "attn", "mlp", "head" by default; finer ones cost one forward per node.
    Returns hook name -> effects at the hook's shape, as a circuit's masks: [] attention block, [head d_head] with a head's effect
    at each of its dims, [d_mlp], [d_model]. Where several granularities share a hook point, the finest asked for stands.
    Raises: ValueError for an unknown granularity or one that the model lacks; RuntimeError where a circuit is applied.
    """
    with masks_off(model):
        check_ready(model)
        prompts.check_fits(model)
        space = find_nodes(model).restrict(granularities)
        corrupted = PromptPairs(prompts.corrupted, prompts.clean, prompts.answers, prompts.wrong_answers, prompts.attention_mask,
                                prompts.answer_positions)
        clean = Ablation("interchange").values(model, corrupted, space.hooks)  # "ablated" values are the clean ones here
        base = corrupted.logit_diff(full_logits(model, corrupted)).mean()
        effects = {hook: torch.zeros(space.width(hook)) for hook in space.hooks}
        nodes = [(key, index) for key in _finest(space) for index in range(max(1, torch.Size(space.shapes[key]).numel()))]
        for key, index in tqdm(nodes, desc="patch", disable=not progress):
            mask = _one_closed(space, key, index, prompts.clean.device)
            with temporary_hooks(model, mask_hooks([key.hook], lambda hook, m=mask: m, clean.__getitem__)):  # type: ignore[misc]
                effect = corrupted.logit_diff(full_logits(model, corrupted)).mean() - base
            effects[key.hook][(mask == 0).cpu()] = effect.cpu()
    return effects


def _finest(space: NodeSpace) -> list[GateKey]:
    """One gate tensor per hook point, the finest."""
    return [space.at(hook)[-1] for hook in space.hooks]


def _one_closed(space: NodeSpace, key: GateKey, index: int, device: torch.device) -> Tensor:
    """A mask at the hook's shape that is 0 at one node and 1 elsewhere."""
    shape, width = space.shapes[key], space.width(key.hook)
    gate = torch.ones(shape, device=device)
    gate.view(-1)[index] = 0
    return gate.view((*shape, *[1] * (len(width) - len(shape)))).expand(width)


