"""`evaluate` at its fixed points, and against its own definition."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

import tl_nodeprune as tlnp
from tl_nodeprune.nodes.probe import find_nodes

Toy = tuple[Any, tlnp.PromptPairs]


@pytest.mark.parametrize("ablation", ["interchange", "zero", "mean"])
def test_full_and_empty(toy: Toy, ablation: str) -> None:
    model, prompts = toy
    space = find_nodes(model)
    fitted = tlnp.Ablation(ablation).fit(model, prompts, space.hooks)
    full, empty = (tlnp.evaluate(model, make(space, fitted), prompts) for make in (tlnp.Circuit.full, tlnp.Circuit.empty))
    assert (full.kl, full.faithfulness, full.exact_match) == (0.0, 1.0, 1.0) and full.circuit == full.full
    assert empty.faithfulness == 0.0 and empty.circuit == empty.ablated and empty.kl > 1
    assert full.ablation == ablation and full.n_prompts == 24


def test_batch_size_is_memory_not_result(toy: Toy) -> None:
    model, prompts = toy
    space, g = find_nodes(model), torch.Generator().manual_seed(0)
    circuit = tlnp.Circuit(space, {key: torch.rand(shape, generator=g) < 0.8 for key, shape in space.shapes.items()})
    a, b = (tlnp.evaluate(model, circuit, prompts, batch_size=size).to_frame() for size in (5, 64))
    assert abs(a - b).max().max() < 1e-4
    gained, full, none = a["logit_diff"]
    assert a.loc["circuit", "faithfulness"] == pytest.approx((gained - none) / (full - none))


def test_faithfulness_in_half_precision_is_nan_where_ablation_changes_rounding_only(fresh_toy: Toy) -> None:
    """Prompts that differ behind the answer position only."""
    model, prompts = fresh_toy
    corrupted, at = prompts.clean.clone(), torch.full_like(prompts.answer_positions, 3)  # type: ignore[arg-type]
    corrupted[:, 5:8] = prompts.corrupted[:, 5:8]
    late = tlnp.PromptPairs(prompts.clean, corrupted, prompts.answers, prompts.wrong_answers, prompts.attention_mask, at)
    empty = tlnp.Circuit.empty(find_nodes(model).restrict(["layer"]))
    assert math.isnan(tlnp.evaluate(model, empty, late).faithfulness)
    found = tlnp.evaluate(model.to(torch.bfloat16), empty, late)
    assert math.isnan(found.faithfulness)


def test_faithfulness_is_nan_where_ablation_changes_nothing(toy: Toy) -> None:
    """Equal prompts have their mean."""
    model, prompts = toy
    same, space = prompts[[0] * 4], find_nodes(model).restrict(("mlp_neuron",))
    report = tlnp.evaluate(model, tlnp.Circuit.empty(space, tlnp.Ablation("mean").fit(model, same, space.hooks)), same)
    assert math.isnan(report.faithfulness) and report.kl == pytest.approx(0, abs=1e-5)


def test_missing_corrupted_prompts_are_named(toy: Toy) -> None:
    """Interchange with the clean run itself would find every circuit perfect."""
    model, prompts = toy
    alone, space = dataclasses.replace(prompts, corrupted=prompts.clean), find_nodes(model).restrict(("mlp",))
    with pytest.raises(ValueError, match="corrupted prompts are missing"):
        tlnp.evaluate(model, tlnp.Circuit.empty(space), alone)
    assert tlnp.evaluate(model, tlnp.Circuit.empty(space, tlnp.Ablation("zero")), alone).kl > 0.1


def test_wrong_arguments_are_named(toy: Toy) -> None:
    model, prompts = toy
    circuit = tlnp.Circuit.full(find_nodes(model).restrict(("mlp",)))
    for wrong, text in (((circuit.masks, prompts), "circuit must be a Circuit, got dict"),
                        ((prompts, circuit), "circuit must be a Circuit, got PromptPairs"),
                        ((circuit, prompts.clean), "prompts must be PromptPairs, got Tensor")):
        with pytest.raises(TypeError, match=text):
            tlnp.evaluate(model, *wrong)
    with pytest.raises(ValueError, match="batch_size=0; it must be a whole number, 1 or more"):
        tlnp.evaluate(model, circuit, prompts, batch_size=0)


def test_attached_masks_are_left_out(toy: Toy) -> None:
    model, prompts = toy
    masks = model.add_node_masks(("head",))
    try:
        masks.set_to(tlnp.Circuit.empty(masks.space))
        assert tlnp.evaluate(model, tlnp.Circuit.full(masks.space), prompts).kl == 0
    finally:
        model.remove_node_masks()
    assert "24 prompts, interchange ablation" in repr(tlnp.evaluate(model, tlnp.Circuit.full(masks.space), prompts))
