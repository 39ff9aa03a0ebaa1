"""Many circuits on the same prompts: several in one forward, one row per circuit and prompt."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from tl_nodeprune.circuit import Circuit
from tl_nodeprune.masks import Ablation, Reference, kl_divergence
from tl_nodeprune.nodes import NodeSpace, check_finite, rounding
from tl_nodeprune.prompts import PromptPairs


@dataclass(frozen=True, eq=False)
class Scores:
    """What circuits do on each prompt, at the answer position. score: answer logit - wrong logit; kl: KL(full || circuit), nats;
    agrees: the full model's most likely token is theirs too."""

    score: Float[Tensor, "circuit prompt"]
    kl: Float[Tensor, "circuit prompt"]
    agrees: Bool[Tensor, "circuit prompt"]

    def __len__(self) -> int:
        return len(self.score)

    def split(self, *sizes: int) -> list[Scores]:
        """The circuits in consecutive parts."""
        return [Scores(*part) for part in zip(*(t.split(list(sizes)) for t in (self.score, self.kl, self.agrees)), strict=True)]


class Runs:
    """A model, prompts and an ablation; calling it with circuits over one space runs them. The full model runs once, here.

    batch_size: rows (circuit and prompt) per forward: memory, not result. No mask may be active on the model while it is used.
    Raises: ValueError where the ablation was not fitted; FloatingPointError for NaN or inf logits.
    """

    def __init__(self, model: Any, prompts: PromptPairs, space: NodeSpace, ablation: Ablation, *, batch_size: int = 64,
                 progress: bool = False) -> None:
        self.model, self.space, self.batch_size, self.progress = model, space, batch_size, progress
        self.reference = Reference(model, prompts, ablation, space.hooks, batch_size=batch_size)

    @property
    def full(self) -> Scores:
        """The full model's own scores, as one circuit."""
        full = self.reference.full
        return _scores(full, full, self.reference.prompts, 1)

    @property
    def resolution(self) -> float:
        """Differences of scores up to this, logits, are `rounding`."""
        return rounding(self.model, self.full.score)

    def __call__(self, circuits: Iterable[Circuit], *, total: int | None = None, desc: str = "circuits") -> Scores:
        """Run circuits, in order. total, desc: for the progress bar."""
        several, found = max(1, self.batch_size // len(self.reference.prompts)), []
        with torch.no_grad(), tqdm(total=total, desc=desc, disable=not self.progress, leave=False) as bar:
            for group in _groups(circuits, several):
                found.append(self._run(group))
                bar.update(len(group))
        none = torch.zeros(0, len(self.reference.prompts), dtype=torch.float32)
        parts = found or [Scores(none, none, none.bool())]
        return Scores(*(torch.cat([getattr(part, name) for part in parts]) for name in ("score", "kl", "agrees")))

    def _run(self, circuits: Sequence[Circuit]) -> Scores:
        n, logits = len(self.reference.prompts), []
        masks = {hook: _per_row(torch.stack([circuit[hook] for circuit in circuits])) for hook in self.space.hooks}
        masks = {hook: mask.to(self.reference.full.device) for hook, mask in masks.items()}
        for chunk in self.reference.chunks(torch.arange(len(circuits) * n)):
            rows, which = chunk % n, (chunk // n).to(self.reference.full.device)
            logits.append(self.reference.logits(rows, {hook: mask[which] for hook, mask in masks.items()}))
        found = torch.cat(logits)
        return _scores(found, self.reference.full, self.reference.prompts, len(circuits))


def _groups(circuits: Iterable[Circuit], several: int) -> Iterator[list[Circuit]]:
    source = iter(circuits)
    while group := list(islice(source, several)):
        yield group


def _per_row(masks: Tensor) -> Tensor:
    """Masks [circuit ...] with a dim for the position, and at least one after it."""
    return masks.view(len(masks), 1, *(masks.shape[1:] or (1,)))


def _scores(logits: Tensor, full: Tensor, prompts: PromptPairs, circuits: int) -> Scores:
    n, rows = len(prompts), torch.arange(len(logits)) % len(prompts)
    full = full[rows.to(full.device)]
    with torch.no_grad():
        score, kl = torch.cat([prompts.logit_diff(part) for part in logits.split(n)]), kl_divergence(logits, full)
    check_finite(kl, "the KL of a circuit")
    agrees = logits.argmax(-1) == full.argmax(-1)
    return Scores(*(value.view(circuits, n).cpu() for value in (score, kl, agrees)))
