"""The full model on prompts, computed once: its answer logits, and what stands in for closed nodes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tl_nodeprune.masks.ablation import Ablation
from tl_nodeprune.nodes.checks import check_logits
from tl_nodeprune.nodes.hooks import answer_logits
from tl_nodeprune.nodes.probe import can_slice
from tl_nodeprune.prompts.pairs import PromptPairs


class Reference:
    """All that stays while masks are trained: the full model's answer logits, the stand-ins, the prompts.

    Made with the masks inactive. full: the full model's answer logits [prompt d_vocab] where they are known. Stand-ins are kept for as
    many prompts as `cache_bytes` has room for, and recomputed for the others, batch by batch.
    """

    def __init__(self, model: Any, prompts: PromptPairs, ablation: Ablation, hooks: tuple[str, ...], *, full: Tensor | None = None,
                 batch_size: int = 64, cache_bytes: int = 2 << 30) -> None:
        self.model, self.prompts, self.ablation, self.hooks, self.batch_size = model, prompts, ablation, hooks, int(batch_size)
        self.sliced = can_slice(model, prompts.clean, positions(prompts))
        if full is None:
            with torch.no_grad():
                full = torch.cat([self.logits(prompts[rows], of="the full model") for rows in self.chunks(torch.arange(len(prompts)))])
        self.full = full
        check_logits(full, "the full model")
        self.bytes_per_prompt = self._bytes_per_prompt()
        self.n_kept = min(len(prompts), cache_bytes // max(self.bytes_per_prompt, 1))
        keep = self.n_kept and ablation.name == "interchange"
        self._kept = ablation.values(model, prompts[: self.n_kept], hooks, batch_size=batch_size) if keep else {}

    def _bytes_per_prompt(self) -> int:
        if self.ablation.name != "interchange":
            return 0
        one = self.ablation.values(self.model, self.prompts[:1], self.hooks)
        return sum(value.numel() * value.element_size() for value in one.values())

    def logits(self, prompts: PromptPairs, *, of: str = "the circuit") -> Tensor:
        """The model's logits at the answer positions under whatever hooks are on it: [batch d_vocab]."""
        return answer_logits(self.model, prompts.clean, positions(prompts), sliced=self.sliced, of=of)

    def chunks(self, rows: Tensor) -> Iterator[Tensor]:
        """Prompt indices in pieces of the batch size."""
        yield from rows.split(self.batch_size)

    def stand_ins(self, rows: Int[Tensor, "row"]) -> dict[str, Tensor]:
        """What closed nodes take on these prompts, by hook name."""
        if self.ablation.name != "interchange":
            return self.ablation.values(self.model, self.prompts[rows], self.hooks)
        missing = rows >= self.n_kept
        known = {hook: value[rows.clamp(max=self.n_kept - 1).to(value.device)] for hook, value in self._kept.items()}
        if not missing.any():
            return known
        found = self.ablation.values(self.model, self.prompts[rows[missing]], self.hooks, batch_size=self.batch_size)
        if missing.all():
            return found
        return {hook: value.index_copy_(0, missing.nonzero()[:, 0].to(value.device), found[hook]) for hook, value in known.items()}


def positions(prompts: PromptPairs) -> Tensor:
    """The answer positions, which PromptPairs always fills in."""
    assert prompts.answer_positions is not None
    return prompts.answer_positions
