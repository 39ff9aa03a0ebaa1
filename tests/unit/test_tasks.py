"""The three tasks as prompts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tl_nodeprune as tlnp

Toy = tuple[Any, tlnp.PromptPairs]


@pytest.mark.parametrize("task", ["ioi", "gendered_pronoun", "greater_than"])
def test_same_seed_same_prompts_and_the_model_knows_them(toy: Toy, task: str) -> None:
    model, _ = toy
    a, b, c = (getattr(tlnp.tasks, task)(model, n=12, seed=seed) for seed in (1, 1, 2))
    assert len(a) == 12 and torch.equal(a.clean, b.clean) and torch.equal(a.answers, b.answers)
    assert a.clean.shape != c.clean.shape or not torch.equal(a.clean, c.clean)
    assert len(a.correct(model)) >= 10
    a.check_fits(model)


def test_greater_than_has_all_later_years_right(toy: Toy) -> None:
    model, _ = toy
    p = tlnp.tasks.greater_than(model, n=5, seed=0)
    words = model.to_str_tokens(p.clean[0][p.attention_mask[0]])  # type: ignore[index]
    start = int(words[words.index("year") + 2])
    right = sorted(int(model.tokenizer.decode(i)) for i in p.answers[0].tolist() if i >= 0)
    wrong = sorted(int(model.tokenizer.decode(i)) for i in p.wrong_answers[0].tolist() if i >= 0)
    assert right == list(range(start + 1, 100)) and wrong == list(range(2, start + 1))


def test_errors(toy: Toy) -> None:
    model, _ = toy
    with pytest.raises(ValueError, match="unknown task 'chess'; allowed: ioi"):
        tlnp.tasks.make("chess", model, 1, 0)
    with pytest.raises(ValueError, match="n=0"):
        tlnp.tasks.ioi(model, n=0, seed=0)
    with pytest.raises(ValueError, match="unknown task 'chess'"):
        tlnp.toy.load("chess")
    with pytest.raises(ValueError, match="unknown model_class 'Other'"):
        tlnp.toy.load(model_class="Other")
