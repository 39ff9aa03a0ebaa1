"""Scores: order, sizes, errors; and `rank`: nested circuits, better than their start, nothing left behind."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import tl_nodeprune as tlnp
from tl_nodeprune.budget import Budget
from tl_nodeprune.nodes import GateKey
from tl_nodeprune.preference import preference
from tl_nodeprune.probe import find_nodes
from tl_nodeprune.ranking import LowestLoss, NodeScores, _Part
from tl_nodeprune.survey import survey

Toy = tuple[Any, tlnp.PromptPairs]
COARSE = ("head", "mlp")


def lot(model: Any, granularities: tuple[str, ...] | None = None, seed: int = 0) -> NodeScores:
    space = find_nodes(model).restrict(granularities)
    return NodeScores.from_flat(torch.rand(space.free_total(), generator=torch.Generator().manual_seed(seed)), space)


def leaves(circuit: tlnp.Circuit) -> torch.Tensor:
    return torch.cat([circuit.live(*key).flatten() for key in circuit.space.free()])


def test_the_best_nodes_are_kept_and_circuits_are_nested(toy: Toy) -> None:
    scores = lot(toy[0])
    before = torch.zeros(scores.n, dtype=torch.bool)
    for size in (1, 17, 0.1, 0.5, 1.0):
        kept = leaves(scores.top(size))
        best = torch.zeros(scores.n, dtype=torch.bool)
        best[scores.flat.topk(scores.count(size)).indices] = True
        assert torch.equal(kept, best) and bool((kept | ~before).all())
        before = kept
    assert scores.top(0) == tlnp.Circuit.empty(scores.space) and scores.top(1.0) == tlnp.Circuit.full(scores.space)


def test_ties_go_to_the_first_and_a_share_is_the_nearest_count_but_one_at_least(toy: Toy) -> None:
    space = find_nodes(toy[0]).restrict(COARSE)
    scores = NodeScores.from_flat(torch.zeros(space.free_total()), space)
    assert leaves(scores.top(3)).tolist() == [True] * 3 + [False] * (scores.n - 3)
    assert [scores.count(size) for size in (0, 0.0, 0.001, 0.5, 1.0)] == [0, 0, 1, round(scores.n / 2), scores.n]


def test_scores_are_a_mapping_with_the_shapes_of_a_circuit(toy: Toy) -> None:
    scores = lot(toy[0])
    circuit = scores.top(0.5)
    shapes = {hook: tuple(value.shape) for hook, value in scores.items()}
    assert shapes == {hook: tuple(circuit[hook].shape) for hook in shapes} and len(shapes) == len(scores)
    scores["blocks.0.attn.hook_z"].zero_()
    assert scores["blocks.0.attn.hook_z"].abs().sum() > 0
    with pytest.raises(KeyError, match="'blocks.0.hook_resid_post' has no scores; scored are blocks.0.attn.hook_z"):
        scores["blocks.0.hook_resid_post"]


def test_a_circuit_ranks_its_nodes_first_each_side_in_the_given_order(toy: Toy) -> None:
    first, second = lot(toy[0], COARSE), lot(toy[0], COARSE, seed=1)
    circuit = first.top(5)
    made = NodeScores.from_circuit(circuit, within=second)
    assert made.top(5) == circuit and sorted((made.flat * made.n).round().tolist()) == list(range(1, made.n + 1))
    kept = leaves(circuit)
    for side in (kept, ~kept):
        assert torch.equal(made.flat[side].argsort(), second.flat[side].argsort())
    with pytest.raises(ValueError, match="over different nodes"):
        NodeScores.from_circuit(circuit, within=lot(toy[0]))


def test_effects_rank_what_helps_first_in_both_directions(toy: Toy) -> None:
    model, prompts = toy
    for direction, sign in (("denoise", 1), ("noise", -1)):
        effects = tlnp.crosscheck.attribution_patching(model, prompts, COARSE, direction=direction)
        scores = NodeScores.from_effects(effects)
        key = max(effects.gates, key=lambda key: float((sign * effects.gates[key]).max()))
        best = int((sign * effects.gates[key]).argmax()) if effects.gates[key].ndim else ()
        assert bool(scores.top(1).live(*key)[best])
        assert torch.equal(NodeScores.from_effects(effects, absolute=True).flat, scores.flat.abs())


@pytest.mark.parametrize(("size", "text"), [(1.5, "size=1.5; give a share of 0.0 to 1.0"), (-1, "a count of 0 to 15"), (16, "size=16"),
                                            (True, "size=True")])
def test_sizes_outside_are_named(toy: Toy, size: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        lot(toy[0], COARSE).top(size)


def test_wrong_scores_are_named(toy: Toy) -> None:
    good = lot(toy[0], COARSE)
    key = GateKey("head", 1)
    for bad, text in ((None, r"head nodes of layer 1 are missing; expected \[4\]"), (torch.zeros(3), r"are \[3\]; expected \[4\]"),
                      (torch.full((4,), torch.nan), "NaN or inf in the scores of the head nodes of layer 1")):
        gates = {k: v for k, v in {**good.gates, key: bad}.items() if v is not None}
        with pytest.raises(ValueError, match=text):
            NodeScores(gates, good.space)
    with pytest.raises(TypeError, match="scores of the head nodes of layer 1 are ndarray; give a tensor"):
        NodeScores({**good.gates, key: np.zeros(4)}, good.space)


def test_a_part_of_a_landscape_is_the_landscape_with_the_rest_held(toy: Toy) -> None:
    model, prompts = toy
    masks = model.add_node_masks(COARSE)
    try:
        with masks.inactive():
            whole = survey(masks, prompts, Budget(), both_ways=True, batch_size=64, cache_bytes=1 << 30).landscape
            rows, held = torch.arange(len(whole.groups)), torch.zeros(whole.n, dtype=torch.bool)
            held[[1, 4]] = True
            part = _Part(whole, torch.tensor([0, 2, 5]), held, 2)
            kept = held.clone()
            kept[[0, 5]] = True
            asked = torch.tensor([1.0, 0.0, 1.0])
            assert part.measure(asked, rows) == whole.measure(kept.float(), rows)
            assert torch.allclose(part.gradient(asked, rows, 0)[1], whole.gradient(kept.float(), rows, 0)[1][[0, 2, 5]])
            assert part.flat(whole.circuit(kept, whole.reference.ablation)).tolist() == [True, False, True]
            assert isinstance(part.budget, LowestLoss) and part.budget.max_size == 2
    finally:
        model.remove_node_masks()


def test_rank_gives_every_node_its_place_and_leaves_the_masks_as_they_were(toy: Toy) -> None:
    model, prompts = toy
    masks = model.add_node_masks()
    before = [score.clone() for score in masks.parameters()]
    try:
        scores, again = (tlnp.rank(masks, prompts, loss=tlnp.mib.distance, sizes=(0.1, 0.3, 1.0), steps=6, progress=False)
                         for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(before, masks.parameters(), strict=True)) and masks.attached
    finally:
        model.remove_node_masks()
    assert sorted((scores.flat * scores.n).round().int().tolist()) == list(range(1, scores.n + 1))
    assert torch.equal(scores.flat, again.flat)
    ours, chance = (tlnp.mib.evaluate(model, which, prompts) for which in (scores, lot(model)))
    assert ours.cmd < chance.cmd - 0.2 and ours.cpr > chance.cpr + 0.2
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(("change", "text"), [
    ({"sizes": (0.5, 0.1, 1.0)}, r"sizes=\(0.5, 0.1, 1.0\); give two or more shares of the nodes, ascending"),
    ({"sizes": (0.1, 0.5)}, "the last one 1.0"), ({"sizes": (1.0,)}, "two or more"), ({"sizes": (0.0, 1.0)}, "above 0"),
    ({"steps": 0}, "steps=0; it must be a whole number, 1 or more"), ({"anchor": 0.0}, "anchor=0.0; give a share"),
    ({"batch_size": 0}, "batch_size=0"), ({"step_prompts": 0}, "step_prompts=0"),
])
def test_rank_names_what_is_wrong(toy: Toy, change: dict[str, Any], text: str) -> None:
    masks = toy[0].add_node_masks(COARSE)
    try:
        with pytest.raises(ValueError, match=text):
            tlnp.rank(masks, toy[1], progress=False, **change)
    finally:
        toy[0].remove_node_masks()


@pytest.mark.parametrize("granularities", [("head", "mlp"), ("attn", "head", "mlp_neuron")])
def test_rank_under_zero_ablation(toy: Toy, granularities: tuple[str, ...]) -> None:
    model, prompts = toy
    masks = model.add_node_masks(granularities, ablation="zero")
    try:
        scores = tlnp.rank(masks, prompts, sizes=(0.1, 0.5, 1.0), steps=4, progress=False)
        assert scores.ablation.name == "zero" and sorted(scores.flat.tolist())[-1] == 1
    finally:
        model.remove_node_masks()


def test_a_gradient_that_is_not_finite_is_named(toy: Toy) -> None:
    model, prompts = toy
    masks = model.add_node_masks(COARSE)
    try:
        with pytest.raises(FloatingPointError, match="NaN or inf in the gradient of the loss at step 0"):
            tlnp.rank(masks, prompts, loss=lambda logits, full, _: (logits - full).pow(2).sum(-1) + (logits[:, 0] * 0).abs().sqrt(),
                      steps=2, progress=False)
    finally:
        model.remove_node_masks()


def test_scores_are_equal_by_their_values_and_counts_may_be_numpy(toy: Toy) -> None:
    scores = lot(toy[0], COARSE)
    assert scores == lot(toy[0], COARSE) and scores != lot(toy[0], COARSE, seed=1) and scores != lot(toy[0], ("head",))
    assert scores.count(np.int64(3)) == 3 and scores.top(np.int64(3)) == scores.top(3)


def test_rank_names_masks_and_prompts_that_it_cannot_use(toy: Toy) -> None:
    model, prompts = toy
    masks = model.add_node_masks(COARSE, ablation="optimal")
    try:
        with pytest.raises(ValueError, match='"optimal" ablation learns constants that differ from size to size'):
            tlnp.rank(masks, prompts, progress=False)
        model.remove_node_masks()
        masks = model.add_node_masks(COARSE)
        with pytest.raises(TypeError, match="prompts must be PromptPairs, got list"):
            tlnp.rank(masks, [1, 2], progress=False)  # type: ignore[arg-type]
        some = tlnp.PromptPairs(prompts.clean, torch.where(torch.arange(24)[:, None] < 5, prompts.clean, prompts.corrupted),
                                prompts.answers, prompts.wrong_answers, prompts.attention_mask)
        with pytest.warns(UserWarning, match="5 of the 24 corrupted prompts") as caught:
            tlnp.rank(masks, some, sizes=(0.5, 1.0), steps=1, progress=False)
        assert caught[0].filename == __file__
        with pytest.raises(ValueError, match="the loss is constant: 3 for the full model and 3 with every node ablated"):
            tlnp.rank(masks, prompts, loss=lambda logits, full, prompts: logits[:, 0] * 0 + 3, progress=False)
        with pytest.raises(ValueError, match="the loss has no gradient"):
            tlnp.rank(masks, prompts, loss=lambda logits, full, prompts: (logits.argmax(-1) != full.argmax(-1)).float(), progress=False)
    finally:
        model.remove_node_masks()
    with pytest.raises(RuntimeError, match="not attached to a model"):
        tlnp.rank(masks, prompts, progress=False)


@pytest.mark.parametrize("loss", [tlnp.mib.distance, tlnp.mib.shortfall])
def test_pairs_that_work_both_ways_are_ranked_on_both_ways(toy: Toy, loss: Any) -> None:
    """For a loss that says how like the full model's the output is, pairs and the same pairs turned round are the same prompts; where more
    logit difference is better, they are not."""
    model, found = toy[0], preference(toy[0], tlnp.toy.load("gendered_pronoun", n=24)[1], 64)
    strong = ((found.clean > 1) & (found.corrupted > 1)).nonzero()[:, 0]
    pairs, turned = found.prompts[strong], found.turned[strong]
    masks = model.add_node_masks(COARSE)
    try:
        one, other = (tlnp.rank(masks, each, loss=loss, steps=3, progress=False) for each in (pairs, turned))
    finally:
        model.remove_node_masks()
    assert len(pairs) > 10 and (one == other) == (loss is tlnp.mib.distance)
