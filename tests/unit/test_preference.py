"""What the full model does on the pairs: the test for a task, and the pairs turned round."""

from __future__ import annotations

from typing import Any

import torch
from scipy import stats

import tl_nodeprune as tlnp
from tl_nodeprune.preference import GIVEN, TURNED, Preference, Sample, preference

Toy = tuple[Any, tlnp.PromptPairs]


def made(prompts: tlnp.PromptPairs, clean: torch.Tensor, corrupted: torch.Tensor) -> Preference:
    turned = tlnp.PromptPairs(prompts.corrupted, prompts.clean, prompts.wrong_answers, prompts.answers)
    return Preference(prompts, turned, clean, corrupted)


def test_the_toy_does_its_task(toy: Toy) -> None:
    model, prompts = toy
    found = preference(model, prompts, 10)
    full = model(prompts.clean)[torch.arange(len(prompts)), prompts.answer_positions]
    assert torch.allclose(found.clean, prompts.logit_diff(full), atol=1e-4)
    assert found.p_value < 1e-6 and not found.no_task


def test_p_value_is_the_signed_rank_tests_and_few_pairs_tell_nothing(toy: Toy) -> None:
    prompts, gains = toy[1], torch.randn(len(toy[1]), generator=torch.Generator().manual_seed(0))
    found = made(prompts, gains, torch.zeros(len(gains)))
    assert found.p_value == stats.wilcoxon(gains.double().numpy(), alternative="greater").pvalue > 0.01 and found.no_task
    assert not made(prompts[:6], gains[:6], gains[:6]).no_task
    assert made(prompts, gains * 0, gains * 0).p_value == 1


def test_pairs_with_one_clean_prompt_count_once(toy: Toy) -> None:
    """By their mean: copies of a pair tell no more than the pair."""
    prompts, gains = toy[1][:8], torch.randn(8, generator=torch.Generator().manual_seed(0)) + 1
    often = [i for i in range(8) for _ in range(3)]
    assert made(prompts[often], gains[often], gains[often] * 0).p_value == made(prompts, gains, gains * 0).p_value
    assert made(prompts[[0] * 24], -torch.ones(24), torch.zeros(24)).no_task is False, "one prompt is too few to tell"


def test_pairs_are_turned_round_only_where_the_corrupted_prompts_do_the_task(toy: Toy) -> None:
    prompts, n = toy[1], len(toy[1])
    strong, weak = torch.ones(n), torch.full((n,), 0.4)
    assert set(made(prompts, strong, weak).sample().groups.tolist()) == {GIVEN}
    corrupted = strong.clone()
    corrupted[:3] = -0.1
    sample = made(prompts, strong, corrupted).sample()
    assert sample.groups.tolist() == [GIVEN] * n + [TURNED] * (n - 3) and sample.pairs[n:].tolist() == list(range(3, n))
    assert torch.equal(sample.prompts.clean[n:], prompts.corrupted[3:])
    assert torch.equal(sample.prompts.answers[n:], prompts.wrong_answers[3:])


def test_folds_keep_pairs_whole_and_hold_each_out_once(toy: Toy) -> None:
    n = len(toy[1])
    sample, seen = made(toy[1], torch.ones(n), torch.ones(n)).sample(), []
    for rows, held in sample.folds(4, torch.Generator().manual_seed(0)):
        assert sorted([*rows.tolist(), *held.tolist()]) == list(range(2 * n))
        assert not set(sample.pairs[rows].tolist()) & set(sample.pairs[held].tolist()) and len(held) == 2 * (n // 4)
        seen += held.tolist()
    assert sorted(seen) == list(range(2 * n)) and len(Sample.of(toy[1]).pairs) == n
