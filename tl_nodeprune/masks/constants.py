"""The constants of optimal ablation, learned for a circuit that stays as it is."""

from __future__ import annotations

from typing import Any

import torch

from tl_nodeprune.circuit.circuit import Circuit, circuit_logits
from tl_nodeprune.masks.ablation import Ablation
from tl_nodeprune.masks.losses import kl_divergence
from tl_nodeprune.masks.reference import Reference
from tl_nodeprune.nodes.attachment import temporary_hooks
from tl_nodeprune.nodes.hooks import mask_hooks
from tl_nodeprune.prompts.pairs import PromptPairs

RATE = 0.02  # Adam's
STEPS, STEP_PROMPTS = 40, 32


def with_optimal_constants(model: Any, circuit: Circuit, prompts: PromptPairs, *, batch_size: int = 64) -> Circuit:
    """The same nodes under "optimal" ablation: constants that lower KL(full || circuit) on the prompts (arXiv:2409.09951), by so many
    steps of Adam from the nodes' means; the means themselves where that is no better. Call it with no masks active."""
    hooks = circuit.space.hooks
    means = Ablation("optimal").fit(model, prompts, hooks, batch_size=batch_size)
    reference = Reference(model, prompts, means, hooks, batch_size=batch_size)
    constants = {hook: value.clone().requires_grad_(True) for hook, value in means.constants.items()}
    optimizer, generator = torch.optim.Adam(list(constants.values()), lr=RATE), torch.Generator().manual_seed(0)
    masks = {hook: circuit[hook].to(reference.full.device) for hook in hooks}
    for _ in range(STEPS):
        rows = torch.randperm(len(prompts), generator=generator)[:STEP_PROMPTS]
        with torch.enable_grad(), temporary_hooks(model, mask_hooks(hooks, masks.__getitem__, constants.__getitem__)):
            loss = kl_divergence(reference.logits(prompts[rows]), reference.full[rows.to(reference.full.device)]).mean()
        if not loss.requires_grad:  # everything is open, and the weights are frozen
            break
        found = torch.autograd.grad(loss, list(constants.values()), allow_unused=True)  # not backward: the weights may want gradients
        for constant, gradient in zip(constants.values(), found, strict=True):
            constant.grad = gradient
        optimizer.step()
    learned = Ablation("optimal", {hook: value.detach() for hook, value in constants.items()})

    def kl(ablation: Ablation) -> float:
        logits = circuit_logits(model, circuit.under(ablation), prompts, batch_size=batch_size)
        return float(kl_divergence(logits, reference.full).mean())

    return circuit.under(min(means, learned, key=kl))
