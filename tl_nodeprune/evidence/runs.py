"""Many circuits on the same prompts: several in one forward, one row per circuit and prompt."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from tl_nodeprune.circuit import Circuit, PromptMetrics
from tl_nodeprune.masks import Ablation, Reference
from tl_nodeprune.nodes import NodeSpace, rounding
from tl_nodeprune.prompts import PromptPairs


class CircuitRuns:
    """A model, prompts and an ablation; calling it with circuits over one space runs them. The full model runs once, here.

    batch_size: rows (circuit and prompt) per forward: memory, not result. No mask may be active on the model while it is used.
    Raises: ValueError where the ablation was not fitted; FloatingPointError for NaN or inf logits.
    """

    def __init__(self, model: Any, prompts: PromptPairs, space: NodeSpace, ablation: Ablation, *, batch_size: int = 64,
                 progress: bool = False) -> None:
        self.model, self.space, self.batch_size, self.progress = model, space, batch_size, progress
        self.reference = Reference(model, prompts, ablation, space.hooks, batch_size=batch_size)

    @property
    def full(self) -> PromptMetrics:
        """The full model, as one circuit."""
        return PromptMetrics.of(self.reference.full, self.reference.full, self.reference.prompts)

    @property
    def resolution(self) -> float:
        """Logits: logit differences are equal where they differ by no more, since that is `rounding`."""
        return rounding(self.model, self.full.logit_diff)

    def __call__(self, circuits: Iterable[Circuit], *, total: int | None = None, desc: str = "circuits") -> PromptMetrics:
        """Run circuits, in order. total, desc: for the progress bar."""
        several, found = max(1, self.batch_size // len(self.reference.prompts)), []
        with torch.no_grad(), tqdm(total=total, desc=desc, disable=not self.progress, leave=False) as bar:
            for group in _groups(circuits, several):
                found.append(self._run(group))
                bar.update(len(group))
        none = torch.zeros(0, len(self.reference.prompts), dtype=torch.float32)
        parts = found or [PromptMetrics(none, none, none.bool())]
        return PromptMetrics(*(torch.cat([getattr(part, name) for part in parts]) for name in ("logit_diff", "kl", "agrees")))

    def _run(self, circuits: Sequence[Circuit]) -> PromptMetrics:
        n, logits = len(self.reference.prompts), []
        masks = {hook: _per_row(torch.stack([circuit[hook] for circuit in circuits])) for hook in self.space.hooks}
        masks = {hook: mask.to(self.reference.full.device) for hook, mask in masks.items()}
        for chunk in self.reference.chunks(torch.arange(len(circuits) * n)):
            rows, which = chunk % n, (chunk // n).to(self.reference.full.device)
            logits.append(self.reference.logits(rows, {hook: mask[which] for hook, mask in masks.items()}))
        return PromptMetrics.of(torch.cat(logits), self.reference.full, self.reference.prompts)


def _groups(circuits: Iterable[Circuit], several: int) -> Iterator[list[Circuit]]:
    source = iter(circuits)
    while group := list(islice(source, several)):
        yield group


def _per_row(masks: Tensor) -> Tensor:
    """Masks [circuit ...] with a dim for the position, and at least one after it."""
    return masks.view(len(masks), 1, *(masks.shape[1:] or (1,)))
