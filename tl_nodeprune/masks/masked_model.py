"""The model under masks: the one place where logits under masks are made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_nodeprune.masks.ablation import Ablation
from tl_nodeprune.nodes import HookFn, answer_logits, mask_hooks, temporary_hooks
from tl_nodeprune.prompts import PromptPairs, positions


class MaskedModel:
    """A model on prompts under masks by hook name, closed nodes taking their stand-ins from an ablation that is fitted.

    Used with no masks active on the model. hooks: where masks may be. batch_size: prompts per forward. sliced: whether the unembedding
    runs at the answer positions only, see `can_slice`.
    """

    def __init__(self, model: Any, prompts: PromptPairs, ablation: Ablation, hooks: Sequence[str], *, batch_size: int = 64,
                 sliced: bool = False) -> None:
        self.model, self.prompts, self.ablation, self.hooks = model, prompts, ablation, hooks
        self.batch_size, self.sliced = int(batch_size), sliced

    def logits(self, rows: Int[Tensor, "row"], masks: Mapping[str, Tensor] | None = None, stand_ins: Mapping[str, Tensor] | None = None, *,
               also: Sequence[tuple[str, HookFn]] = (), of: str = "the circuit") -> Float[Tensor, "row d_vocab"]:
        """Logits at the answer positions of some prompts, float32, under masks by hook name.

        masks: at each hook's own shape, or with the dims [row 1] before it, a mask to each prompt; None: the model as it is, with what is
        attached to it. stand_ins: None: those of the ablation. also: further hooks, which run after the masks. of: whose logits they are.
        """
        prompts, hooks = self.prompts[rows], list(also)
        if masks is not None:
            masks = {hook: mask.to(prompts.clean.device) for hook, mask in masks.items()}
            values = self.stand_ins(rows) if stand_ins is None else stand_ins
            hooks = [*mask_hooks(masks, masks.__getitem__, values.__getitem__), *hooks]
        with temporary_hooks(self.model, hooks) if hooks else nullcontext():
            return answer_logits(self.model, prompts.clean, positions(prompts), sliced=self.sliced, of=of)

    def all_logits(self, masks: Mapping[str, Tensor] | None = None, stand_ins: Mapping[str, Tensor] | None = None, *,
                   of: str = "the circuit") -> Float[Tensor, "prompt d_vocab"]:
        """`logits` of all prompts, without gradient."""
        with torch.no_grad():
            return torch.cat([self.logits(rows, masks, stand_ins, of=of) for rows in self.chunks(torch.arange(len(self.prompts)))])

    def chunks(self, rows: Tensor) -> Iterator[Tensor]:
        """Prompt indices in pieces of the batch size."""
        yield from rows.split(self.batch_size)

    def stand_ins(self, rows: Int[Tensor, "row"]) -> dict[str, Tensor]:
        """What closed nodes take on these prompts, by hook name."""
        return self.ablation.values(self.model, self.prompts[rows], self.hooks, batch_size=self.batch_size)
