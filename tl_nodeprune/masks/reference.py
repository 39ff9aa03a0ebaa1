"""The full model on prompts, computed once: its answer logits, and what stands in for closed nodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tl_nodeprune.masks.ablation import Ablation
from tl_nodeprune.masks.masked_model import MaskedModel
from tl_nodeprune.nodes import can_slice, check_logits
from tl_nodeprune.prompts import PromptPairs, positions


class Reference(MaskedModel):
    """All that stays while masks are trained: the full model's answer logits, the stand-ins, the prompts.

    Made with the masks inactive. full: the full model's answer logits [prompt d_vocab] where they are known. Stand-ins are kept for as
    many prompts as `cache_bytes` has room for, and recomputed for the others, batch by batch.
    """

    def __init__(self, model: Any, prompts: PromptPairs, ablation: Ablation, hooks: Sequence[str], *, full: Tensor | None = None,
                 batch_size: int = 64, cache_bytes: int = 2 << 30) -> None:
        sliced = can_slice(model, prompts.clean, positions(prompts))
        super().__init__(model, prompts, ablation, hooks, batch_size=batch_size, sliced=sliced)
        self.full = self.all_logits(of="the full model") if full is None else full
        check_logits(self.full, "the full model")
        self.bytes_per_prompt = self._bytes_per_prompt()
        self.n_kept = min(len(prompts), cache_bytes // max(self.bytes_per_prompt, 1))
        keep = self.n_kept and ablation.name == "interchange"
        self._kept = ablation.values(model, prompts[: self.n_kept], hooks, batch_size=batch_size) if keep else {}

    def _bytes_per_prompt(self) -> int:
        if self.ablation.name != "interchange":
            return 0
        return sum(value.numel() * value.element_size() for value in super().stand_ins(torch.tensor([0])).values())

    def stand_ins(self, rows: Int[Tensor, "row"]) -> dict[str, Tensor]:
        """What closed nodes take on these prompts, by hook name."""
        if self.ablation.name != "interchange":
            return super().stand_ins(rows)
        missing = rows >= self.n_kept
        known = {hook: value[rows.clamp(max=self.n_kept - 1).to(value.device)] for hook, value in self._kept.items()}
        if not missing.any():
            return known
        found = super().stand_ins(rows[missing])
        if missing.all():
            return found
        return {hook: value.index_copy_(0, missing.nonzero()[:, 0].to(value.device), found[hook]) for hook, value in known.items()}
