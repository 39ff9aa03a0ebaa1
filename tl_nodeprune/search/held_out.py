"""The prompts that are never searched on, and what they say of a circuit."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats
from torch import Tensor

from tl_nodeprune.prompts import PromptPairs, by_prompt

HELD_SHARE, ENOUGH_HELD, ENOUGH = 0.25, 8, 24  # of the different prompts; how many held out can tell; from how many on so many are
LEVEL, SLACK, RESAMPLES = 0.9, 1.25, 2000  # of the interval; its upper end over the budget, at most


def set_aside(prompts: PromptPairs, held_out: PromptPairs | None, seed: int) -> tuple[PromptPairs, PromptPairs]:
    """The prompts to search on, and those to judge on: the ones given, or a quarter, at least 8 where there are 24 different ones.

    Raises: ValueError where there are fewer than 2 different prompts to split, or some of `held_out` are searched on.
    """
    n = int(prompts.distinct().max()) + 1
    if held_out is not None:
        searched = set(_rows(prompts))
        if both := sum(row in searched for row in _rows(held_out)):
            raise ValueError(f"{both} of the {len(held_out)} prompts of held_out are searched on too; hold out others.")
        return prompts, held_out
    if n < 2:
        raise ValueError(f"all {len(prompts)} prompts have the same clean prompt: none can be held out to judge the circuit by. Give 2 "
                         f"different ones or more ({ENOUGH} may be enough to tell), or others as held_out.")
    aside = max(round(HELD_SHARE * n), ENOUGH_HELD if n >= ENOUGH else 1)
    return prompts.split(1 - aside / n, seed)


@dataclass(frozen=True)
class HeldOut:
    """A circuit's loss on prompts that were not searched on. kl: mean; low, high: ends of a 90 % bootstrap interval over the different
    prompts (NaN for fewer than 2); accuracy: share of prompts with the answer preferred; n: different prompts."""

    kl: float
    low: float
    high: float
    accuracy: float
    n: int

    @classmethod
    def of(cls, losses: Tensor, right: Tensor, pairs: Tensor) -> HeldOut:
        """losses, right [prompt] of one circuit; pairs: see `Sample`."""
        means, kl = by_prompt(pairs, losses), float(losses.mean())
        low, high = _interval(means)
        return cls(kl, low, high, float(right.float().mean()), len(means))

    def meets(self, budget: float) -> bool | None:
        """Whether the loss is within the budget: False where its mean is above it; None where the prompts are too few to tell, or the
        interval reaches beyond 1.25 times the budget."""
        if not self.kl <= budget:
            return False
        return True if self.n >= ENOUGH_HELD and self.high <= SLACK * budget else None

    def needed(self, budget: float) -> int:
        """About how many different prompts held out would tell."""
        wide, room = self.high - self.kl, SLACK * budget - self.kl
        return max(ENOUGH_HELD, self.n + 1, math.ceil(self.n * (wide / max(room, 1e-9)) ** 2) if math.isfinite(wide) else 0)


def _interval(means: Any) -> tuple[float, float]:
    if len(means) < 2 or np.ptp(means) == 0:
        return (float(means[0]), float(means[0])) if len(means) > 1 else (math.nan, math.nan)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        found = stats.bootstrap((means,), np.mean, confidence_level=LEVEL, n_resamples=RESAMPLES, method="BCa", rng=0).confidence_interval
    return float(found.low), float(found.high)


def _rows(prompts: PromptPairs) -> list[tuple[int, ...]]:
    assert prompts.attention_mask is not None
    return [tuple(row[mask].tolist()) for row, mask in zip(prompts.clean, prompts.attention_mask, strict=True)]
