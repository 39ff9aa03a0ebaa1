"""What stands in for closed nodes: the same kept, recomputed, or kept for a part of the prompts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from circuits import full_logits

import tl_nodeprune as tlnp
from tl_nodeprune.masks.reference import Reference

Toy = tuple[Any, tlnp.PromptPairs]
HOOKS = ("blocks.1.attn.hook_z", "blocks.0.mlp.hook_post")


def kept_for(toy: Toy, n: int) -> Reference:
    one = Reference(*toy, tlnp.Ablation(), HOOKS).bytes_per_prompt
    return Reference(*toy, tlnp.Ablation(), HOOKS, batch_size=5, cache_bytes=n * one)


@pytest.mark.parametrize("kept", [0, 1, 12, 24, 1000])
def test_stand_ins_are_those_of_the_rows_in_any_order(toy: Toy, kept: int) -> None:
    model, prompts = toy
    reference, order = kept_for(toy, kept), torch.randperm(len(prompts), generator=torch.Generator().manual_seed(0))
    assert reference.n_kept == min(kept, 24)
    for rows in (order, order[:5], torch.arange(len(prompts)), torch.tensor([23, 0, 23])):
        wanted = tlnp.Ablation().values(model, prompts[rows], list(HOOKS))
        for hook, found in reference.stand_ins(rows).items():
            torch.testing.assert_close(found, wanted[hook], atol=1e-5, rtol=1e-5)


def test_using_stand_ins_leaves_those_kept_alone(toy: Toy) -> None:
    reference, rows = kept_for(toy, 12), torch.arange(24)
    before = {hook: value.clone() for hook, value in reference.stand_ins(rows).items()}
    for value in reference.stand_ins(rows).values():
        value.zero_()
    assert all(torch.equal(value, before[hook]) for hook, value in reference.stand_ins(rows).items())


def test_a_prompts_bytes_are_those_of_its_stand_ins(toy: Toy) -> None:
    width, heads_and_dims, neurons = toy[1].clean.shape[1], 96, 384
    assert Reference(*toy, tlnp.Ablation(), HOOKS).bytes_per_prompt == 4 * width * (heads_and_dims + neurons)
    assert Reference(*toy, tlnp.Ablation("zero"), HOOKS).bytes_per_prompt == 0


@pytest.mark.parametrize("batch_size", [5, 64])
def test_the_full_models_logits_are_computed_once_or_taken_as_given(toy: Toy, batch_size: int) -> None:
    model, prompts = toy
    found = Reference(model, prompts, tlnp.Ablation(), HOOKS, batch_size=batch_size).full
    torch.testing.assert_close(found, full_logits(model, prompts), atol=1e-4, rtol=1e-4)
    assert Reference(model, prompts, tlnp.Ablation(), HOOKS, full=found).full is found
    with pytest.raises(FloatingPointError, match="NaN or inf in the logits of the full model"):
        Reference(model, prompts, tlnp.Ablation(), HOOKS, full=found * torch.nan)
