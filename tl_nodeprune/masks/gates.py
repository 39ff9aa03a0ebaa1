"""Gates: how a node's learnable score becomes a mask in [0, 1]. 1 = kept."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from tl_nodeprune.nodes import check_types


@runtime_checkable
class Gate(Protocol):
    """How scores become masks. Each function is elementwise, differentiable, and keeps the shape."""

    open_score: float
    """A score whose mask is exactly 1."""
    closed_score: float
    """A score whose mask is exactly 0."""

    def value(self, score: Tensor) -> Tensor:
        """The deterministic mask."""

    def sample(self, score: Tensor, generator: torch.Generator | None) -> Tensor:
        """A random mask, one draw per element."""

    def probability(self, score: Tensor) -> Tensor:
        """P(mask > 0), the share of draws in which the node is open."""

    def kept(self, score: Tensor) -> Tensor:
        """Whether the node is kept when the mask is made binary: bool."""


@dataclass(frozen=True)
class HardConcrete:
    """Hard concrete gate, Louizos et al. 2018 (arXiv:1712.01312).

    `s = sigmoid((logit(u) + score) / beta)`, `mask = clip(gamma + (zeta - gamma) * s, 0, 1)`, u ~ U(0, 1); the
    deterministic mask is the same with beta = 1 and u = 1/2. Kept if score > 0.

    straight_through: draws are binary (mask > 0.5) and the gradient is the soft mask's (arXiv:2512.10903 v2).

    Raises: ValueError for a beta or zeta that is not above 0, a gamma not below 0, and scores that do not give masks of 1 and 0.
    """

    beta: float = 2 / 3
    gamma: float = -0.1
    zeta: float = 1.1
    straight_through: bool = False
    open_score: float = 3.0
    closed_score: float = -3.0

    def __post_init__(self) -> None:
        check_types(HardConcrete, vars(self))
        numbers = (self.beta, self.gamma, self.zeta, self.open_score, self.closed_score)
        if not all(map(math.isfinite, numbers)) or not self.gamma < 0 < min(self.beta, self.zeta):
            raise ValueError(f"beta={self.beta}, gamma={self.gamma}, zeta={self.zeta}, open_score={self.open_score}, "
                             f"closed_score={self.closed_score}; all must be finite, beta and zeta above 0, gamma below 0.")
        ends = [float(self.value(torch.tensor(score, dtype=torch.float32))) for score in (self.open_score, self.closed_score)]
        if ends != [1.0, 0.0]:
            raise ValueError(f"open_score={self.open_score} and closed_score={self.closed_score} give masks of {ends[0]:.3g} and "
                             f"{ends[1]:.3g} with gamma={self.gamma}, zeta={self.zeta}; they must give 1 and 0.")

    def value(self, score: Tensor) -> Tensor:
        return self._stretch(torch.sigmoid(score))

    def sample(self, score: Tensor, generator: torch.Generator | None) -> Tensor:
        uniform = torch.rand(score.shape, generator=generator, device=generator.device if generator else score.device, dtype=torch.float32)
        uniform = uniform.to(score).clamp(1e-6, 1 - 1e-6)
        soft = self._stretch(torch.sigmoid((torch.logit(uniform) + score) / self.beta))
        return _straight_through(soft > 0.5, soft) if self.straight_through else soft

    def probability(self, score: Tensor) -> Tensor:
        return torch.sigmoid(score - self.beta * math.log(-self.gamma / self.zeta))

    def kept(self, score: Tensor) -> Tensor:
        return score > 0

    def _stretch(self, s: Tensor) -> Tensor:
        return (self.gamma + (self.zeta - self.gamma) * s).clamp(0, 1)


@dataclass(frozen=True)
class Step:
    """Step gate: `mask = 1 if score > 0 else 0`, with the gradient of `sigmoid(score / width)`. Draws are not random.

    What is trained is then what is kept: there is no gap between the soft and the thresholded circuit.
    """

    width: float = 0.5
    open_score: float = 1.0
    closed_score: float = -1.0

    def __post_init__(self) -> None:
        check_types(Step, vars(self))
        if not 0 < self.width < math.inf:
            raise ValueError(f"width={self.width}; it must be a finite number above 0.")
        if not -math.inf < self.closed_score <= 0 < self.open_score < math.inf:
            raise ValueError(f"open_score={self.open_score} and closed_score={self.closed_score}; the first must "
                             "be above 0, the second not.")

    def value(self, score: Tensor) -> Tensor:
        return _straight_through(score > 0, torch.sigmoid(score / self.width))

    def sample(self, score: Tensor, generator: torch.Generator | None) -> Tensor:
        return self.value(score)

    def probability(self, score: Tensor) -> Tensor:
        return self.value(score)

    def kept(self, score: Tensor) -> Tensor:
        return score > 0


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, hard: Tensor, soft: Tensor) -> Tensor:
        return hard.to(soft)

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> tuple[None, Tensor]:
        return None, grads[0]


def _straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """`hard` (exactly) forward, the gradient of `soft` backward."""
    return _StraightThrough.apply(hard, soft)  # type: ignore[no-any-return]
