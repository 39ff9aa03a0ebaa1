"""The same results on HookedTransformer (TransformerLens 3) and TransformerBridge (3 and 4), and in bfloat16."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from integration_support import NO_HOOKED, HookedTransformer, bridge, hf_model, n_hooks, random_circuit, random_pairs, run
from torch import Tensor

import tl_nodeprune as tlnp
from tl_nodeprune.nodes.probe import find_nodes

needs_both = pytest.mark.skipif(HookedTransformer is None, reason=NO_HOOKED)
Both = tuple[Any, Any, tlnp.PromptPairs]
ABLATIONS = ("interchange", "mean", "zero", "optimal")


@pytest.fixture(scope="module")
def both() -> Both:
    """The embedded model as a HookedTransformer and as a bridge, with the same prompts."""
    hooked, prompts = tlnp.toy.load(n=48, model_class="HookedTransformer")
    bridged, again = tlnp.toy.load(n=48)
    assert torch.equal(prompts.clean, again.clean) and torch.equal(prompts.corrupted, again.corrupted)
    return hooked, bridged, prompts


def assert_same_logits(one: Tensor, other: Tensor) -> None:
    """Equal to 1e-5 of the logits' scale, and to 2e-5 at any scale up to 10."""
    scale = max(1.0, float(one.abs().max()) / 2)
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("task", ["ioi", "gendered_pronoun", "greater_than"])
def test_the_toy_loads_as_a_bridge_that_knows_its_tasks(task: str) -> None:
    from transformer_lens.model_bridge import TransformerBridge

    model, prompts = tlnp.toy.load(task, n=40)
    assert isinstance(model, TransformerBridge) and not model.training and len(prompts) == 40
    assert len(prompts.correct(model)) >= 0.9 * len(prompts)
    assert find_nodes(model).granularities == tlnp.GRANULARITIES


@pytest.mark.skipif(HookedTransformer is not None, reason="TransformerLens 3 has HookedTransformer")
def test_asking_for_a_hooked_transformer_without_one_is_an_import_error() -> None:
    with pytest.raises(ImportError):
        tlnp.toy.load(model_class="HookedTransformer")


def test_the_methods_are_on_every_model_class() -> None:
    from transformer_lens.model_bridge import TransformerBridge

    for cls in filter(None, (TransformerBridge, HookedTransformer)):
        assert cls.add_node_masks is tlnp.add_node_masks and cls.remove_node_masks is tlnp.remove_node_masks
    assert "granularities" in inspect.signature(TransformerBridge.add_node_masks).parameters


@needs_both
def test_both_classes_have_the_same_nodes(both: Both) -> None:
    hooked, bridged, _ = both
    a, b = find_nodes(hooked), find_nodes(bridged)
    assert (a.shapes, a.hooks, a.kv_heads, a.gated_mlp, a.d_model) == (b.shapes, b.hooks, b.kv_heads, b.gated_mlp, b.d_model)
    assert tlnp.Circuit.full(a).parameters_total == tlnp.Circuit.full(b).parameters_total


@needs_both
@pytest.mark.parametrize("ablation", ABLATIONS)
@pytest.mark.parametrize("seed", range(3))
def test_both_classes_give_the_same_logits_under_random_masks(both: Both, ablation: str, seed: int) -> None:
    hooked, bridged, prompts = both
    space, logits, plain = find_nodes(bridged), [], run(bridged, prompts.clean)
    assert_same_logits(run(hooked, prompts.clean), plain)
    for model in (hooked, bridged):
        fitted = tlnp.Ablation(ablation).fit(model, prompts, space.hooks)
        with random_circuit(space, fitted, seed).applied(model, prompts):
            logits.append(run(model, prompts.clean))
    assert_same_logits(*logits)
    assert (logits[1] - plain).abs().max() > 0.1


@needs_both
@pytest.mark.parametrize("ablation", ABLATIONS)
def test_attached_masks_give_both_classes_the_same_logits_and_gradients(both: Both, ablation: str) -> None:
    hooked, bridged, prompts = both
    found = []
    for model in (hooked, bridged):
        masks = model.add_node_masks(ablation=ablation)
        try:
            with torch.no_grad():
                for score in masks.scores.values():  # halfway open, so that gradients flow
                    score.copy_(torch.randn(score.shape, generator=torch.Generator().manual_seed(score.numel())))
            with masks.paired(prompts):
                logits = model(prompts.clean)[torch.arange(len(prompts)), prompts.answer_positions]
            grads = torch.autograd.grad(prompts.logit_diff(logits).mean(), list(masks.parameters()))
        finally:
            masks.remove()
        found.append((logits.detach(), torch.cat([grad.flatten() for grad in grads])))
    assert_same_logits(found[0][0], found[1][0])
    assert found[0][1].abs().max() > 1e-3
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-3, atol=1e-5)


@needs_both
def test_both_classes_find_nearly_the_same_circuit(both: Both) -> None:
    hooked, bridged, prompts = both
    circuits = []
    for model in (hooked, bridged):
        masks = model.add_node_masks()
        try:
            circuits.append(masks.prune(prompts, max_kl=0.1, steps=60, seed=0, progress=False))
        finally:
            masks.remove()
    iou = circuits[0].circuit.iou(circuits[1].circuit)
    print(f"iou {iou:.4f}, sizes {[c.circuit.size for c in circuits]}, kl {[round(c.kl, 4) for c in circuits]}")
    assert all(c.converged for c in circuits) and iou >= 0.95
    evaluations = [tlnp.evaluate(model, circuits[0].circuit, prompts) for model in (hooked, bridged)]
    assert evaluations[0].kl == pytest.approx(evaluations[1].kl, abs=1e-4)
    assert evaluations[0].accuracy == evaluations[1].accuracy


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_a_bfloat16_model_runs_with_float32_masks(tmp_path: Path, ablation: str) -> None:
    model, prompts = bridge(hf_model("llama").to(torch.bfloat16), tmp_path), random_pairs(8)
    plain, before = run(model, prompts.clean), n_hooks(model)
    assert plain.dtype == torch.bfloat16
    masks = model.add_node_masks(ablation=ablation)
    assert torch.equal(run(model, prompts.clean), plain)
    assert {p.dtype for p in masks.parameters()} == {torch.float32}
    with masks.paired(prompts), masks.sampling(torch.Generator().manual_seed(0)):
        logits = model(prompts.clean)
        logits.float().pow(2).mean().backward()
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in masks.parameters())
    result = masks.prune(prompts, max_nodes=0.5, steps=5, progress=False)
    masks.remove()
    assert n_hooks(model) == before and {p.dtype for p in model.parameters()} == {torch.bfloat16}
    with result.circuit.applied(model, prompts):
        assert run(model, prompts.clean).dtype == torch.bfloat16


def test_all_closed_in_bfloat16_is_the_corrupted_run_to_its_precision(tmp_path: Path) -> None:
    model, prompts = bridge(hf_model("llama").to(torch.bfloat16), tmp_path), random_pairs()
    want, plain = run(model, prompts.corrupted)[:, -1], run(model, prompts.clean)[:, -1]
    with tlnp.Circuit.empty(find_nodes(model)).applied(model, prompts):
        got = run(model, prompts.clean)[:, -1]
    assert (got - want).abs().max() < 0.1 * (plain - want).abs().max()
