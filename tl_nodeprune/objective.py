"""What the search optimises: the loss against the full model, computed once where it can be, and the paper's objective."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import relu

from tl_nodeprune.checks import check_counts
from tl_nodeprune.gates import HardConcrete
from tl_nodeprune.hooks import answer_logits
from tl_nodeprune.nodes import GRANULARITIES
from tl_nodeprune.probe import can_slice
from tl_nodeprune.prompts import PromptPairs

if TYPE_CHECKING:
    from tl_nodeprune.ablation import Ablation
    from tl_nodeprune.masks import NodeMasks

LossFn = Callable[[Tensor, Tensor, PromptPairs], Tensor]
"""fn(circuit_logits [batch d_vocab], full_logits [batch d_vocab], prompts) -> [batch], lower is better."""


def kl_divergence(logits: Float[Tensor, "batch d_vocab"], full: Float[Tensor, "batch d_vocab"],
                  prompts: PromptPairs | None = None) -> Float[Tensor, "batch"]:
    """KL(full || circuit) in nats, summed over the vocabulary, at the answer positions."""
    target, log_q = full.log_softmax(-1), logits.log_softmax(-1)
    return (target.exp() * (target - log_q)).sum(-1)


def distance(logits: Float[Tensor, "batch d_vocab"], full: Float[Tensor, "batch d_vocab"], prompts: PromptPairs) -> Float[Tensor, "batch"]:
    """A loss for `rank` that leads to a low CMD: `(d_circuit - d_full)^2`, d the logit difference; logits squared."""
    return (prompts.logit_diff(logits) - prompts.logit_diff(full)).pow(2)


def shortfall(logits: Float[Tensor, "batch d_vocab"], full: Float[Tensor, "batch d_vocab"], prompts: PromptPairs) -> Float[Tensor, "batch"]:
    """A loss for `rank` that leads to a high CPR: `d_full - d_circuit`, d the logit difference; logits."""
    return prompts.logit_diff(full) - prompts.logit_diff(logits)


def choice_hinge(logits: Tensor, full: Tensor, prompts: PromptPairs) -> Tensor:
    """How far the circuit is from choosing between answer and wrong answer as clearly as wanted: [batch], logits.

    `relu(clip(|d| / 2, 1, 2) - sign(d) * d_circuit)` with d the full model's logit difference: half its margin will do, but where
    that is thin, 1 is asked for, since a choice that hangs on less is lost on fresh prompts.
    """
    wanted = prompts.logit_diff(full)
    return relu((wanted.abs() / 2).clamp(1, 2) - wanted.sign() * prompts.logit_diff(logits))


def fisher_probes(logits: Float[Tensor, "batch d_vocab"], generator: torch.Generator | None = None, *, exact: int = 6,
                  random: int = 2) -> list[Tensor]:
    """Directions v in logit space [batch d_vocab] with `sum v v^T ~ diag(q) - q q^T`, the Hessian of KL(p || q) in the logits of q.

    The `exact` likeliest tokens have `sqrt(q_i) (e_i - q)` each, all others together `random` unbiased draws of random signs.
    """
    q = logits.softmax(-1)
    top = q.topk(min(exact, q.shape[-1]), dim=-1).indices
    basis = [torch.zeros_like(q).scatter_(1, i[:, None], q.gather(1, i[:, None]).sqrt()) for i in top.T]
    rest = q.scatter(1, top, 0.0).sqrt() / random**0.5
    signs = (torch.randint(0, 2, q.shape, generator=generator).to(q) * 2 - 1 for _ in range(random))
    return [w - q * (w.sum(-1, keepdim=True)) for w in (*basis, *(rest * sign for sign in signs))]


class Reference:
    """All that does not change while masks are trained: the full model's answer logits, the stand-ins, the prompts.

    Made with the masks inactive. Stand-ins above `cache_bytes` are recomputed for each batch instead of kept.
    """

    def __init__(self, model: Any, prompts: PromptPairs, ablation: Ablation, hooks: tuple[str, ...], *,
                 batch_size: int = 64, cache_bytes: int = 2 << 30) -> None:
        self.model, self.prompts, self.ablation, self.hooks, self.batch_size = model, prompts, ablation, hooks, batch_size
        self.sliced = can_slice(model, prompts.clean, positions(prompts))
        with torch.no_grad():
            self.full = torch.cat([self.logits(prompts[rows]) for rows in self.chunks(torch.arange(len(prompts)))])
        check_finite(self.full, "the full model")
        first = ablation.values(model, prompts[:1], hooks)
        per_prompt = sum(v.numel() * v.element_size() for v in first.values()) if ablation.name == "interchange" else 0
        keep = per_prompt * len(prompts) <= cache_bytes
        self._kept = ablation.values(model, prompts, hooks, batch_size=batch_size) if keep else None

    def logits(self, prompts: PromptPairs) -> Tensor:
        """The model's logits at the answer positions under whatever hooks are on it: [batch d_vocab]."""
        return answer_logits(self.model, prompts.clean, positions(prompts), sliced=self.sliced)

    def chunks(self, rows: Tensor) -> Iterator[Tensor]:
        """Prompt indices in pieces of the batch size."""
        yield from rows.split(self.batch_size)

    def stand_ins(self, rows: Tensor) -> dict[str, Tensor]:
        """What closed nodes take on these prompts, by hook name."""
        if self._kept is None:
            return self.ablation.values(self.model, self.prompts[rows], self.hooks)
        if self.ablation.name != "interchange" or torch.equal(rows, torch.arange(len(self.prompts))):
            return self._kept
        return {hook: value[rows.to(value.device)] for hook, value in self._kept.items()}


def positions(prompts: PromptPairs) -> Tensor:
    """The answer positions, which PromptPairs always fills in."""
    assert prompts.answer_positions is not None
    return prompts.answer_positions


def check_finite(logits: Tensor, where: str) -> None:
    """Raises FloatingPointError that says whose logits hold a NaN or inf."""
    if not torch.isfinite(logits).all():
        raise FloatingPointError(f"NaN or inf in the logits of {where}; nothing was changed. In half precision try float32, "
                                 "and check that the model runs on these prompts.")


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
        if not 0 <= self.lam <= 1:
            raise ValueError(f"lam={self.lam}; the paper's coefficient lies between 0 and 1.")
        unknown = set(self.weights) - set(GRANULARITIES)
        if unknown:
            raise ValueError(f"weights for unknown granularities {sorted(unknown)}; allowed: {', '.join(GRANULARITIES)}.")
        check_counts(steps=self.steps, batch_size=self.batch_size)

    def train(self, masks: NodeMasks, reference: Reference, generator: torch.Generator,
              record: Callable[[int, float, int, float], None]) -> None:
        """Run the objective on attached masks; `record(step, kl, live nodes, lam)` hears of each step."""
        masks.gate = HardConcrete(straight_through=True)
        with torch.no_grad():
            for score in masks.parameters():
                score.copy_(2.5 + torch.rand(score.shape, generator=generator))
        optimizer = torch.optim.AdamW(masks.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        n = len(reference.prompts)
        per_epoch = math.ceil(n / self.batch_size)
        order: list[Tensor] = []
        for step in range(self.steps):
            if not order:
                order = list(torch.randperm(n, generator=generator).split(self.batch_size))
                self._set_rate(optimizer, (step // per_epoch) * per_epoch / self.steps)
            rows, lam = order.pop(), self.lam * min(1.0, (step + 1) / max(self.warmup, 1))
            with masks.inactive():
                stand_ins = reference.stand_ins(rows)
            with masks.sampling(generator), masks.standing_in(stand_ins):
                logits = reference.logits(reference.prompts[rows])
            check_finite(logits, f"the circuit at step {step}")
            kl = kl_divergence(logits, reference.full[rows]).mean()
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
