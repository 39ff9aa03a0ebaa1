"""Losses of a circuit's answer logits against the full model's: KL and what is asked for beside it."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import relu

from tl_nodeprune.nodes import check_types
from tl_nodeprune.prompts import PromptPairs

LossFn = Callable[[Tensor, Tensor, PromptPairs], Tensor]
"""fn(circuit_logits [batch d_vocab], full_logits [batch d_vocab], prompts) -> [batch], lower is better."""


def kl_divergence(logits: Float[Tensor, "batch d_vocab"], full: Float[Tensor, "batch d_vocab"],
                  prompts: PromptPairs | None = None) -> Float[Tensor, "batch"]:
    """KL(full || circuit) in nats, summed over the vocabulary, at the answer positions.

    `0 * log 0 = 0`: a token with a logit of -inf in both, which never occurs, adds nothing.
    Raises: ValueError for logits that are not of one shape.
    """
    check_types(kl_divergence, locals())
    _check_alike(logits, full)
    target, log_q = full.log_softmax(-1), logits.log_softmax(-1)
    p = target.exp()
    return (p * (target - log_q).masked_fill(p == 0, 0)).sum(-1)


def distance(logits: Float[Tensor, "batch d_vocab"], full: Float[Tensor, "batch d_vocab"], prompts: PromptPairs) -> Float[Tensor, "batch"]:
    """A loss for `rank` that leads to a low CMD: `(d_circuit - d_full)^2`, d the logit difference; logits squared."""
    check_types(distance, locals())
    _check_alike(logits, full)
    return (prompts.logit_diff(logits) - prompts.logit_diff(full)).pow(2)


def shortfall(logits: Float[Tensor, "batch d_vocab"], full: Float[Tensor, "batch d_vocab"], prompts: PromptPairs) -> Float[Tensor, "batch"]:
    """A loss for `rank` that leads to a high CPR: `d_full - d_circuit`, d the logit difference; logits."""
    check_types(shortfall, locals())
    _check_alike(logits, full)
    return prompts.logit_diff(full) - prompts.logit_diff(logits)


def choice_hinge(logits: Tensor, full: Tensor, prompts: PromptPairs) -> Tensor:
    """How far the circuit is from choosing between answer and wrong answer as clearly as wanted: [batch], logits.

    `relu(clip(|d| / 2, 1, 2) - sign(d) * d_circuit)` with d the full model's logit difference: half its margin will do, but where
    that is thin, 1 is asked for, since a choice that hangs on less is lost on fresh prompts.
    """
    wanted = prompts.logit_diff(full)
    return relu((wanted.abs() / 2).clamp(1, 2) - wanted.sign() * prompts.logit_diff(logits))


def _check_alike(logits: Tensor, full: Tensor) -> None:
    if logits.shape != full.shape or not logits.numel() or not (logits.is_floating_point() and full.is_floating_point()):
        raise ValueError(f"logits are {logits.dtype} {tuple(logits.shape)} and full {full.dtype} {tuple(full.shape)}; they must be floats "
                         "of one shape [batch d_vocab].")
