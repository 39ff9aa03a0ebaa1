"""`estimate`: what a search will take, said before it; the model is left as it was."""

from __future__ import annotations

from typing import Any

import pytest

import tl_nodeprune as tlnp
from tl_nodeprune.search.estimate import Estimate

Toy = tuple[Any, tlnp.PromptPairs]
COARSE = ("head", "mlp")


def test_bytes_and_seconds_add_up_and_nothing_is_left_on_the_model(toy: Toy) -> None:
    found = tlnp.estimate(toy[0], toy[1], granularities=COARSE, steps=20)
    weights = sum(p.numel() * p.element_size() for p in toy[0].parameters())
    assert found.weights == weights and found.peak > weights + found.stand_ins
    assert found.seconds == pytest.approx(found.set_up + found.training + found.frontier + found.finish)
    assert min(found.set_up, found.training, found.frontier, found.finish, found.stand_ins, found.saved_for_backward) > 0
    assert "GiB" in repr(found) and list(found.to_frame()) == ["what", "amount", "unit"]


def test_stand_ins_are_those_of_all_prompts_up_to_the_cache(toy: Toy) -> None:
    whole, half, none = (tlnp.estimate(toy[0], toy[1], granularities=COARSE, steps=1, cache_bytes=size).stand_ins
                         for size in (1 << 30, 100_000, 0))
    assert whole > half > none == 0 and half <= 2 * 100_000


def test_training_takes_as_long_as_its_steps(toy: Toy) -> None:
    few, many = (tlnp.estimate(toy[0], toy[1], granularities=COARSE, steps=steps).training for steps in (10, 1000))
    assert many > 10 * few


def test_masks_that_are_attached_are_used_and_stay(toy: Toy) -> None:
    masks = toy[0].add_node_masks("head")
    try:
        assert isinstance(tlnp.estimate(toy[0], toy[1], steps=1), Estimate)
        assert masks.attached and masks.to_circuit() == tlnp.Circuit.full(masks.space)
    finally:
        toy[0].remove_node_masks()


def test_it_refuses_what_prune_refuses(toy: Toy) -> None:
    with pytest.raises(ValueError, match="steps=0"):
        tlnp.estimate(toy[0], toy[1], granularities=COARSE, steps=0)
    with pytest.raises(TypeError, match="prompts must be PromptPairs, got list"):
        tlnp.estimate(toy[0], [1, 2], granularities=COARSE)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="are searched on too"):
        tlnp.estimate(toy[0], toy[1], granularities=COARSE, held_out=toy[1][:3])
