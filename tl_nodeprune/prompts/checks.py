"""Checks of what PromptPairs are made of: token ids, answers, padding, positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tl_nodeprune.nodes import check_plain

FILL = -1
"""Stands for "no further answer" in rows of `answers` that have fewer than the longest."""


def _is_integer(value: Any) -> bool:
    return isinstance(value, Tensor) and not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)


def _kind(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}, not a tensor"


def check_tokens(clean: Tensor, corrupted: Tensor) -> None:
    """Raises ValueError unless both are token ids [batch pos] of one shape."""
    for name, value in (("clean", clean), ("corrupted", corrupted)):
        check_plain(name, value)
        if not _is_integer(value) or value.ndim != 2:
            raise ValueError(f"{name} must be integer token ids [batch pos]; got {_kind(value)}.")
        if not value.numel():
            raise ValueError(f"{name} is empty, {tuple(value.shape)}; give one prompt or more, of one token or more.")
        if (least := int(value.long().min())) < 0:
            raise ValueError(f"{name} holds the token id {least}; ids start at 0.")
    if clean.shape != corrupted.shape:
        raise ValueError(f"clean is {tuple(clean.shape)} and corrupted {tuple(corrupted.shape)}; they must have one shape, "
                         "aligned token by token and padded alike.")


def check_answers(clean: Tensor, answers: Tensor, wrong: Tensor) -> None:
    """Raises ValueError unless each row has answers and wrong answers, none of them both."""
    for name, value in (("answers", answers), ("wrong_answers", wrong)):
        check_plain(name, value)
        if not _is_integer(value) or value.ndim not in (1, 2) or len(value) != len(clean):
            raise ValueError(f"{name} must be integer token ids [batch] or [batch k] with batch={len(clean)}; got {_kind(value)}.")
        table = value.long() if value.ndim == 2 else value.long()[:, None]
        if not table.numel() or int(table.min()) < FILL or not (table != FILL).any(1).all():
            raise ValueError(f"{name} must have one token id or more in each row, and {FILL} only as filler; got {table.tolist()[:3]}…")
    a, w = answers.long().reshape(len(clean), -1, 1), wrong.long().reshape(len(clean), 1, -1)
    same = ((a == w) & (a != FILL)).flatten(1).any(1)
    if same.any():
        row = int(same.nonzero()[0])
        raise ValueError(f"prompt {row}: the answer and the wrong answer share a token ({answers[row].tolist()} and "
                         f"{wrong[row].tolist()}); they must differ.")


def check_mask(clean: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The mask as bool, all 1 for None. Raises ValueError unless each row is one unbroken run of 1."""
    if attention_mask is None:
        return torch.ones_like(clean, dtype=torch.bool)
    check_plain("attention_mask", attention_mask)
    if not isinstance(attention_mask, Tensor) or attention_mask.shape != clean.shape:
        given = tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else _kind(attention_mask)
        raise ValueError(f"attention_mask is {given}, but clean and corrupted are {tuple(clean.shape)}.")
    if not ((attention_mask == 0) | (attention_mask == 1)).all():
        raise ValueError("attention_mask holds other values than 0 (padding) and 1 (a real token); an additive mask (0 and -inf) is "
                         "`additive == 0` here.")
    mask = attention_mask.to(clean.device).bool()
    runs = (mask.long().diff(dim=1) == 1).sum(1) + mask[:, 0].long()
    if (runs != 1).any():
        row = int((runs != 1).nonzero()[0])
        raise ValueError(f"attention_mask of prompt {row} is {mask[row].int().tolist()}; each needs one unbroken run of 1, "
                         "with padding on the left or the right.")
    return mask


def check_positions(positions: Tensor, mask: Tensor) -> None:
    """Raises ValueError unless each position is that of a real token."""
    check_plain("answer_positions", positions)
    if not _is_integer(positions) or positions.shape != mask.shape[:1]:
        raise ValueError(f"answer_positions must be integers [batch] with batch={len(mask)}; got {_kind(positions)}.")
    positions = positions.long()
    inside = (positions >= 0) & (positions < mask.shape[1])
    if not inside.all() or not mask.gather(1, positions[:, None].to(mask.device).long()).all():
        raise ValueError(f"answer_positions must point at real tokens, 0 to {mask.shape[1] - 1}; got {positions.tolist()[:8]}…")
