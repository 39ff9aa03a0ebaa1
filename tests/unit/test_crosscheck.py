"""Activation patching against TransformerLens' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformer_lens import patching

import tl_nodeprune as tlnp

Toy = tuple[Any, tlnp.PromptPairs]


def metric_of(prompts: tlnp.PromptPairs) -> Any:
    rows = torch.arange(len(prompts))
    return lambda logits: prompts.logit_diff(logits[rows, prompts.answer_positions].float()).mean()


def test_head_effects_are_transformer_lens_own(each_toy: Toy) -> None:
    model, prompts = each_toy
    metric = metric_of(prompts)
    with torch.no_grad():
        _, cache = model.run_with_cache(prompts.clean)
        base = metric(model(prompts.corrupted))
        theirs = patching.get_act_patch_attn_head_out_all_pos(model, prompts.corrupted, cache, metric) - base
    ours = tlnp.crosscheck.activation_patching(model, prompts, ["head"], progress=False)
    assert list(ours) == [f"blocks.{layer}.attn.hook_z" for layer in range(3)]
    for layer in range(3):
        effect = ours[f"blocks.{layer}.attn.hook_z"]
        assert effect.shape == (4, 24) and torch.equal(effect, effect[:, :1].expand(4, 24))
        torch.testing.assert_close(effect[:, 0], theirs[layer].to(effect), atol=1e-5, rtol=1e-5)
    assert theirs.abs().max() > 0.5  # there is something to agree on


def test_default_has_the_keys_and_shapes_of_a_circuit(toy: Toy) -> None:
    model, prompts = toy
    effects = tlnp.crosscheck.activation_patching(model, prompts[:4], progress=False)
    circuit = tlnp.Circuit.full(tlnp.hooks.find_nodes(model).restrict(tlnp.crosscheck.COARSE))
    assert {hook: effect.shape for hook, effect in effects.items()} == {hook: mask.shape for hook, mask in circuit.items()}


@pytest.mark.parametrize("hook", ["hook_attn_out", "hook_mlp_out"])
def test_block_effects_by_hand(toy: Toy, hook: str) -> None:
    model, prompts = toy
    metric, name = metric_of(prompts), f"blocks.1.{hook}"
    with torch.no_grad():
        _, cache = model.run_with_cache(prompts.clean)

        def patch(activation: Tensor, hook: Any) -> Tensor:
            return cache[name]  # type: ignore[no-any-return]

        by_hand = metric(model.run_with_hooks(prompts.corrupted, fwd_hooks=[(name, patch)])) - metric(model(prompts.corrupted))
    effect = tlnp.crosscheck.activation_patching(model, prompts, ["attn" if "attn" in hook else "mlp"], progress=False)[name]
    torch.testing.assert_close(effect, by_hand.expand(effect.shape), atol=1e-5, rtol=1e-5)


def test_whole_layers(toy: Toy) -> None:
    effects = tlnp.crosscheck.activation_patching(toy[0], toy[1][:4], ["layer"], progress=False)
    assert [effect.shape for effect in effects.values()] == [()] * 3


def test_masks_are_left_out_and_errors(toy: Toy) -> None:
    model, prompts = toy
    plain = tlnp.crosscheck.activation_patching(model, prompts[:4], ["head"], progress=False)
    masks = model.add_node_masks()
    try:
        masks.set_to(tlnp.Circuit.empty(masks.space))
        masked = tlnp.crosscheck.activation_patching(model, prompts[:4], ["head"], progress=False)
    finally:
        model.remove_node_masks()
    assert all(torch.equal(plain[hook], masked[hook]) for hook in plain)
    with pytest.raises(ValueError, match="unknown granularity 'heads'"):
        tlnp.crosscheck.activation_patching(model, prompts, ["heads"])
    with tlnp.Circuit.empty(masks.space).applied(model, prompts), pytest.raises(RuntimeError, match="a circuit is applied"):
        tlnp.crosscheck.activation_patching(model, prompts)
