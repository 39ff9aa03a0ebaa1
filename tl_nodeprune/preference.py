"""What the full model does on the pairs: whether it tells clean from corrupted at all, and whether the pairs work both ways round."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Float, Int
from scipy import stats
from torch import Tensor

from tl_nodeprune.circuit import full_logits
from tl_nodeprune.objective import check_finite
from tl_nodeprune.prompts import PromptPairs

GIVEN, TURNED = 0, 1  # groups of prompts
TURNED_SHARE = 0.5
SIGNIFICANT, FEWEST = 0.01, 7


@dataclass(frozen=True)
class Preference:
    """The full model's logit differences: of the answers on the clean prompts, and of the answers exchanged on the corrupted ones."""

    prompts: PromptPairs
    turned: PromptPairs
    clean: Float[Tensor, "batch"]
    corrupted: Float[Tensor, "batch"]

    @property
    def p_value(self) -> float:
        """One-sided Wilcoxon signed-rank test over the different clean prompts (the mean of pairs with the same one): does the model prefer
        the answer more on clean than on corrupted prompts? Where it does not, there is no task, and no circuit to claim. 1 where it makes
        no difference anywhere; NaN where there are no corrupted prompts (they are the clean ones) to compare with."""
        if not self.prompts.has_corrupted:
            return float("nan")
        which, gains = self.prompts.distinct(), (self.clean + self.corrupted).double().cpu()
        means = (torch.zeros(self.n_different, dtype=torch.double).index_add_(0, which, gains) / which.bincount()).numpy()
        return float(stats.wilcoxon(means, alternative="greater").pvalue) if (means != 0).any() else 1.0

    @property
    def n_different(self) -> int:
        """How many different clean prompts there are."""
        return int(self.prompts.distinct().max()) + 1

    @property
    def no_task(self) -> bool:
        """Whether the pairs are enough to tell, and show no task."""
        return self.n_different >= FEWEST and self.p_value > SIGNIFICANT

    def sample(self) -> Sample:
        """The prompts to search on: those GIVEN, and TURNED ones where the model prefers the wrong answer on the corrupted prompt, if
        it does so on average at least half as strongly as it prefers the answer on the clean one: only then the corrupted
        prompts are prompts of the task themselves."""
        pairs = self.prompts.distinct()
        enough = self.corrupted.mean() >= TURNED_SHARE * self.clean.mean() > 0
        if not enough or self.prompts.answers.shape != self.prompts.wrong_answers.shape:
            return Sample(self.prompts, torch.full_like(pairs, GIVEN), pairs)
        also = (self.corrupted.cpu() > 0).nonzero()[:, 0]
        again = self.turned[also]
        both = {f.name: torch.cat([getattr(self.prompts, f.name), getattr(again, f.name)]) for f in fields(PromptPairs)}
        groups = torch.cat([torch.full_like(pairs, GIVEN), torch.full_like(also, TURNED)])
        return Sample(PromptPairs(**both), groups, torch.cat([pairs, pairs[also]]))


@dataclass(frozen=True)
class Sample:
    """Prompts to search on, each one's group (GIVEN or TURNED) and which pair it is of, pairs with one clean prompt being one."""

    prompts: PromptPairs
    groups: Int[Tensor, "prompt"]
    pairs: Int[Tensor, "prompt"]

    @classmethod
    def of(cls, prompts: PromptPairs) -> Sample:
        """All prompts as given."""
        return cls(prompts, torch.full((len(prompts),), GIVEN), prompts.distinct())

    def folds(self, n: int, generator: torch.Generator) -> Iterator[tuple[Int[Tensor, "a"], Int[Tensor, "b"]]]:
        """The indices of the prompts n times over in two sets of whole pairs; each pair is once in the second."""
        fold = torch.randperm(int(self.pairs.max()) + 1, generator=generator) % n
        for i in range(n):
            held = (fold == i)[self.pairs]
            yield (~held).nonzero()[:, 0], held.nonzero()[:, 0]


def preference(model: Any, prompts: PromptPairs, batch_size: int) -> Preference:
    """Run the full model on both sides of the pairs. Raises FloatingPointError for NaN or inf."""
    turned = PromptPairs(prompts.corrupted, prompts.clean, prompts.wrong_answers, prompts.answers, prompts.attention_mask,
                         prompts.answer_positions)
    clean, corrupted = (torch.cat([batch.logit_diff(full_logits(model, batch)) for batch in side.batches(batch_size)])
                        for side in (prompts, turned))
    check_finite(torch.stack([clean, corrupted]), "the full model")
    return Preference(prompts, turned, clean, corrupted)
