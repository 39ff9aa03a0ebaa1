"""Other people's trained node scores, for comparison: Matryoshka Attribution, and hard-concrete node pruning as its authors ran it.

Both lower minus the logit difference over the leaf nodes of a landscape, and give a score per node, flat [node]. Written from a
description of the methods (arXiv:2609.25518; gates: arXiv:1712.01312), not from their code. What the description does not say is set here:
the smallest size that is drawn, where the gates start, and the learning rate of the hard-concrete ones.
"""

from __future__ import annotations

import math

import baselines
import torch
from torch import Tensor

from tl_nodeprune.masks.landscape import Landscape
from tl_nodeprune.search.nested import thresholds

MATRYOSHKA, HARD_CONCRETE = "Matryoshka Attribution", "hard-concrete node pruning on the logit difference"
STEPS = {MATRYOSHKA: 500, HARD_CONCRETE: 3000}
BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1


def matryoshka(land: Landscape, *, steps: int = STEPS[MATRYOSHKA], step_prompts: int = 16, smallest: float = 0.005,
               temperature: float = 0.5, lr: float = 0.05, seed: int = 0) -> Tensor:
    """Scores from 0; each step one size k, log-uniform from `smallest` of the nodes to all, and the mask `sigmoid((score - tau) / T)` that
    sums to k. The gradient goes through tau too."""
    here, generator = _on_logit_diff(land), torch.Generator().manual_seed(seed)
    scores = torch.zeros(here.n, device=here.device, requires_grad=True)
    optimizer, low, high = torch.optim.Adam([scores], lr=lr), math.log(max(smallest * here.n, 1)), math.log(here.n * (1 - 1e-4))
    for step in range(steps):
        size = torch.exp(low + (high - low) * torch.rand(1, generator=generator)).to(here.device)
        mask = soft_top(scores.detach(), size, temperature)
        scores.grad = through_threshold(mask, _mean_gradient(here, mask, step, step_prompts, generator)) / temperature
        optimizer.step()
    return scores.detach()


def soft_top(scores: Tensor, size: Tensor, temperature: float) -> Tensor:
    """The soft mask [node] of a size [1]."""
    return torch.sigmoid((scores - thresholds(scores, size, temperature)) / temperature)


def through_threshold(mask: Tensor, grad: Tensor) -> Tensor:
    """The gradient to score / T from that to the mask, the mask's sum held fixed."""
    window = mask * (1 - mask)
    return window * (grad - (window * grad).sum() / window.sum().clamp(min=1e-12))


def hard_concrete(land: Landscape, *, steps: int = STEPS[HARD_CONCRETE], step_prompts: int = 16, sparsity: float = 0.5, start: float = 2.0,
                  lr: float = 0.1, seed: int = 0) -> Tensor:
    """Hard concrete gates, one draw a step; the loss is minus the logit difference + `sparsity` * mean P(open). The score is log_alpha."""
    here, generator = _on_logit_diff(land), torch.Generator().manual_seed(seed)
    log_alpha = torch.full((here.n,), start, device=here.device, requires_grad=True)
    optimizer = torch.optim.Adam([log_alpha], lr=lr)
    for step in range(steps):
        u = torch.rand(here.n, generator=generator).clamp(1e-6, 1 - 1e-6).to(here.device)
        soft = torch.sigmoid((torch.logit(u) + log_alpha) / BETA)
        mask = (soft * (ZETA - GAMMA) + GAMMA).clamp(0, 1)
        grad = _mean_gradient(here, mask.detach(), step, step_prompts, generator)
        opened = torch.sigmoid(log_alpha - BETA * math.log(-GAMMA / ZETA)).mean()
        optimizer.zero_grad()
        ((mask * grad).sum() + sparsity * opened).backward()
        optimizer.step()
    return log_alpha.detach()


def _on_logit_diff(land: Landscape) -> Landscape:
    return Landscape(land.space, land.reference, baselines.lost_logit_diff)


def _mean_gradient(land: Landscape, mask: Tensor, step: int, step_prompts: int, generator: torch.Generator) -> Tensor:
    """The loss' gradient to one mask [node], mean over prompts sampled at random."""
    rows = torch.randperm(land.n_prompts, generator=generator)[:step_prompts]
    return land.gradient(mask.expand(len(rows), -1), rows, step)[1].mean(0)


TRAINED = {MATRYOSHKA: matryoshka, HARD_CONCRETE: hard_concrete}
