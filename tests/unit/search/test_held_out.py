"""Prompts that are never searched on: how they are set aside, and what they say of a circuit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import tl_nodeprune as tlnp
from tl_nodeprune.search.held_out import HeldOut, set_aside

Toy = tuple[Any, tlnp.PromptPairs]


def made(n: int, copies: int = 1) -> tlnp.PromptPairs:
    """n different prompts, each several times."""
    clean = torch.arange(n).repeat(copies)[:, None] + torch.tensor([[0, 1000]])
    ones = torch.ones(len(clean), dtype=torch.long)
    return tlnp.PromptPairs(clean, clean + 1, ones, ones + 1)


def different(prompts: tlnp.PromptPairs) -> int:
    return len(set(map(tuple, prompts.clean.tolist())))


@pytest.mark.parametrize(("n", "aside"), [(2, 1), (3, 1), (4, 1), (10, 2), (23, 6), (24, 8), (32, 8), (40, 10), (100, 25)])
@pytest.mark.parametrize("copies", [1, 3])
def test_a_quarter_is_set_aside_and_eight_where_that_can_be_had(n: int, aside: int, copies: int) -> None:
    """Of different prompts: pairs with one clean prompt stay together."""
    searched, held = set_aside(made(n, copies), None, seed=0)
    assert (different(held), different(searched)) == (aside, n - aside) and len(searched) + len(held) == n * copies
    assert not set(map(tuple, searched.clean.tolist())) & set(map(tuple, held.clean.tolist()))


def test_which_are_set_aside_hangs_on_the_seed() -> None:
    first, again, other = (set_aside(made(40), None, seed)[1].clean for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_those_given_are_taken_whole_unless_they_are_searched_on() -> None:
    prompts = made(12)
    searched, held = set_aside(prompts[:8], prompts[8:], seed=0)
    assert len(searched) == 8 and torch.equal(held.clean, prompts.clean[8:])
    with pytest.raises(ValueError, match="3 of the 5 prompts of held_out are searched on too; hold out others"):
        set_aside(prompts[:10], prompts[7:], seed=0)


def test_one_prompt_cannot_be_split() -> None:
    with pytest.raises(ValueError, match="all 5 prompts have the same clean prompt.* 2 different ones or more .24 may be enough to tell"):
        set_aside(made(1, 5), None, seed=0)
    assert len(set_aside(made(1, 5), made(3)[1:], seed=0)[0]) == 5


def of(losses: list[float], pairs: list[int] | None = None) -> HeldOut:
    n = len(losses)
    return HeldOut.of(torch.tensor(losses), torch.arange(n) % 2 == 0, torch.tensor(pairs or range(n)))


def test_the_interval_holds_the_mean_and_is_narrow_where_losses_are_alike() -> None:
    generator = torch.Generator().manual_seed(0)
    wide, narrow = (of((0.1 + spread * torch.rand(30, generator=generator)).tolist()) for spread in (1.0, 0.01))
    for found in (wide, narrow):
        assert found.low < found.kl < found.high and found.n == 30 and found.accuracy == 0.5
    assert wide.high - wide.low > 50 * (narrow.high - narrow.low)
    assert of([0.2] * 9).low == of([0.2] * 9).high == pytest.approx(0.2)
    assert math.isnan(of([0.2]).low) and of([0.2]).kl == pytest.approx(0.2)


def test_about_nine_of_ten_intervals_hold_the_true_mean() -> None:
    """Samples of 40 from an exponential distribution with mean 1."""
    generator = torch.Generator().manual_seed(1)
    found = [of((-torch.rand(40, generator=generator).log()).tolist()) for _ in range(150)]
    assert 0.83 <= sum(one.low <= 1 <= one.high for one in found) / len(found) <= 0.96


def test_copies_of_a_prompt_count_once() -> None:
    losses = torch.rand(10, generator=torch.Generator().manual_seed(0)).tolist()
    once, thrice = of(losses), of(losses * 3, list(range(10)) * 3)
    assert (once.n, once.low, once.high) == (thrice.n, pytest.approx(thrice.low), pytest.approx(thrice.high))


@pytest.mark.parametrize(("losses", "meets"), [
    ([0.1] * 8, True), ([0.1] * 7, None), ([0.11] * 30, False), ([0.0] * 8, True), ([0.0] * 1, None), ([0.2] * 3, False),
    ([0.0] * 7 + [0.7], None), ([0.0] * 7 + [1.0], False), ([math.nan] * 8, False), ([0.08, 0.12] * 20, True)])
def test_a_budget_is_met_missed_or_untested(losses: list[float], meets: bool | None) -> None:
    assert of(losses).meets(0.1 + 1e-6) is meets


def test_more_prompts_are_needed_the_wider_the_interval() -> None:
    few, spread, more = of([0.1] * 3), of([0.0] * 7 + [0.7]), of([0.0] * 7 + [0.79])
    assert few.needed(0.2) == 8 and more.needed(0.1) > spread.needed(0.1) > 8
    assert of([0.05] * 8).needed(0.1) >= 8
