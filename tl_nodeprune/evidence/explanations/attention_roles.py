"""What a token of a prompt is to the task: roles, so that attention can be added up over prompts of several wordings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from tl_nodeprune.prompts import FILL, PromptPairs

OTHER = "another token"
_TIMES = ("first", "second", "third", "fourth", "fifth")


def roles_of(prompts: PromptPairs) -> list[list[str]]:
    """The role of every token up to the answer position, prompt by prompt: each token has one, the first that fits.

    In this order: the current token (at the answer position itself); the answer; the wrong answer; the token after, a copy of, or the
    token before an earlier copy of the current token; the first token; the previous token; one in which the corrupted prompt differs;
    another token. An answer says which time it stands there, where it stands there several times.
    """
    assert prompts.answer_positions is not None
    rows = zip(prompts.clean.tolist(), prompts.corrupted.tolist(), _rows(prompts.answers), _rows(prompts.wrong_answers),
               prompts.answer_positions.tolist(), strict=True)
    return [_roles(clean[: at + 1], corrupted, answers, wrong) for clean, corrupted, answers, wrong, at in rows]


def by_role(weights: Float[Tensor, "prompt pos"], roles: Sequence[Sequence[str]]) -> dict[str, float]:
    """Mean over prompts of the weights of each role, the largest first. A prompt that lacks a role counts as 0."""
    sums: dict[str, float] = {}
    for row, names in zip(weights.tolist(), roles, strict=True):
        for weight, name in zip(row, names, strict=False):
            sums[name] = sums.get(name, 0.0) + weight / len(roles)
    return dict(sorted(sums.items(), key=lambda item: -item[1]))


def even(roles: Sequence[Sequence[str]]) -> Mapping[str, float]:
    """The shares that a head would have which attends to all tokens alike."""
    width = max(map(len, roles))
    uniform = torch.tensor([[1 / len(row)] * len(row) + [0.0] * (width - len(row)) for row in roles])
    return by_role(uniform, roles)


def _rows(tokens: Tensor) -> list[set[int]]:
    table = tokens if tokens.ndim == 2 else tokens[:, None]
    return [set(row) - {FILL} for row in table.tolist()]


def _roles(tokens: Sequence[int], corrupted: Sequence[int], answers: set[int], wrong: set[int]) -> list[str]:
    last = len(tokens) - 1
    current, named = tokens[last], []
    for at, token in enumerate(tokens):
        if at == last:
            role = "the current token"
        elif token in answers or token in wrong:
            many = answers if token in answers else wrong
            role = ("an " if token in answers else "a wrong ") + "answer" if len(many) > 1 else _SINGLE[token in answers]
            role += _time(tokens[:last], at) + (", after an earlier copy of the current token" if at and tokens[at - 1] == current else "")
        else:
            role = _by_place(tokens, at, current, last) or OTHER
            role = _changed(role) if token != corrupted[at] else role
        named.append(role)
    return named


_SINGLE = {True: "the answer", False: "the wrong answer"}


def _by_place(tokens: Sequence[int], at: int, current: int, last: int) -> str:
    if at and tokens[at - 1] == current:
        return "the token after an earlier copy of the current token"
    if tokens[at] == current:
        return "an earlier copy of the current token"
    if at + 1 < last and tokens[at + 1] == current:
        return "the token before an earlier copy of the current token"
    return "the first token" if at == 0 else "the previous token" if at == last - 1 else ""


def _changed(role: str) -> str:
    return "a token that the corrupted prompt changes" if role == OTHER else f"{role}, which the corrupted prompt changes"


def _time(tokens: Sequence[int], at: int) -> str:
    """Which time a token stands there, where it stands there several times."""
    places = [i for i, token in enumerate(tokens) if token == tokens[at]]
    if len(places) == 1:
        return ""
    nth = places.index(at)
    return f" ({_TIMES[nth]} time)" if nth < len(_TIMES) else " (a later time)"
