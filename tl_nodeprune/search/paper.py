"""The paper's own objective, run as it is, for comparison."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import relu

from tl_nodeprune.masks import HardConcrete, NodeMasks, Reference, kl_divergence
from tl_nodeprune.nodes import GRANULARITIES, check_counts, check_logits, check_number, check_types
from tl_nodeprune.prompts import PromptPairs


@dataclass(frozen=True)
class PaperObjective:
    """The objective of Multi-Granular Node Pruning, v2 (arXiv:2512.10903), for comparison.

    `(1 - lam) * (KL(full || circuit) + hinge) + lam * sparsity`; sparsity is the mean over gate tensors (`summed`: the sum) of
    `weight[granularity] * mean P(open)`; straight-through hard concrete gates, scores from U(2.5, 3.5), lam warmed up
    linearly, AdamW with weight decay on the scores too, cosine per epoch to 1e-4, gradient norm clipped; kept iff score > 0.

    lam: 0 to 1. weights: per granularity, 1 where not given. hinge: target of the logit difference; None: no hinge
        (the paper: 4 for IOI, 0.1 for gendered pronoun, none for greater-than). summed: as the authors' code for Llama has it, where lam
        weighs as many times more as there are gate tensors; their code for GPT-2 takes the mean. steps: optimiser steps in all.
        warmup: those over which lam grows from 0.

    Raises: ValueError for lam out of range, weights of unknown granularities, steps or batch_size below 1.
    """

    lam: float = 0.95
    steps: int = 1500
    batch_size: int = 32
    lr: float = 3e-2
    lr_end: float = 1e-4
    warmup: int = 1000
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    hinge: float | None = None
    summed: bool = False
    weights: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_types(PaperObjective, vars(self))
        if not 0 <= self.lam <= 1:
            raise ValueError(f"lam={self.lam}; the paper's coefficient lies between 0 and 1.")
        unknown = set(self.weights) - set(GRANULARITIES)
        if unknown:
            raise ValueError(f"weights for unknown granularities {sorted(unknown)}; allowed: {', '.join(GRANULARITIES)}.")
        check_counts(steps=self.steps, batch_size=self.batch_size)
        numbers = {name: getattr(self, name) for name in ("lr", "lr_end", "warmup", "weight_decay", "max_grad_norm")}
        for name, value in (numbers | {f"weights[{name!r}]": weight for name, weight in self.weights.items()}).items():
            check_number(name, value)
            if not 0 <= value < math.inf:
                raise ValueError(f"{name}={value!r}; it must be a finite number, 0 or more.")
        if self.hinge is not None and not math.isfinite(self.hinge):
            raise ValueError(f"hinge={self.hinge}; it must be a finite number of logits, or None.")

    def train(self, masks: NodeMasks, reference: Reference, generator: torch.Generator,
              record: Callable[[int, float, int, float], None], over: Callable[[], bool] = lambda: False) -> None:
        """Run the objective on attached masks, until time is `over` at the latest. `record(step, kl, live nodes, lam)` hears of each."""
        masks.gate = HardConcrete(straight_through=True)
        with torch.no_grad():
            for score in masks.parameters():
                score.copy_(2.5 + torch.rand(score.shape, generator=generator, dtype=torch.float32))
        optimizer = torch.optim.AdamW(masks.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        n = len(reference.prompts)
        per_epoch = math.ceil(n / self.batch_size)
        order: list[Tensor] = []
        for step in range(self.steps):
            if over():
                break
            if not order:
                order = list(torch.randperm(n, generator=generator).split(self.batch_size))
                self._set_rate(optimizer, (step // per_epoch) * per_epoch / self.steps)
            rows, lam = order.pop(), self.lam * min(1.0, (step + 1) / max(self.warmup, 1))
            with masks.inactive():
                stand_ins = reference.stand_ins(rows)
            with masks.sampling(generator), masks.standing_in(stand_ins):
                logits = reference.logits(rows)
            check_logits(logits, f"the circuit at step {step}")
            kl = kl_divergence(logits, reference.full[rows.to(reference.full.device)]).mean()
            loss = (1 - lam) * (kl + self._hinge(logits, reference.prompts[rows])) + lam * self.sparsity(masks)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(masks.parameters(), self.max_grad_norm)
            optimizer.step()
            record(step, kl.item(), int(sum((score > 0).sum() for score in masks.parameters())), lam)

    def sparsity(self, masks: NodeMasks) -> Tensor:
        """Mean (or sum) over gate tensors of `weight * mean P(open)`: scalar; the mean is 0 to 1 with all weights 1."""
        shares = [self.weights.get(key.granularity, 1.0) * masks.gate.probability(masks.score(key)).mean() for key in masks.space.shapes]
        return torch.stack(shares).sum() if self.summed else torch.stack(shares).mean()

    def _hinge(self, logits: Tensor, prompts: PromptPairs) -> Tensor | float:
        return 0.0 if self.hinge is None else relu(self.hinge - prompts.logit_diff(logits)).mean()

    def _set_rate(self, optimizer: torch.optim.Optimizer, done: float) -> None:
        """Cosine from lr to lr_end over the share of steps done, changed once per epoch."""
        for group in optimizer.param_groups:
            group["lr"] = self.lr_end + (self.lr - self.lr_end) * (1 + math.cos(math.pi * done)) / 2
