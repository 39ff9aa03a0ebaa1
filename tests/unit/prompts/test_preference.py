"""What the full model does on the pairs: the test for a task, and the pairs turned round."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy import stats

import tl_nodeprune as tlnp
from tl_nodeprune.nodes.attachment import temporary_hooks
from tl_nodeprune.prompts.preference import Preference, Sample, preference

Toy = tuple[Any, tlnp.PromptPairs]


def made(prompts: tlnp.PromptPairs, clean: torch.Tensor, corrupted: torch.Tensor) -> Preference:
    turned = tlnp.PromptPairs(prompts.corrupted, prompts.clean, prompts.wrong_answers, prompts.answers)
    logits = torch.arange(len(prompts))[:, None].expand(-1, 3).float()
    return Preference(prompts, turned, clean, corrupted, (logits, logits + 100))


def test_the_toy_does_its_task(toy: Toy) -> None:
    model, prompts = toy
    found = preference(model, prompts, 10)
    full, turned = (model(side)[torch.arange(len(prompts)), prompts.answer_positions] for side in (prompts.clean, prompts.corrupted))
    assert torch.allclose(found.clean, prompts.logit_diff(full), atol=1e-4)
    assert torch.allclose(found.corrupted, -prompts.logit_diff(turned), atol=1e-4)
    torch.testing.assert_close(found.logits, (full, turned), atol=1e-4, rtol=1e-4)
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
    assert made(prompts, strong, strong).both_ways and not made(prompts, strong, weak).both_ways
    assert not made(prompts, -strong, strong).both_ways
    corrupted = strong.clone()
    corrupted[:3] = -0.1
    sample = made(prompts, strong, corrupted).sample(True)
    assert sample.pairs.tolist() == [*range(n), *range(3, n)]
    assert torch.equal(sample.prompts.clean[n:], prompts.corrupted[3:])
    assert torch.equal(sample.prompts.answers[n:], prompts.wrong_answers[3:])
    assert sample.full[:, 0].tolist() == [*range(n), *range(103, 100 + n)], "the full model's logits are those of each side"
    assert len(made(prompts, strong, corrupted).sample(False).prompts) == n


def test_some_prompts_are_spread_over_all(toy: Toy) -> None:
    sample = made(toy[1], torch.ones(24), torch.ones(24)).sample(True)
    assert isinstance(sample, Sample) and sample.some(100).tolist() == list(range(48))
    few = sample.some(5)
    assert few.tolist()[0] == 0 and few.tolist()[-1] == 47 and len(few.unique()) == 5


def test_nan_in_the_full_model_is_named(toy: Toy) -> None:
    model, prompts = toy
    with temporary_hooks(model, [("blocks.0.hook_resid_pre", lambda x, hook: x * torch.nan)]):
        with pytest.raises(FloatingPointError, match="NaN or inf in the logits of the full model"):
            preference(model, prompts, 10)
