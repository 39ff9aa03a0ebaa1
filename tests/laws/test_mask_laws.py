"""Laws of attached masks and applied circuits, on the embedded model as each TransformerLens class there is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from circuits import full_logits, random_circuit
from torch import Tensor

import tl_nodeprune as tlnp
from tl_nodeprune.nodes.space import GateKey

Toy = tuple[Any, tlnp.PromptPairs]
SUBSETS = [None, ("layer",), ("attn", "mlp"), ("head", "mlp_neuron"), ("layer", "mlp_out"),
           ("attn_neuron", "mlp_neuron", "mlp_out")]


@dataclass(frozen=True)
class Linear:
    """mask = score: a gate whose gradient at 0 is not clipped, so that it can be checked against a finite difference."""

    open_score: float = 1.0
    closed_score: float = 0.0

    def value(self, score: Tensor) -> Tensor:
        return score

    def sample(self, score: Tensor, generator: torch.Generator | None) -> Tensor:
        return score

    def probability(self, score: Tensor) -> Tensor:
        return score

    def kept(self, score: Tensor) -> Tensor:
        return score > 0.5


@pytest.mark.parametrize("granularities", SUBSETS)
def test_all_open_is_the_model_bit_for_bit(each_toy: Toy, granularities: Any) -> None:
    model, prompts = each_toy
    before = model(prompts.clean)
    model.add_node_masks(granularities)
    try:
        assert torch.equal(model(prompts.clean), before)  # needs no pair while nothing is closed
        with torch.no_grad():
            assert torch.equal(model(prompts.clean), before)
    finally:
        model.remove_node_masks()


@pytest.mark.parametrize("granularities", [None, ("layer",), ("attn", "mlp"), ("head", "mlp_out"), ("attn_neuron", "mlp")])
def test_all_closed_is_the_corrupted_run(each_toy: Toy, granularities: Any) -> None:
    model, prompts = each_toy
    rows = torch.arange(len(prompts))
    # the embedding is no node: the law holds where both prompts have the same token
    assert torch.equal(prompts.clean[rows, prompts.answer_positions], prompts.corrupted[rows, prompts.answer_positions])
    clean, corrupted = (model(ids)[rows, prompts.answer_positions] for ids in (prompts.clean, prompts.corrupted))
    masks = model.add_node_masks(granularities)
    try:
        masks.set_to(tlnp.Circuit.empty(masks.space))
        with masks.paired(prompts), torch.no_grad():
            out = model(prompts.clean)[rows, prompts.answer_positions]
    finally:
        model.remove_node_masks()
    torch.testing.assert_close(out, corrupted, atol=1e-4, rtol=0)
    assert (out - clean).abs().max() > 1  # negative control: the two runs differ


def test_closing_without_a_pair_raises_and_says_so(toy: Toy) -> None:
    model, prompts = toy
    masks = model.add_node_masks()
    try:
        masks.set_to(tlnp.Circuit.empty(masks.space))
        with pytest.raises(RuntimeError, match=r"blocks\.0\..*masks\.paired"):
            model(prompts.clean)
        for n in (5, 1):  # also one prompt, which would broadcast
            with masks.paired(prompts[:n]), pytest.raises(ValueError, match=rf"\({n}, 17\).*\(24, 17\)"):
                model(prompts.clean)
        with masks.inactive():
            assert torch.isfinite(model(prompts.clean)).all()
    finally:
        model.remove_node_masks()


@pytest.mark.parametrize("granularities", SUBSETS)
@pytest.mark.parametrize("ablation", ["interchange", "zero", "mean", "optimal"])
def test_masks_circuit_applied_and_fwd_hooks_agree(toy: Toy, granularities: Any, ablation: str) -> None:
    model, prompts = toy
    masks = model.add_node_masks(granularities, ablation=ablation)
    try:
        masks.set_to(random_circuit(masks.space, 1))
        with masks.paired(prompts), torch.no_grad():
            attached = model(prompts.clean)
        circuit = masks.to_circuit()
    finally:
        model.remove_node_masks()
    with torch.no_grad():
        hooked = model.run_with_hooks(prompts.clean, fwd_hooks=circuit.fwd_hooks(model, prompts))
        with circuit.applied(model, prompts):
            applied = model(prompts.clean)
    assert torch.equal(applied, hooked)
    torch.testing.assert_close(applied, attached, atol=1e-4, rtol=1e-4)


def test_closed_nodes_hold_their_stand_in_in_the_cache(toy: Toy) -> None:
    model, prompts = toy
    _, corrupted = model.run_with_cache(prompts.corrupted)
    closed = torch.tensor([False, True, False, True])
    circuit = tlnp.Circuit(tlnp.nodes.probe.find_nodes(model).restrict(("head",), layers=[0]), {GateKey("head", 0): ~closed})
    with circuit.applied(model, prompts):
        _, cache = model.run_with_cache(prompts.clean)
    z = "blocks.0.attn.hook_z"
    assert torch.equal(cache[z][:, :, closed], corrupted[z][:, :, closed])


def test_removed_masks_leave_nothing_and_weights_as_they_were(fresh_toy: Toy, no_hooks_left: Callable[[Any], None]) -> None:
    model, prompts = fresh_toy
    frozen_by_user = next(iter(model.parameters()))
    frozen_by_user.requires_grad_(False)
    before = [p.requires_grad for p in model.parameters()]
    values = [p.clone() for p in model.parameters()]
    masks = model.add_node_masks()
    assert masks.attached and not any(p.requires_grad for p in model.parameters())
    model.remove_node_masks()
    assert not masks.attached
    no_hooks_left(model)
    assert [p.requires_grad for p in model.parameters()] == before
    assert all(torch.equal(a, b) for a, b in zip(values, model.parameters(), strict=True))


@pytest.mark.parametrize("hook", ["blocks.1.attn.hook_z", "blocks.2.hook_mlp_out"])
def test_an_exception_in_a_forward_leaves_nothing(toy: Toy, no_hooks_left: Callable[[Any], None], hook: str) -> None:
    model, prompts = toy
    circuit = random_circuit(tlnp.nodes.probe.find_nodes(model), 0)

    def explode(activation: Tensor, hook: Any) -> Tensor:
        raise ArithmeticError("user hook")

    with pytest.raises(ArithmeticError, match="user hook"), circuit.applied(model, prompts):
        model.run_with_hooks(prompts.clean, fwd_hooks=[(hook, explode)])
    no_hooks_left(model)
    assert torch.equal(full_logits(model, prompts), full_logits(model, prompts))
    with circuit.applied(model, prompts):  # and the model is free to be used again
        pass


@pytest.mark.parametrize("gate", [tlnp.HardConcrete(), tlnp.HardConcrete(straight_through=True), tlnp.StepGate()])
def test_only_gates_get_gradients(toy: Toy, gate: Any) -> None:
    model, prompts = toy
    masks = model.add_node_masks(gate=gate)
    try:
        with torch.no_grad():
            for score in masks.parameters():
                score.fill_(0.3)
        with masks.paired(prompts), masks.sampling(torch.Generator().manual_seed(0)):
            (model(prompts.clean)[:, -1].pow(2).mean() + masks.expected_size()).backward()
        assert all(p.grad is None for p in model.parameters())
        assert all(score.grad is not None and torch.isfinite(score.grad).all() for score in masks.parameters())
        assert {id(p) for p in masks.parameters()} == {id(masks.score(key)) for key in masks.space.shapes}
        assert sum(float(score.grad.abs().sum()) for score in masks.parameters()) > 0  # type: ignore[union-attr]
    finally:
        model.remove_node_masks()


def test_gradient_at_closed_masks_is_the_finite_difference(toy: Toy) -> None:
    model, prompts = toy
    masks = model.add_node_masks(("head", "mlp"), gate=Linear())
    rows = torch.arange(len(prompts))

    def loss() -> Tensor:
        return prompts.logit_diff(model(prompts.clean)[rows, prompts.answer_positions]).mean()  # type: ignore[no-any-return]

    try:
        masks.set_to(tlnp.Circuit.empty(masks.space))
        with masks.paired(prompts):
            loss().backward()
            for key, index in ((GateKey("head", 0), 1), (GateKey("head", 2), 3), (GateKey("mlp", 1), 0), (GateKey("mlp", 2), 0)):
                score, values, eps = masks.score(key), [], 1e-2
                for delta in (eps, -eps):
                    with torch.no_grad():
                        score.view(-1)[index] = delta
                        values.append(loss())
                        score.view(-1)[index] = 0.0
                difference = (values[0] - values[1]) / (2 * eps)
                torch.testing.assert_close(score.grad.view(-1)[index], difference, rtol=2e-2, atol=5e-3)  # type: ignore[union-attr]
    finally:
        model.remove_node_masks()


def test_as_dict_is_the_product_of_nested_gates(toy: Toy) -> None:
    model, _ = toy
    masks = model.add_node_masks()
    try:
        with torch.no_grad():
            for i, score in enumerate(masks.parameters()):
                score.copy_(torch.linspace(-1, 1, score.numel()).view(score.shape) + 0.01 * i)
        table = masks.as_dict()
        value = lambda name, layer: masks.gate.value(masks.score(GateKey(name, layer))).detach()  # noqa: E731
        for layer in range(3):
            z = value("head", layer)[:, None] * value("attn_neuron", layer)
            assert torch.equal(table[f"blocks.{layer}.attn.hook_z"], z)
            assert torch.equal(table[f"blocks.{layer}.hook_mlp_out"], value("mlp", layer) * value("mlp_out", layer))
            assert torch.equal(table[f"blocks.{layer}.mlp.hook_post"], value("mlp_neuron", layer))
            for short, name in (("hook_attn_out", "attn"), ("hook_resid_post", "layer")):
                mask = table[f"blocks.{layer}.{short}"]
                assert mask.shape == () and torch.equal(mask, value(name, layer))
        assert list(table) == list(masks.space.hooks) and not any(m.requires_grad for m in table.values())
    finally:
        model.remove_node_masks()


@pytest.mark.parametrize("reset", ["reset_hooks", "run_with_hooks"])
def test_transformer_lens_own_resets_do_not_take_masks_off(fresh_toy: Toy, reset: str) -> None:
    model, prompts = fresh_toy
    masks = model.add_node_masks(("head",), ablation="zero")
    masks.set_to(tlnp.Circuit.empty(masks.space))
    with torch.no_grad():
        masked = model(prompts.clean)
        if reset == "reset_hooks":
            model.reset_hooks()
        else:
            model.run_with_hooks(prompts.clean, fwd_hooks=[("blocks.0.hook_resid_pre", lambda x, hook: x)], clear_contexts=True)
        assert torch.equal(model(prompts.clean), masked)
    assert masks.attached
    with pytest.raises(RuntimeError, match="attached to this model already"):  # they still act, so they must still be seen
        model.add_node_masks(("mlp",))
    model.remove_node_masks()
