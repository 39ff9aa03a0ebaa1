"""The constants of optimal ablation, learned for masks that stay as they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tl_nodeprune.masks.ablation import Ablation
from tl_nodeprune.masks.losses import kl_divergence
from tl_nodeprune.masks.reference import Reference
from tl_nodeprune.prompts import PromptPairs

RATE = 0.02  # Adam's
STEPS, STEP_PROMPTS = 40, 32


def optimal_constants(model: Any, masks: Mapping[str, Tensor], prompts: PromptPairs, *, batch_size: int = 64) -> Ablation:
    """The "optimal" ablation of masks by hook name: constants that lower KL(full || masked) on the prompts (arXiv:2409.09951), by so many
    steps of Adam from the nodes' means; the means themselves where that is no better. Call it with no masks active."""
    hooks = tuple(masks)
    means = Ablation("optimal").fit(model, prompts, hooks, batch_size=batch_size)
    reference = Reference(model, prompts, means, hooks, batch_size=batch_size)
    constants = {hook: value.clone().requires_grad_(True) for hook, value in means.constants.items()}
    optimizer, generator = torch.optim.Adam(list(constants.values()), lr=RATE), torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        rows = torch.randperm(len(prompts), generator=generator)[:STEP_PROMPTS]
        with torch.enable_grad():
            loss = kl_divergence(reference.logits(rows, masks, constants), reference.full[rows.to(reference.full.device)]).mean()
        if not loss.requires_grad:  # everything is open, and the weights are frozen
            break
        found = torch.autograd.grad(loss, list(constants.values()), allow_unused=True)  # not backward: the weights may want gradients
        for constant, gradient in zip(constants.values(), found, strict=True):
            constant.grad = gradient
        optimizer.step()
    learned = Ablation("optimal", {hook: value.detach() for hook, value in constants.items()})
    return min(means, learned, key=lambda one: float(kl_divergence(reference.all_logits(masks, one.constants), reference.full).mean()))
