"""Circuits and masks in the hands of plain TransformerLens: run_with_hooks, run_with_cache, reset_hooks, patching, attribution."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from integration_support import NO_HOOKED, HookedTransformer, cache_of, n_hooks, random_circuit, run
from torch import Tensor
from transformer_lens import patching

import tl_nodeprune as tlnp
from tl_nodeprune.nodes.probe import find_nodes
from tl_nodeprune.nodes.space import GateKey


@pytest.fixture(scope="module", params=["TransformerBridge", "HookedTransformer"])
def loaded(request: pytest.FixtureRequest) -> tuple[Any, tlnp.PromptPairs]:
    if request.param == "HookedTransformer" and HookedTransformer is None:
        pytest.skip(NO_HOOKED)
    return tlnp.toy.load(n=12, model_class=request.param)  # type: ignore[no-any-return]


@pytest.fixture
def model(loaded: tuple[Any, tlnp.PromptPairs]) -> Iterator[Any]:
    before = n_hooks(loaded[0])
    yield loaded[0]
    left = n_hooks(loaded[0])
    loaded[0].reset_hooks(including_permanent=True)  # so that one failure is one failure
    for parameter in loaded[0].parameters():
        parameter.requires_grad_(True)
    assert left == before


@pytest.fixture
def prompts(loaded: tuple[Any, tlnp.PromptPairs]) -> tlnp.PromptPairs:
    return loaded[1]


def swapped(prompts: tlnp.PromptPairs) -> tlnp.PromptPairs:
    """The corrupted run as base: what is closed takes the clean run's activation. Answers as they were."""
    return tlnp.PromptPairs(prompts.corrupted, prompts.clean, prompts.answers, prompts.wrong_answers, prompts.attention_mask,
                            prompts.answer_positions)


def metric_of(prompts: tlnp.PromptPairs, logits: Tensor) -> Tensor:
    """Mean logit difference at the answer positions."""
    return prompts.logit_diff(logits[torch.arange(len(prompts)), prompts.answer_positions]).mean()


def test_run_with_hooks_runs_the_circuit(model: Any, prompts: tlnp.PromptPairs) -> None:
    circuit = random_circuit(find_nodes(model), "interchange", seed=0)
    plain = run(model, prompts.clean)
    with circuit.applied(model, prompts):
        applied = run(model, prompts.clean)
    with torch.no_grad():
        hooked = model.run_with_hooks(prompts.clean, fwd_hooks=circuit.fwd_hooks(model, prompts))
    assert torch.equal(hooked, applied)
    assert (hooked - plain).abs().max() > 0.1 and torch.equal(run(model, prompts.clean), plain)


def test_fwd_hooks_name_only_hook_points_with_something_closed(model: Any, prompts: tlnp.PromptPairs) -> None:
    circuit = tlnp.Circuit(space := find_nodes(model).restrict(["head"]), {
        key: torch.tensor([1, 1, 0, 1]) if key.layer == 1 else torch.ones(4) for key in space.shapes})
    assert [name for name, _ in circuit.fwd_hooks(model, prompts)] == ["blocks.1.attn.hook_z"]


def test_run_with_cache_inside_applied_shows_the_mixed_activations(model: Any, prompts: tlnp.PromptPairs) -> None:
    circuit = random_circuit(find_nodes(model).restrict(["attn_neuron", "mlp_neuron", "mlp_out"]), "interchange", seed=1)
    clean, corrupted = cache_of(model, prompts.clean), cache_of(model, prompts.corrupted)
    with circuit.applied(model, prompts):
        cache = cache_of(model, prompts.clean)
    for hook, mask in circuit.items():
        closed = mask == 0
        assert 0 < int(closed.sum()) < mask.numel()
        assert torch.equal(cache[hook][..., closed], corrupted[hook][..., closed]), hook
    first = "blocks.0.attn.hook_z"
    assert torch.equal(cache[first][..., circuit[first] == 1], clean[first][..., circuit[first] == 1])
    assert not torch.equal(clean[first], corrupted[first])


def test_a_patch_added_later_overrides_the_circuit(model: Any, prompts: tlnp.PromptPairs) -> None:
    clean, hook = cache_of(model, prompts.clean), "blocks.0.attn.hook_z"
    plain, space = run(model, prompts.clean), find_nodes(model).restrict(["attn_neuron"], [0])
    with tlnp.Circuit.empty(space).applied(model, prompts), torch.no_grad():
        assert not torch.equal(model(prompts.clean), plain)
        patched = model.run_with_hooks(prompts.clean, fwd_hooks=[(hook, lambda z, hook: clean["blocks.0.attn.hook_z"])])
        assert torch.equal(patched, plain)


def test_masks_survive_reset_hooks_and_are_gone_after_removal(model: Any, prompts: tlnp.PromptPairs) -> None:
    plain, before = run(model, prompts.clean), n_hooks(model)
    masks = model.add_node_masks()
    masks.set_to(random_circuit(masks.space, "interchange", seed=2))
    with masks.paired(prompts):
        masked = run(model, prompts.clean)
        model.reset_hooks()
        assert masks.attached and torch.equal(run(model, prompts.clean), masked)
        with torch.no_grad():
            watched = model.run_with_hooks(prompts.clean, fwd_hooks=[("blocks.0.hook_resid_pre", lambda x, hook: None)])
            assert torch.equal(watched, masked)
            assert torch.equal(model.run_with_cache(prompts.clean)[0], masked)
    assert (masked - plain).abs().max() > 0.1 and n_hooks(model) > before
    masks.remove()
    assert not masks.attached and n_hooks(model) == before and torch.equal(run(model, prompts.clean), plain)


def test_masks_are_still_known_to_the_model_after_reset_hooks(model: Any, prompts: tlnp.PromptPairs) -> None:
    circuit = random_circuit(find_nodes(model), "interchange", seed=2)
    want = tlnp.evaluate(model, circuit, prompts)
    masks = model.add_node_masks(ablation="zero")
    try:
        masks.set_to(circuit)
        model.reset_hooks()  # empties every HookPoint.ctx, and leaves permanent hooks
        assert tlnp.evaluate(model, circuit, prompts) == want, "attached masks are to be left out of an evaluation"
        with pytest.raises(RuntimeError, match="attached to this model already"):
            model.add_node_masks()
        masks.prune(prompts, max_nodes=0.5, steps=2, progress=False)
        model.remove_node_masks()
        assert not masks.attached
    finally:
        masks.remove()


def test_reset_hooks_including_permanent_ones_frees_the_model_for_new_masks(model: Any, prompts: tlnp.PromptPairs) -> None:
    plain, trainable = run(model, prompts.clean), [p.requires_grad for p in model.parameters()]
    old = model.add_node_masks()
    model.reset_hooks(including_permanent=True)
    assert not old.attached and torch.equal(run(model, prompts.clean), plain)
    old.remove()
    assert [p.requires_grad for p in model.parameters()] == trainable
    model.add_node_masks()
    model.remove_node_masks()


def test_a_copy_made_before_attaching_is_untouched(model: Any, prompts: tlnp.PromptPairs) -> None:
    twin, plain = copy.deepcopy(model), run(model, prompts.clean)
    masks = model.add_node_masks(ablation="zero")
    try:
        masks.set_to(tlnp.Circuit.empty(masks.space))
        assert not torch.equal(run(model, prompts.clean), plain)
        assert torch.equal(run(twin, prompts.clean), plain) and n_hooks(twin) == 0
        assert any(p.requires_grad for p in twin.parameters())
        other = twin.add_node_masks()  # masks of its own, at the same time
        assert torch.equal(run(twin, prompts.clean), plain)
        twin.remove_node_masks()
        assert masks.attached and not other.attached
    finally:
        masks.remove()


def test_a_state_dict_holds_no_masks(model: Any) -> None:
    before = set(model.state_dict())
    model.add_node_masks()
    try:
        assert set(model.state_dict()) == before
    finally:
        model.remove_node_masks()


def test_one_hot_heads_on_the_corrupted_base_are_transformer_lens_patching(model: Any, prompts: tlnp.PromptPairs) -> None:
    base, space = swapped(prompts), find_nodes(model).restrict(["head"])
    with torch.no_grad():
        want = patching.get_act_patch_attn_head_out_all_pos(
            model, prompts.corrupted, cache_of(model, prompts.clean), lambda logits: metric_of(prompts, logits))
        got, corrupted = torch.zeros_like(want), metric_of(prompts, model(prompts.corrupted))
        for layer, head in torch.cartesian_prod(torch.arange(want.shape[0]), torch.arange(want.shape[1])).tolist():
            gates = {key: torch.zeros(shape) for key, shape in space.shapes.items()}
            gates[GateKey("head", layer)][head] = 1
            with (~tlnp.Circuit(space, gates)).applied(model, base):
                got[layer, head] = metric_of(prompts, model(base.clean))
    assert (want - corrupted).abs().max() > 0.5
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    effects = tlnp.crosscheck.activation_patching(model, prompts, ["head"], progress=False)
    for layer in range(want.shape[0]):
        effect = effects[f"blocks.{layer}.attn.hook_z"]
        torch.testing.assert_close(effect, (want[layer] - corrupted)[:, None].expand_as(effect), rtol=1e-5, atol=1e-5)


class Linear:
    """A gate whose mask is its score, so that gradients to scores are gradients to masks."""

    open_score, closed_score = 1.0, 0.0

    def value(self, score: Tensor) -> Tensor:
        return score

    def sample(self, score: Tensor, generator: torch.Generator | None) -> Tensor:
        return score

    def probability(self, score: Tensor) -> Tensor:
        return score

    def kept(self, score: Tensor) -> Tensor:
        return score > 0.5


def attribution(model: Any, prompts: tlnp.PromptPairs, hook: str) -> Tensor:
    """Attribution patching by hand: `(clean - corrupted) * d metric / d activation` on the corrupted run, summed over prompts
    and positions. For hook_resid_post, of what the block adds."""
    seen: list[Tensor] = []

    def keep(activation: Tensor, hook: Any) -> Tensor:
        seen.append(activation.detach().requires_grad_())
        return seen[-1]

    logits = model.run_with_hooks(prompts.corrupted, fwd_hooks=[(hook, keep)])
    (grad,) = torch.autograd.grad(metric_of(prompts, logits), seen)
    difference = cache_of(model, prompts.clean)[hook] - cache_of(model, prompts.corrupted)[hook]
    if hook.endswith("hook_resid_post"):
        pre = hook.replace("post", "pre")
        difference = difference - (cache_of(model, prompts.clean)[pre] - cache_of(model, prompts.corrupted)[pre])
    return (difference * grad).sum((0, 1))


def test_the_mask_gradient_on_the_corrupted_base_is_attribution_patching(model: Any, prompts: tlnp.PromptPairs) -> None:
    # d/dm of m * corrupted + (1 - m) * clean at m = 1; the share of the clean activation is 1 - m, 0 here: hence the sign
    masks = model.add_node_masks(gate=Linear())
    try:
        with masks.paired(swapped(prompts)):
            metric_of(prompts, model(prompts.corrupted)).backward()
        scores = {key: -masks.score(key).grad for key in masks.space.shapes}  # type: ignore[operator]
    finally:
        masks.remove()
    largest = 0.0
    for key, got in scores.items():
        want = attribution(model, prompts, key.hook)
        want = want.sum(tuple(range(got.ndim, want.ndim))) if want.ndim > got.ndim else want
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")
        largest = max(largest, float(want.abs().max()))
    assert largest > 0.1
