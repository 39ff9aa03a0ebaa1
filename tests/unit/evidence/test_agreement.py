"""A circuit against scores: figures by hand and by brute force, the nodes in disagreement, and what cannot be compared."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor, tensor

import tl_nodeprune as tlnp
from tl_nodeprune.circuit.effects import Effects
from tl_nodeprune.evidence.agreement import Agreement, agreement
from tl_nodeprune.evidence.crosscheck import attribution_patching
from tl_nodeprune.nodes.probe import find_nodes
from tl_nodeprune.nodes.space import GateKey, NodeSpace

Toy = tuple[Any, tlnp.PromptPairs]


def heads(kept: list[list[int]], scores: list[list[float]]) -> tuple[tlnp.Circuit, dict[str, Tensor]]:
    """A circuit over heads only, [layer][head], and scores for it."""
    shapes = {GateKey("head", layer): (len(row),) for layer, row in enumerate(kept)}
    present = shapes | {GateKey("attn_neuron", layer): (len(row), 2) for layer, row in enumerate(kept)}
    space = NodeSpace(shapes, present, d_model=4, n_layers=len(kept), kv_heads=1, gated_mlp=False)
    circuit = tlnp.Circuit(space, {GateKey("head", layer): tensor(row) for layer, row in enumerate(kept)})
    return circuit, {f"blocks.{layer}.attn.hook_z": tensor(row)[:, None].expand(-1, 2) for layer, row in enumerate(scores)}


def test_figures_by_hand() -> None:
    """Kept have |score| 5, 3, 0; cut 4, 1, 0.1: of nine pairs the kept one is larger in 3 + 2 + 0."""
    row = agreement(*heads([[1, 0, 1], [0, 1, 0]], [[5.0, -4.0, -3.0], [1.0, 0.0, 0.1]])).of("head")
    assert (row.n_nodes, row.n_kept, row.reason) == (6, 3, "")
    assert row.precision_at_k == pytest.approx(2 / 3) and row.auroc == pytest.approx(5 / 9)
    assert row.rank_correlation == pytest.approx(0.0976, abs=1e-4)  # ranks 6 4 1 against 5 3 2: cov 1/12 over sd 1.7078 * 0.5
    assert [str(node) for node in row.kept_without_effect] == ["head 1.1 (+0)"]
    assert [(node.name, node.score) for node in row.cut_with_effect] == [("head 0.1", -4.0), ("head 1.0", 1.0)]


def test_share_moves_the_line_between_effect_and_none() -> None:
    circuit, scores = heads([[1, 0, 1], [0, 1, 0]], [[5.0, -4.0, -3.0], [1.0, 0.0, 0.1]])
    strict, loose = agreement(circuit, scores, share=0.9).of("head"), agreement(circuit, scores, share=0.01).of("head")
    assert [node.name for node in strict.kept_without_effect] == ["head 1.1", "head 0.2"] and not strict.cut_with_effect
    assert [node.name for node in loose.cut_with_effect] == ["head 0.1", "head 1.0", "head 1.2"]


def test_ties_count_by_their_average() -> None:
    row = agreement(*heads([[1, 1, 0, 0]], [[2.0, 1.0, 1.0, -1.0]])).of("head")
    assert row.precision_at_k == pytest.approx((1 + 1 / 3) / 2)  # the second place is shared by three, one of them kept
    assert row.auroc == pytest.approx((2 + 2 * 0.5) / 4)


def test_perfect_and_opposite_scores() -> None:
    perfect = agreement(*heads([[1, 0, 0], [0, 0, 1]], [[-9.0, 1.0, 2.0], [0.0, 0.5, 8.0]])).of("head")
    assert (perfect.precision_at_k, perfect.auroc) == (1, 1) and perfect.rank_correlation > 0.8
    opposite = agreement(*heads([[1, 0, 0], [0, 0, 1]], [[0.0, 5.0, 4.0], [3.0, 2.0, 0.0]])).of("head")
    assert (opposite.precision_at_k, opposite.auroc) == (0, 0) and opposite.rank_correlation < -0.8
    assert len(opposite.kept_without_effect) == 2 and len(opposite.cut_with_effect) == 4


def test_random_scores_are_no_agreement() -> None:
    """Negative control: many nodes, scores that know nothing of the circuit."""
    g = torch.Generator().manual_seed(0)
    row = agreement(*heads((torch.rand(4, 1000, generator=g) < 0.3).int().tolist(), torch.randn(4, 1000, generator=g).tolist())).of("head")
    assert abs(row.auroc - 0.5) < 0.03 and abs(row.rank_correlation) < 0.05 and abs(row.precision_at_k - row.n_kept / row.n_nodes) < 0.04


@pytest.mark.parametrize(("kept", "scores", "reason"), [
    ([[1, 1, 1]], [[1.0, 2.0, 3.0]], "head: the circuit keeps all of these nodes, so there is nothing to rank"),
    ([[0, 0, 0]], [[1.0, 2.0, 3.0]], "head: the circuit keeps none of these nodes"),
    ([[1, 0, 1]], [[2.0, -2.0, 2.0]], r"head: all \|scores\| are the same"),
])
def test_nothing_to_rank_is_nan_with_a_reason(kept: list[list[int]], scores: list[list[float]], reason: str) -> None:
    found = agreement(*heads(kept, scores))
    row = found.of("head")
    assert all(math.isnan(value) for value in (row.rank_correlation, row.precision_at_k, row.auroc))
    assert re.search(reason, str(found)) and found.to_frame()["reason"][0] == row.reason


def test_scores_of_zero_are_no_effect() -> None:
    row = agreement(*heads([[1, 0, 1]], [[0.0, 0.0, 0.0]])).of("head")
    assert len(row.kept_without_effect) == 2 and not row.cut_with_effect


def some_circuit(space: NodeSpace, seed: int = 0) -> tlnp.Circuit:
    g = torch.Generator().manual_seed(seed)
    return tlnp.Circuit(space, {key: torch.rand(shape, generator=g) < 0.6 for key, shape in space.shapes.items()})


def test_effects_are_compared_at_every_granularity_in_common(toy: Toy) -> None:
    model, prompts = toy
    effects, circuit = attribution_patching(model, prompts[:6]), some_circuit(find_nodes(model))
    found = agreement(circuit, effects)
    assert [row.granularity for row in found.rows] == list(tlnp.GRANULARITIES)
    frame = found.to_frame().set_index("granularity")
    for name, row in ((row.granularity, row) for row in found.rows):
        assert row.n_kept == circuit.count()[name] and row.n_nodes == circuit.space.totals()[name]
        assert frame.loc[name, "cut_with_effect"] == len(row.cut_with_effect)
        for node in row.kept_without_effect[:3] + row.cut_with_effect[:3]:
            assert float(effects.of(name)[node.layer][node.index]) == pytest.approx(node.score)
            assert bool(circuit.live(name, node.layer)[node.index]) == (node in row.kept_without_effect)
    assert "attribution patching (denoise)" in str(found) and "5% of the granularity's largest" in str(found)
    assert f"and {len(found.of('mlp_neuron').cut_with_effect) - 8} more" in str(found)
    some = agreement(some_circuit(find_nodes(model).restrict(["head", "mlp"], [1, 2])), effects)
    assert [row.granularity for row in some.rows] == ["mlp", "head"] and some.of("head").n_nodes == 8
    with pytest.raises(KeyError, match="'layer' was not compared; compared were mlp, head"):
        some.of("layer")


def test_a_mapping_is_about_the_finest_granularity_of_each_hook_point(toy: Toy) -> None:
    model, prompts = toy
    effects, circuit = attribution_patching(model, prompts[:6]), some_circuit(find_nodes(model))
    found = agreement(circuit, dict(effects))
    assert [row.granularity for row in found.rows] == ["layer", "attn", "attn_neuron", "mlp_neuron", "mlp_out"]
    assert found.rows == tuple(agreement(circuit, effects).of(row.granularity) for row in found.rows)
    assert isinstance(found, Agreement) and "given scores" in str(found)
    by_head = {f"blocks.{layer}.attn.hook_z": scores for layer, scores in effects.of("head").items()}
    coarse = some_circuit(find_nodes(model).restrict(["head"]))
    assert agreement(coarse, by_head).rows == agreement(coarse, effects).rows


def test_a_circuit_is_in_full_agreement_with_its_own_masks(toy: Toy) -> None:
    circuit = some_circuit(find_nodes(toy[0]))
    for row in agreement(circuit, circuit).rows:
        if not row.reason:
            assert (row.auroc, row.precision_at_k) == (1, 1) and row.rank_correlation == pytest.approx(1)
        assert not row.kept_without_effect and not row.cut_with_effect


def test_what_cannot_be_compared_is_named(toy: Toy, other_model: Any) -> None:
    model, prompts = toy
    effects, circuit = attribution_patching(model, prompts[:2], ["head"]), some_circuit(find_nodes(model).restrict(["head"]))
    with pytest.raises(ValueError, match=r"of another model than the scores: it has head nodes \[2\] in layer 0, the scores \[4\]"):
        agreement(some_circuit(find_nodes(other_model)), effects)
    deeper = Effects({key: gate for key, gate in effects.gates.items() if key.layer < 2}, effects.space, "denoise", "m", 1.0, 0.0, 2)
    with pytest.raises(ValueError, match=r"head nodes \[4\] in layer 2, the scores have none there"):
        agreement(circuit, deeper)
    with pytest.raises(ValueError, match="the scores are for head, the circuit is over mlp: nothing to compare"):
        agreement(some_circuit(find_nodes(model).restrict(["mlp"])), effects)
    with pytest.raises(TypeError, match="circuit must be a Circuit, got Effects"):
        agreement(effects, circuit)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="scores must be Effects or a mapping from hook name to tensor, got Tensor"):
        agreement(circuit, torch.zeros(3))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the scores are for nothing"):
        agreement(circuit, {})
    with pytest.raises(ValueError, match="have no 'blocks.2.attn.hook_z', where the circuit has head nodes"):
        agreement(circuit, {hook: effects[hook] for hook in list(effects)[:2]})
    with pytest.raises(ValueError, match=r"at 'blocks.0.attn.hook_z' are \[3\], the circuit's mask is \[4, 24\]"):
        agreement(circuit, {hook: torch.ones(3) for hook in effects})
    with pytest.raises(ValueError, match=r"\[4, 24\] differ within a node.*gates 'head' there; give one score per node, \[4\]"):
        agreement(circuit, {hook: torch.arange(96).view(4, 24) for hook in effects})
    with pytest.raises(ValueError, match="the head scores of layer 0 hold a NaN or inf"):
        agreement(circuit, {hook: torch.full((4,), float("nan")) for hook in effects})
    for share in (0, -1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=f"share={share}; it must be above 0 and at most 1"):
            agreement(circuit, effects, share=share)
