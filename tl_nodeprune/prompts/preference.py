"""What the full model does on the pairs: whether it tells clean from corrupted at all, and whether the pairs work in both directions."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Float, Int
from scipy import stats
from torch import Tensor

from tl_nodeprune.nodes import answer_logits, can_slice
from tl_nodeprune.prompts.pairs import PromptPairs, positions

TURNED_SHARE = 0.5
TASK_LEVEL, FEWEST_PROMPTS = 0.01, 7  # of the test that there is a task; different prompts that it takes


@dataclass(frozen=True)
class Preference:
    """The full model's logit differences: of the answers on the clean prompts, and of the answers exchanged on the corrupted ones; and its
    answer logits there."""

    prompts: PromptPairs
    turned: PromptPairs
    clean: Float[Tensor, "batch"]
    corrupted: Float[Tensor, "batch"]
    logits: tuple[Float[Tensor, "batch d_vocab"], Float[Tensor, "batch d_vocab"]]

    @property
    def p_value(self) -> float:
        """One-sided Wilcoxon signed-rank test over the different clean prompts (the mean of pairs with the same one): does the model prefer
        the answer more on clean than on corrupted prompts? Where it does not, there is no task, and no circuit to claim. 1 where it makes
        no difference anywhere; NaN where there are no corrupted prompts (they are the clean ones) to compare with."""
        if not self.prompts.has_corrupted:
            return float("nan")
        means = by_prompt(self.prompts.distinct(), self.clean + self.corrupted)
        return float(stats.wilcoxon(means, alternative="greater").pvalue) if (means != 0).any() else 1.0

    @property
    def n_different(self) -> int:
        """How many different clean prompts there are."""
        return int(self.prompts.distinct().max()) + 1

    @property
    def no_task(self) -> bool:
        """Whether the pairs are enough to tell, and show no task."""
        return self.n_different >= FEWEST_PROMPTS and self.p_value > TASK_LEVEL

    @property
    def both_ways(self) -> bool:
        """Whether the corrupted prompts are prompts of the task themselves: the model prefers the wrong answer there, on average at least
        half as strongly as it prefers the answer on the clean ones."""
        enough = self.corrupted.mean() >= TURNED_SHARE * self.clean.mean() > 0
        return bool(enough) and self.prompts.answers.shape == self.prompts.wrong_answers.shape

    def sample(self, both_ways: bool) -> Sample:
        """The prompts as given, and both ways also the pairs turned round, where the model prefers the wrong answer."""
        pairs = self.prompts.distinct()
        also = (self.corrupted.cpu() > 0).nonzero()[:, 0]
        if not both_ways or not len(also):
            return Sample(self.prompts, pairs, self.logits[0])
        again = self.turned[also]
        both = {f.name: torch.cat([getattr(self.prompts, f.name), getattr(again, f.name)]) for f in fields(PromptPairs)}
        return Sample(PromptPairs(**both), torch.cat([pairs, pairs[also]]), torch.cat([self.logits[0], self.logits[1][also]]))


@dataclass(frozen=True)
class Sample:
    """Prompts, which different clean prompt each one is of (turned round, of the pair's), and the full model's answer logits."""

    prompts: PromptPairs
    pairs: Int[Tensor, "prompt"]
    full: Float[Tensor, "prompt d_vocab"]

    def some(self, most: int) -> Tensor:
        """At most so many of the prompts, spread over all: their indices."""
        n = len(self.prompts)
        return torch.arange(n) if n <= most else torch.linspace(0, n - 1, most, dtype=torch.float32).long()


def preference(model: Any, prompts: PromptPairs, batch_size: int) -> Preference:
    """Run the full model on both sides of the pairs. Raises FloatingPointError for NaN or inf."""
    turned = PromptPairs(prompts.corrupted, prompts.clean, prompts.wrong_answers, prompts.answers, prompts.attention_mask,
                         prompts.answer_positions)
    sliced = can_slice(model, prompts.clean, positions(prompts))
    with torch.no_grad():
        logits = [torch.cat([answer_logits(model, batch.clean, positions(batch), sliced) for batch in side.batches(batch_size)])
                  for side in (prompts, turned)]
        differences = [side.logit_diff(found) for side, found in zip((prompts, turned), logits, strict=True)]
    return Preference(prompts, turned, differences[0], differences[1], (logits[0], logits[1]))


def by_prompt(pairs: Int[Tensor, "prompt"], values: Float[Tensor, "prompt"]) -> Any:
    """The mean of values over each different pair, as a double array of numpy."""
    counts = pairs.bincount()
    return (torch.zeros(len(counts), dtype=torch.double).index_add_(0, pairs, values.double().cpu()) / counts).numpy()
