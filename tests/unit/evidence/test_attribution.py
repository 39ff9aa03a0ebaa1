"""Attribution patching against gradients by hand, TransformerLens' own, and the exact effects of small corruptions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import tl_nodeprune as tlnp
from tl_nodeprune.evidence.crosscheck import activation_patching, attribution_patching

Toy = tuple[Any, tlnp.PromptPairs]


def metric_of(prompts: tlnp.PromptPairs) -> Any:
    rows = torch.arange(len(prompts))
    return lambda logits: prompts.logit_diff(logits[rows, prompts.answer_positions].float()).mean()


def first_order(prompts: tlnp.PromptPairs, model: Any, hook: str, direction: str) -> Tensor:
    """(source - activation) * gradient at one hook point, summed over positions, mean over prompts."""
    base, other = (prompts.corrupted, prompts.clean) if direction == "denoise" else (prompts.clean, prompts.corrupted)
    seen: list[Tensor] = []

    def keep(activation: Tensor, hook: Any) -> Tensor:
        seen.append(activation.detach().requires_grad_())
        return seen[-1]

    (grad,) = torch.autograd.grad(metric_of(prompts)(model.run_with_hooks(base, fwd_hooks=[(hook, keep)])), seen)
    with torch.no_grad():
        return ((model.run_with_cache(other)[1][hook] - seen[0]) * grad).sum((0, 1))  # type: ignore[no-any-return]


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_attribution_is_gradient_times_difference(each_toy: Toy, direction: str) -> None:
    model, prompts = each_toy[0], each_toy[1][:8]
    effects = attribution_patching(model, prompts, direction=direction)
    assert effects.granularities == tlnp.GRANULARITIES and effects.direction == direction
    for hook in (f"blocks.{layer}.{name}" for layer in range(3) for name in ("attn.hook_z", "hook_mlp_out", "mlp.hook_post")):
        want = first_order(prompts, model, hook, direction)
        torch.testing.assert_close(effects[hook], want, atol=1e-5, rtol=1e-4)
        assert want.abs().max() > 1e-3
    for layer in range(3):
        assert torch.allclose(effects.of("head")[layer], effects.of("attn_neuron")[layer].sum(1), atol=1e-5)
        assert torch.allclose(effects.of("mlp")[layer], effects.of("mlp_out")[layer].sum(), atol=1e-5)
    assert all(p.grad is None for p in model.parameters())


def test_attribution_is_transformer_lens_own(toy: Toy) -> None:
    from transformer_lens.tools.analysis import attribution_patch

    model, prompts = toy[0], toy[1][:3]
    effects, totals = attribution_patching(model, prompts, ["head", "mlp"]), {"attn_head_out": torch.zeros(3, 4), "mlp_out": torch.zeros(3)}
    for i in range(len(prompts)):
        for node, score in attribution_patch(model, prompts[i].clean, prompts[i].corrupted, metric_of(prompts[i])).node_scores.items():
            if node.kind in totals:
                totals[node.kind][(node.layer,) if node.head is None else (node.layer, node.head)] += score / len(prompts)
    for name, kind in (("head", "attn_head_out"), ("mlp", "mlp_out")):
        torch.testing.assert_close(torch.stack(list(effects.of(name).values())), totals[kind], atol=1e-4, rtol=1e-4)
        assert totals[kind].abs().max() > 0.1


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_attribution_is_exact_to_first_order_in_a_small_corruption(fresh_toy: Toy, direction: str) -> None:
    """The corrupted name's embedding is the clean one's moved a little towards another's: the relative error falls with how little."""
    model, one = fresh_toy[0], fresh_toy[1][:1]
    spare, place = 2, int((one.clean[0] == one.answers[0]).nonzero()[0])
    corrupted = one.clean.clone()
    corrupted[0, place] = spare
    pair = tlnp.PromptPairs(one.clean, corrupted, one.answers, one.wrong_answers, one.attention_mask, one.answer_positions)
    table = next(p for name, p in model.named_parameters() if "wte" in name).data
    errors = []
    for share in (0.1, 0.05, 0.025):
        table[spare] = table[one.answers[0]] + share * (table[one.wrong_answers[0]] - table[one.answers[0]])
        exact = activation_patching(model, pair, ["head", "mlp", "layer"], direction=direction, progress=False)
        fast = attribution_patching(model, pair, ["head", "mlp", "layer"], direction=direction)
        want, got = (torch.cat([effect.flatten() for effect in effects.values()]) for effects in (exact, fast))
        errors.append(float((want - got).norm() / want.norm()))
    assert errors[0] > 1.5 * errors[1] > 2 * errors[2] and errors[2] < 0.1


def test_attached_and_frozen_masks_are_left_out_of_attribution(toy: Toy) -> None:
    model, prompts = toy[0], toy[1][:4]
    plain = attribution_patching(model, prompts)
    masks = model.add_node_masks()
    try:
        masks.set_to(tlnp.Circuit.empty(masks.space))
        assert attribution_patching(model, prompts) == plain
    finally:
        model.remove_node_masks()
    assert plain["blocks.1.attn.hook_z"].abs().max() > 0.05
