"""CPR and CMD: closed forms, the same f as `evaluate`'s faithfulness, planted circuits, bad input."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import planted
import pytest
import torch

import tl_nodeprune as tlnp
from tl_nodeprune.circuit.scores import SIZES, NodeScores
from tl_nodeprune.mib.measures import FaithfulnessCurve, area
from tl_nodeprune.nodes.probe import find_nodes

Toy = tuple[Any, tlnp.PromptPairs]


def curve(*f: float, sizes: tuple[float, ...] = SIZES) -> FaithfulnessCurve:
    return FaithfulnessCurve(sizes, tuple(round(1000 * size) for size in sizes), f, 2.0, 0.0, "interchange", 10)


def lot(model: Any, seed: int = 0) -> NodeScores:
    space = find_nodes(model).restrict()
    return NodeScores.from_flat(torch.rand(space.free_total(), generator=torch.Generator().manual_seed(seed)), space)


def test_closed_forms() -> None:
    width = 1 - SIZES[0]
    perfect, nothing = curve(*[1.0] * 10), curve(*[0.0] * 9, 1.0)
    assert perfect.cmd == 0 and perfect.cpr == pytest.approx(width)
    assert nothing.cpr == pytest.approx(0.25) and nothing.cmd == pytest.approx(width - 0.25)  # the board's own random row: .25 and .75
    line = curve(*SIZES)
    assert line.cpr == pytest.approx((1 - SIZES[0] ** 2) / 2) and line.cmd == pytest.approx((1 - SIZES[0]) ** 2 / 2)
    over = curve(3.0, 2.0, 1.0, sizes=(0.2, 0.6, 1.0))
    assert over.cpr == pytest.approx(0.4 * 2.5 + 0.4 * 1.5) and over.cmd == pytest.approx(0.4 * 1.5 + 0.4 * 0.5)
    assert area([0.0, 1.0, 3.0], [2.0, 4.0, 0.0]) == 3 + 4


def test_above_and_below_one_do_not_cancel_in_the_distance() -> None:
    swings = curve(0.0, 2.0, 1.0, sizes=(0.2, 0.6, 1.0))
    assert swings.cmd == pytest.approx(0.4 * 1 + 0.4 * 0.5) and swings.cpr == pytest.approx(0.4 * 1 + 0.4 * 1.5)


def test_the_frame_and_the_line() -> None:
    made = curve(0.5, 0.75, 1.0, sizes=(0.1, 0.5, 1.0))
    assert made.to_frame().to_dict("list") == {"size": [0.1, 0.5, 1.0], "nodes": [100, 500, 1000], "f": [0.5, 0.75, 1.0]}
    assert "CPR 0.688, CMD 0.213" in repr(made) and "10 prompts" in repr(made)


@pytest.mark.parametrize("ablation", ["interchange", "mean", "zero"])
def test_f_is_the_faithfulness_of_each_circuit(toy: Toy, ablation: str) -> None:
    model, prompts = toy
    scores = lot(model)
    used = tlnp.Ablation(ablation).fit(model, prompts, scores.space.hooks)
    found = tlnp.mib.evaluate(model, NodeScores(scores.gates, scores.space, used), prompts, sizes=(0.2, 0.7, 1.0))
    for size, f in zip(found.sizes, found.f, strict=True):
        own = NodeScores(scores.gates, scores.space, used).top(int(size * scores.n))
        assert f == pytest.approx(tlnp.evaluate(model, own, prompts).faithfulness, abs=1e-4)
    assert found.f[-1] == pytest.approx(1, abs=1e-5) and found.ablation == ablation and found.n_prompts == len(prompts)
    assert found.nodes == tuple(int(size * scores.n) for size in found.sizes)


def test_shares_are_rounded_down_to_nothing_too_as_the_board_does(toy: Toy) -> None:
    """Of 157 nodes, GPT-2's, the board takes 0 0 0 1 3 7 15 31 78 157; f of no node is 0."""
    model, prompts = toy
    space = find_nodes(model).restrict(("head", "mlp"))
    scores = NodeScores.from_flat(torch.rand(15, generator=torch.Generator().manual_seed(0)), space)
    found = tlnp.mib.evaluate(model, scores, prompts)
    assert found.nodes == (0, 0, 0, 0, 0, 0, 1, 3, 7, 15) and found.f[:6] == (0.0,) * 6
    assert [int(size * 157) for size in SIZES] == [0, 0, 0, 1, 3, 7, 15, 31, 78, 157]


def test_mappings_and_effects_are_scores_too(toy: Toy) -> None:
    model, prompts = toy
    scores = lot(model)
    assert tlnp.mib.evaluate(model, dict(scores), prompts).f == pytest.approx(tlnp.mib.evaluate(model, scores, prompts).f, abs=1e-5)
    effects = tlnp.crosscheck.attribution_patching(model, prompts, ("head", "mlp"))
    assert tlnp.mib.evaluate(model, effects, prompts).nodes[-1] == 15
    only = {"blocks.0.attn.hook_z": torch.rand(4)}
    assert tlnp.mib.evaluate(model, only, prompts, sizes=(0.5, 1.0)).nodes == (2, 4)


def test_losses_for_rank_in_closed_form(toy: Toy) -> None:
    prompts = toy[1][:2]
    full, logits = torch.zeros(2, 200), torch.zeros(2, 200)
    full[torch.arange(2), prompts.answers] = 3.0
    logits[torch.arange(2), prompts.answers] = torch.tensor([2.5, 6.0])
    assert tlnp.mib.shortfall(logits, full, prompts).tolist() == [0.5, -3.0]
    assert tlnp.mib.distance(logits, full, prompts).tolist() == [0.25, 9.0]


@pytest.mark.parametrize("name", ["lookup", "conjunction"])
def test_a_planted_circuit_does_it_from_its_size_on_and_rank_finds_it(name: str) -> None:
    wired = planted.PLANTS[name](0)
    prompts, space = wired.prompts(24, 0), wired.space()
    truth = sorted(wired.truths[0])
    scores = NodeScores.from_circuit(planted.circuit_of(space, truth))
    sizes = (len(truth) / scores.n, 0.3, 0.6, 1.0)
    found = tlnp.mib.evaluate(wired.model, scores, prompts, sizes=sizes)
    chance = tlnp.mib.evaluate(wired.model, lot(wired.model), prompts, sizes=sizes)
    assert found.nodes[0] == len(truth) and found.cmd < 0.02 and chance.cmd > 0.3
    masks = wired.model.add_node_masks()
    try:
        ranked = tlnp.rank(masks, prompts, steps=60, progress=False)
    finally:
        wired.model.remove_node_masks()
    assert planted.nodes_of(ranked.top(len(truth))) in wired.answers(space)
    assert tlnp.mib.evaluate(wired.model, ranked, prompts, sizes=sizes).cmd < 0.02


def test_the_ablation_by_name(toy: Toy) -> None:
    model, prompts = toy
    named, given = (tlnp.mib.evaluate(model, lot(model), prompts, ablation=ablation) for ablation in ("zero", tlnp.Ablation("zero")))
    assert named == given and named.ablation == "zero"


def test_a_constant_metric_is_an_error(toy: Toy) -> None:
    model, prompts = toy
    same = tlnp.PromptPairs(prompts.clean, prompts.clean, prompts.answers, prompts.wrong_answers, prompts.attention_mask)
    with pytest.raises(ValueError, match="the metric is constant: the logit difference is .* with every node ablated .interchange."):
        tlnp.mib.evaluate(model, lot(model), same)


def test_scores_of_another_model_and_bad_mappings_are_named(toy: Toy, other_model: Any) -> None:
    model, prompts = toy
    with pytest.raises(ValueError, match=r"these scores are of another model .*blocks.0.* this model has \[\d+"):
        tlnp.mib.evaluate(model, lot(other_model), prompts)
    same_shapes = NodeScores((own := lot(model)).gates, replace(own.space, model_name="another"))
    with pytest.warns(UserWarning, match="these scores are of a model called 'another', this one is called"):
        tlnp.mib.evaluate(model, same_shapes, prompts)
    for bad, text in (({"blocks.0.mlp.hook_post": torch.zeros(3)}, r"'blocks.0.mlp.hook_post' are \[3\]; this model has mlp_neuron nodes"),
                      ({"blocks.9.hook_mlp_out": torch.zeros(3)}, "no nodes there"), ({}, "scores is empty"),
                      ({"blocks.0.attn.hook_z": torch.full((4,), torch.inf)}, "NaN or inf in the scores of the head nodes of layer 0")):
        with pytest.raises(ValueError, match=text):
            tlnp.mib.evaluate(model, bad, prompts)
    double = {"blocks.0.hook_mlp_out": torch.zeros(()), "blocks.0.mlp.hook_post": torch.zeros(384)}
    with pytest.raises(ValueError, match="scores has 'blocks.0.hook_mlp_out' and what is in it, blocks.0.mlp.hook_post"):
        tlnp.mib.evaluate(model, double, prompts)
    with pytest.raises(TypeError, match="scores must be NodeScores, Effects or a mapping .* got Tensor"):
        tlnp.mib.evaluate(model, torch.zeros(3), prompts)
    with pytest.raises(ValueError, match="unknown ablation 'nothing'"):
        tlnp.mib.evaluate(model, lot(model), prompts, ablation="nothing")
    with pytest.raises(ValueError, match="the last one 1.0"):
        tlnp.mib.evaluate(model, lot(model), prompts, sizes=(0.1, 0.2))


def test_attached_masks_are_left_out_and_an_applied_circuit_is_an_error(toy: Toy) -> None:
    model, prompts = toy
    scores = lot(model)
    plain = tlnp.mib.evaluate(model, scores, prompts)
    masks = model.add_node_masks()
    try:
        masks.set_to(tlnp.Circuit.empty(masks.space))
        assert tlnp.mib.evaluate(model, scores, prompts).f == plain.f
    finally:
        model.remove_node_masks()
    with scores.top(0.5).applied(model, prompts), pytest.raises(RuntimeError, match="a circuit is applied"):
        tlnp.mib.evaluate(model, scores, prompts)
