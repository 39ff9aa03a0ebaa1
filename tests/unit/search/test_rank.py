"""`rank`: an order of all nodes, better than chance at every size, and nothing left behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tl_nodeprune as tlnp
from tl_nodeprune.circuit.scores import NodeScores
from tl_nodeprune.nodes.attachment import temporary_hooks
from tl_nodeprune.nodes.probe import find_nodes
from tl_nodeprune.prompts.preference import preference

Toy = tuple[Any, tlnp.PromptPairs]
COARSE = ("head", "mlp")


def random_scores(model: Any, granularities: tuple[str, ...] | None = None, seed: int = 0) -> NodeScores:
    space = find_nodes(model).restrict(granularities)
    return NodeScores.from_flat(torch.rand(space.free_total(), generator=torch.Generator().manual_seed(seed)), space)


def test_rank_gives_every_node_its_place_and_leaves_the_masks_as_they_were(toy: Toy) -> None:
    model, prompts = toy
    masks = model.add_node_masks()
    before = [score.clone() for score in masks.parameters()]
    try:
        scores, again = (tlnp.rank(masks, prompts, loss=tlnp.mib.distance, steps=6, progress=False) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(before, masks.parameters(), strict=True)) and masks.attached
    finally:
        model.remove_node_masks()
    assert sorted((scores.flat * scores.n).round().int().tolist()) == list(range(1, scores.n + 1))
    assert torch.equal(scores.flat, again.flat)
    ours, chance = (tlnp.mib.evaluate(model, which, prompts) for which in (scores, random_scores(model)))
    assert ours.cmd < chance.cmd - 0.2 and ours.cpr > chance.cpr + 0.2
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(("change", "text"), [
    ({"steps": 0}, "steps=0; it must be a whole number, 1 or more"), ({"batch_size": 0}, "batch_size=0"),
    ({"step_prompts": 0}, "step_prompts=0"), ({"cache_bytes": -1}, "cache_bytes=-1; it must be a whole number, 0 or more"),
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
        scores = tlnp.rank(masks, prompts, steps=4, progress=False)
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
            tlnp.rank(masks, some, steps=1, progress=False)
        assert caught[0].filename == __file__
        with pytest.raises(ValueError, match="the loss is constant: 3 for the full model and 3 with every node ablated"):
            tlnp.rank(masks, prompts, loss=lambda logits, full, prompts: logits[:, 0] * 0 + 3, progress=False)
        with pytest.raises(ValueError, match="the loss has no gradient"):
            tlnp.rank(masks, prompts, loss=lambda logits, full, prompts: (logits.argmax(-1) != full.argmax(-1)).float(), progress=False)
    finally:
        model.remove_node_masks()
    with pytest.raises(RuntimeError, match="not attached to a model"):
        tlnp.rank(masks, prompts, progress=False)


@pytest.mark.parametrize(("loss", "sides"), [(tlnp.kl_divergence, 2), (tlnp.mib.distance, 2), (tlnp.mib.shortfall, 1)])
def test_pairs_that_work_both_ways_are_ranked_on_both_ways(toy: Toy, loss: Any, sides: int) -> None:
    """For a loss that says how like the full model's the output is, pairs turned round are prompts of the task too; where more logit
    difference is better, they are not."""
    model, found = toy[0], preference(toy[0], tlnp.toy.load("gendered_pronoun", n=24)[1], 64)
    pairs = found.prompts[((found.clean > 1) & (found.corrupted > 1)).nonzero()[:, 0]]
    masks, trained_on = model.add_node_masks(COARSE), list[int]()

    def count(activation: torch.Tensor, hook: Any) -> None:
        if torch.is_grad_enabled():
            trained_on.append(len(activation))

    try:
        with temporary_hooks(model, [("blocks.0.hook_resid_pre", count)]):
            tlnp.rank(masks, pairs, loss=loss, steps=3, step_prompts=100, progress=False)
    finally:
        model.remove_node_masks()
    assert len(pairs) > 10 and trained_on[-3:] == [sides * len(pairs)] * 3


def test_the_best_k_nodes_beat_those_of_attribution(toy: Toy) -> None:
    model, prompts = toy
    masks = model.add_node_masks(("mlp_neuron",))
    try:
        scores = tlnp.rank(masks, prompts, steps=60, progress=False)
    finally:
        model.remove_node_masks()
    effects = tlnp.NodeScores.from_effects(tlnp.crosscheck.attribution_patching(model, prompts, ["mlp_neuron"]), absolute=True)
    ours, theirs = ([tlnp.evaluate(model, which.top(k), prompts).kl for k in (30, 100, 300)] for which in (scores, effects))
    assert all(a <= b + 1e-6 for a, b in zip(ours, theirs, strict=True)) and sum(ours) < 0.9 * sum(theirs), (ours, theirs)
