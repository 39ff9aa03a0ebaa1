"""The embedded model: what issue 2 asks of it, on prompts that it was not trained on."""

from __future__ import annotations

import random
from typing import Any

import pytest
from circuits import full_logits

import tl_nodeprune as tlnp
from tl_nodeprune.toy.train import draw

Toy = tuple[Any, tlnp.PromptPairs]


@pytest.mark.parametrize("task", ["ioi", "gendered_pronoun", "greater_than"])
def test_held_out_accuracy(toy: Toy, task: str) -> None:
    rng = random.Random(1)
    rows = [draw(rng, task, test=True) for _ in range(200)]
    prompts = tlnp.PromptPairs.from_strings(toy[0], *map(list, zip(*rows, strict=True)))
    assert (prompts.logit_diff(full_logits(toy[0], prompts)) > 0).float().mean() >= 0.98


def test_weights_are_small_enough_to_ship() -> None:
    assert (tlnp.toy.FOLDER / "model.safetensors").stat().st_size <= 4 * 2**20


def test_it_goes_by_its_own_name(toy: Toy) -> None:
    space = tlnp.add_node_masks(toy[0], ["head"]).space
    tlnp.remove_node_masks(toy[0])
    assert space.model_name == tlnp.toy.NAME != "gpt2"
