"""Numbers worked out by hand: parameters kept, live nodes, KL, the paper's sparsity."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

import tl_nodeprune as tlnp
from tl_nodeprune.masks.losses import choice_hinge
from tl_nodeprune.nodes.parameters import count_parameters
from tl_nodeprune.nodes.space import GateKey, NodeSpace, combine, settle


def space_of(heads: int = 2, d_head: int = 3, d_mlp: int = 5, d_model: int = 4, kv_heads: int = 2, gated: bool = False,
             granularities: tuple[str, ...] = tlnp.GRANULARITIES) -> NodeSpace:
    shapes = {"layer": (), "attn": (), "mlp": (), "head": (heads,), "attn_neuron": (heads, d_head), "mlp_neuron": (d_mlp,),
              "mlp_out": (d_model,)}
    present = {GateKey(name, 0): shape for name, shape in shapes.items()}
    gated_here = {key: shape for key, shape in present.items() if key.granularity in granularities}
    return NodeSpace(gated_here, present, d_model=d_model, n_layers=1, kv_heads=kv_heads, gated_mlp=gated)


def open_gates(space: NodeSpace) -> dict[GateKey, torch.Tensor]:
    return {key: torch.ones(shape, dtype=torch.bool) for key, shape in space.shapes.items()}


def test_full_multi_head() -> None:
    # Q, K, V, O: 4 matrices of 4 x (2 * 3); W_in and W_out 4 x 5
    assert count_parameters(space_of(), open_gates(space_of())) == 4 * 24 + 2 * 20


def test_full_grouped_query_and_gated_mlp() -> None:
    space = space_of(heads=4, kv_heads=2, gated=True)
    # Q, O: 4 x 12 each; K, V: 4 x 6 each; W_gate, W_in, W_out: 4 x 5 each
    assert count_parameters(space, open_gates(space)) == 2 * 48 + 2 * 24 + 3 * 20


def test_pruned_multi_head() -> None:
    space = space_of()
    gates = open_gates(space)
    gates[GateKey("attn_neuron", 0)] = torch.tensor([[1, 1, 0], [0, 0, 0]]).bool()
    gates[GateKey("mlp_neuron", 0)] = torch.tensor([1, 1, 1, 0, 0]).bool()
    gates[GateKey("mlp_out", 0)] = torch.tensor([1, 0, 0, 0]).bool()
    # one head: Q and K whole (3 dims each), V and O 2 dims, x d_model 4; 3 neurons with 4 in and 1 out
    assert count_parameters(space, settle(space, gates)) == 4 * (3 + 3 + 2 + 2) + 3 * (4 + 1)


def test_pruned_grouped_query_and_gated_mlp() -> None:
    space = space_of(heads=4, kv_heads=2, gated=True)
    gates = open_gates(space)
    # heads 0, 1 share key head 0 and read value dims {0} and {1}; heads 2, 3 and so key head 1 are dead
    gates[GateKey("attn_neuron", 0)] = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 0], [0, 0, 0]]).bool()
    gates[GateKey("mlp_neuron", 0)] = torch.tensor([1, 1, 0, 0, 0]).bool()
    # Q: 2 heads x 3, K: 1 x 3, V: dims 0 and 1, O: 1 + 1; neurons: 2 x (4 gate + 4 in + 4 out)
    assert count_parameters(space, settle(space, gates)) == 4 * (6 + 3 + 2 + 2) + 2 * 12


def weighing(granularities: tuple[str, ...], **weights: int) -> NodeSpace:
    return replace(space_of(granularities=granularities), weights=tuple((name, 0, n) for name, n in weights.items()))


def test_weights_that_no_node_owns_count_while_any_node_there_is_live() -> None:
    space = weighing(tlnp.GRANULARITIES, attn=4 * 24 + 7, mlp=2 * 20 + 11, layer=13)
    gates = open_gates(space)
    assert count_parameters(space, gates) == 4 * 24 + 7 + 2 * 20 + 11 + 13
    gates[GateKey("head", 0)][0] = False
    assert count_parameters(space, settle(space, gates)) == 2 * 24 + 7 + 2 * 20 + 11 + 13
    gates[GateKey("attn", 0)].zero_()
    assert count_parameters(space, settle(space, gates)) == 2 * 20 + 11 + 13
    gates[GateKey("mlp", 0)].zero_()
    assert count_parameters(space, settle(space, gates)) == 13
    gates[GateKey("layer", 0)].zero_()
    assert count_parameters(space, settle(space, gates)) == 0


def test_without_heads_and_neurons_attention_and_mlp_count_whole() -> None:
    space = weighing(("layer", "attn", "mlp"), attn=100, mlp=1000)
    blocks = {key: shape for key, shape in space.present.items() if key.granularity in ("layer", "attn", "mlp", "mlp_out")}
    space = replace(space, present=blocks)
    for attn, mlp in [(1, 1), (1, 0), (0, 1), (0, 0)]:
        gates = open_gates(space) | {GateKey("attn", 0): torch.tensor(attn).bool(), GateKey("mlp", 0): torch.tensor(mlp).bool()}
        assert count_parameters(space, settle(space, gates)) == 100 * attn + 1000 * mlp


def test_a_block_with_weights_of_its_own_lives_on_without_its_attention_and_mlp() -> None:
    gates = {name: torch.tensor(name == "layer") for name in ("layer", "attn", "mlp")}
    for own, live in [({}, False), ({"layer": 13}, True)]:
        space = weighing(("layer", "attn", "mlp"), **own)
        settled = settle(space, {key: gates[key.granularity] for key in space.shapes})
        assert bool(settled[GateKey("layer", 0)]) is live
        assert (GateKey("layer", 0) in space.free()) is live


def test_an_mlp_with_no_output_needs_no_weights() -> None:
    space = space_of()
    gates = open_gates(space)
    gates[GateKey("mlp_out", 0)] = torch.zeros(4, dtype=torch.bool)
    assert count_parameters(space, settle(space, gates)) == 4 * 24


def test_coarse_gates_alone() -> None:
    space = space_of(granularities=("head", "mlp"))
    gates = {GateKey("head", 0): torch.tensor([True, False]), GateKey("mlp", 0): torch.tensor(False)}
    assert count_parameters(space, settle(space, gates)) == 4 * (4 * 3)


def test_ungated_nodes_count_whole() -> None:
    space = space_of(granularities=("mlp_neuron",))
    gates = {GateKey("mlp_neuron", 0): torch.tensor([1, 0, 0, 0, 0]).bool()}
    assert count_parameters(space, settle(space, gates)) == 4 * 24 + 8


def test_settle() -> None:
    space = space_of()
    gates = open_gates(space)
    gates[GateKey("head", 0)] = torch.tensor([True, False])
    gates[GateKey("attn_neuron", 0)] = torch.tensor([[0, 0, 0], [1, 1, 1]]).bool()  # the open head is hollow, the full one closed
    gates[GateKey("mlp_neuron", 0)] = torch.tensor([1, 0, 0, 0, 0]).bool()
    live = settle(space, gates)
    assert not live[GateKey("head", 0)].any() and not live[GateKey("attn_neuron", 0)].any() and not live[GateKey("attn", 0)]
    assert live[GateKey("mlp", 0)] and live[GateKey("layer", 0)]
    assert live[GateKey("mlp_neuron", 0)].tolist() == [True, False, False, False, False] and live[GateKey("mlp_out", 0)].all()
    gates[GateKey("mlp", 0)] = torch.tensor(False)  # now nothing is left, so the layer dies too
    assert not any(value.any() for value in settle(space, gates).values())


def test_settle_keeps_a_gate_above_something_ungated() -> None:
    space = space_of(granularities=("layer", "head"))
    live = settle(space, {GateKey("layer", 0): torch.tensor(True), GateKey("head", 0): torch.zeros(2)})
    assert live[GateKey("layer", 0)]  # its MLP is not gated and still runs


def test_combine() -> None:
    space = space_of()
    gates = {key: torch.full(shape, 0.5) for key, shape in space.shapes.items()}
    assert torch.equal(combine(space, "blocks.0.attn.hook_z", gates), torch.full((2, 3), 0.25))
    heads, gates = space_of(granularities=("head",)), {GateKey("head", 0): torch.tensor([1.0, 0.0])}
    assert combine(heads, "blocks.0.attn.hook_z", gates).tolist() == [[1, 1, 1], [0, 0, 0]]
    with pytest.raises(ValueError, match=r"blocks\.0\.hook_mlp_out is not gated; gated are blocks\.0\.attn\.hook_z"):
        combine(heads, "blocks.0.hook_mlp_out", gates)


def test_circuit_counts() -> None:
    space = space_of()
    gates = open_gates(space)
    gates[GateKey("attn_neuron", 0)] = torch.tensor([[1, 0, 0], [0, 0, 0]]).bool()
    circuit = tlnp.Circuit(space, gates)
    assert circuit.count() == {"layer": 1, "attn": 1, "mlp": 1, "head": 1, "attn_neuron": 1, "mlp_neuron": 5, "mlp_out": 4}
    assert (circuit.size, circuit.size_total, circuit.sparsity) == (10, 15, pytest.approx(1 / 3))
    assert circuit.nodes("attn_neuron") == [(0, 0, 0)] and circuit.nodes("layer") == [(0,)] and circuit.nodes("head") == [(0, 0)]
    assert circuit.parameters == 4 * (3 + 3 + 1 + 1) + 40 and circuit.parameters_total == 136


def test_kl_by_hand() -> None:
    full, logits = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log(), torch.tensor([[0.25, 0.75], [0.9, 0.1]]).log()
    want = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    torch.testing.assert_close(tlnp.kl_divergence(logits, full), torch.tensor([want, 0.0]))
    torch.testing.assert_close(tlnp.kl_divergence(logits + 7, full - 3), torch.tensor([want, 0.0]))  # softmax knows no offset


def test_choice_hinge_by_hand() -> None:
    pairs = tlnp.PromptPairs(torch.zeros(3, 2).long(), torch.zeros(3, 2).long(), torch.tensor([0, 0, 0]), torch.tensor([1, 1, 1]))
    full, logits = torch.tensor([[10.0, 0.0], [1.0, 0.0], [0.0, 2.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.5, 0.0]])
    assert choice_hinge(logits, full, pairs).tolist() == [1.0, 0.0, 1.5]  # half margins wanted: 2 (of at most 4), 0.5, -1


@pytest.mark.parametrize("weights", [{}, {"head": 3.0, "mlp": 0.0}])
def test_paper_sparsity_formula(weights: dict[str, float]) -> None:
    space = space_of(granularities=("head", "mlp", "attn_neuron"))
    masks = tlnp.NodeMasks(space)
    scores: dict[str, Any] = {"head": [0.5, -0.5], "mlp": 1.0, "attn_neuron": [[0.0] * 3, [2.0] * 3]}
    with torch.no_grad():
        for name, value in scores.items():
            masks.score(GateKey(name, 0)).copy_(torch.tensor(value))
    p = lambda s: 1 / (1 + math.exp(-(s - 2 / 3 * math.log(0.1 / 1.1))))  # noqa: E731
    want = (weights.get("head", 1) * (p(0.5) + p(-0.5)) / 2 + weights.get("mlp", 1) * p(1.0) + (p(0.0) + p(2.0)) / 2) / 3
    assert tlnp.PaperObjective(weights=weights).sparsity(masks).item() == pytest.approx(want, rel=1e-5)
    summed = tlnp.PaperObjective(weights=weights, summed=True).sparsity(masks).item()
    assert summed == pytest.approx(want * len(masks.space.shapes), rel=1e-5)
    # leaves: dims under their head, and the MLP
    size = 3 * (p(0.0) * p(0.5) + p(2.0) * p(-0.5)) + p(1.0)
    assert masks.expected_size().item() == pytest.approx(size, rel=1e-5)
