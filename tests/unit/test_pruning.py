"""`prune`: what it refuses, what it restores, what it returns. The search's quality is tested in tests/integration."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tl_nodeprune as tlnp
from tl_nodeprune.budget import Snapshot
from tl_nodeprune.hooks import temporary_hooks
from tl_nodeprune.search import Search
from tl_nodeprune.stages import Stages

Toy = tuple[Any, tlnp.PromptPairs]
TOTAL = 288 + 1152 + 288


@pytest.fixture()
def masks(toy: Toy) -> Iterator[tlnp.NodeMasks]:
    masks = toy[0].add_node_masks()
    yield masks
    masks.remove()


def any_loss(logits: Tensor, full: Tensor, prompts: tlnp.PromptPairs) -> Tensor:
    return (logits - full).abs().mean(-1)


@pytest.mark.parametrize(("budget", "text"), [
    ({}, "give exactly one of max_kl, max_nodes.*got none"),
    ({"max_kl": 0.1, "max_nodes": 5}, "got max_kl and max_nodes"),
    ({"max_kl": 0.1, "objective": tlnp.PaperObjective()}, "got max_kl and objective"),
    *[({"max_kl": value}, rf"max_kl={value}; it must be a finite number above 0") for value in (0, -1.5, math.nan, math.inf)],
    ({"max_loss": 0.0, "loss": any_loss}, "max_loss=0.0"),
    ({"max_loss": 0.1}, "loss and max_loss go together"),
    ({"max_kl": 0.1, "loss": any_loss}, "loss and max_loss go together"),
    *[({"max_nodes": value}, rf"max_nodes={value};.* 1 to {TOTAL}")
      for value in (0, -3, TOTAL + 1, 0.0, -0.5, 1.5, 1e-9, math.nan, math.inf)],
    ({"max_kl": 0.1, "steps": 0}, "steps=0"),
    ({"max_kl": 0.1, "batch_size": -1}, "batch_size=-1"),
    ({"max_kl": 0.1, "step_prompts": 0}, "step_prompts=0"),
    *[({"max_kl": 0.1, "agreement": value}, f"agreement={value}; it is a share") for value in (-0.1, 1.01, math.nan)],
    ({"max_nodes": 5, "agreement": 0.9}, "agreement=0.9 goes with max_kl"),
])
def test_refuses_a_budget_that_is_none(toy: Toy, masks: tlnp.NodeMasks, budget: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        masks.prune(toy[1], progress=False, **budget)
    assert masks.attached and masks.to_circuit() == tlnp.Circuit.full(masks.space)


def test_a_loose_budget_asks_for_the_choice_less_strictly_unless_told_to(toy: Toy, masks: tlnp.NodeMasks) -> None:
    loose, strict = (masks.prune(toy[1], max_kl=2.0, steps=30, exact_tests=0, progress=False, **more) for more in ({}, {"agreement": 1.0}))
    alike = [tlnp.evaluate(toy[0], found.circuit, toy[1]).accuracy for found in (loose, strict)]
    assert max(loose.kl, strict.kl) <= 2 and loose.circuit.size < strict.circuit.size
    assert alike[0] >= 1 - 0.4 * 2 and alike[1] == 1


@pytest.mark.parametrize("options", [{"lam": 1.5}, {"lam": -0.1}, {"steps": 0}, {"batch_size": 0}])
def test_paper_objective_refuses(options: dict[str, Any]) -> None:
    name, value = next(iter(options.items()))
    with pytest.raises(ValueError, match=f"{name}={value}"):
        tlnp.PaperObjective(**options)


def test_masks_not_attached_or_another_circuit_applied(toy: Toy) -> None:
    model, prompts = toy
    masks = model.add_node_masks()
    model.remove_node_masks()
    with pytest.raises(RuntimeError, match="not attached to a model"):
        masks.prune(prompts, max_kl=0.1)
    with tlnp.Circuit.empty(masks.space).applied(model, prompts), pytest.raises(RuntimeError, match="not attached"):
        masks.prune(prompts, max_kl=0.1)


def test_prompts_of_another_tokenizer(toy: Toy, masks: tlnp.NodeMasks) -> None:
    bad = tlnp.PromptPairs(toy[1].clean + 500, toy[1].corrupted, toy[1].answers, toy[1].wrong_answers)
    with pytest.raises(ValueError, match="clean holds token id .* vocabulary ends at 198"):
        masks.prune(bad, max_kl=0.1)


@pytest.mark.parametrize("ablation", ["interchange", "mean"])
@pytest.mark.parametrize("options", [{"max_nodes": 0.5}, {"objective": tlnp.PaperObjective(steps=12, batch_size=24, warmup=1)}])
def test_nan_during_the_search_names_the_step_and_restores(toy: Toy, no_hooks_left: Callable[[Any], None], options: dict[str, Any],
                                                           ablation: str) -> None:
    model, prompts = toy
    masks = model.add_node_masks(ablation=ablation)
    with torch.no_grad():
        for i, score in enumerate(masks.parameters()):
            score.fill_(3.0 if i else 2.9)  # not the default, to see it come back
    before = {name: score.detach().clone() for name, score in masks.scores.items()}
    gate, trained = masks.gate, 0

    def poison(activation: Tensor, hook: Any) -> Tensor | None:
        nonlocal trained
        trained += torch.is_grad_enabled()
        return activation * math.nan if trained > 9 else None  # after the six points of the path, and step 0

    try:
        with (temporary_hooks(model, [("blocks.0.hook_resid_pre", poison)]),
              pytest.raises(FloatingPointError, match=r"at step [1-9]")):
            masks.prune(prompts, steps=20, progress=False, **options)
        assert masks.attached and masks.gate is gate
        assert all(torch.equal(masks.scores[name], score) for name, score in before.items())
        assert not masks.ablation.constants, "the ablation is as before too"
        assert not any(p.requires_grad for p in model.parameters())
        with masks.inactive():
            assert torch.isfinite(model(prompts.clean)).all()
    finally:
        model.remove_node_masks()
    no_hooks_left(model)


def test_nan_in_the_full_model(toy: Toy, masks: tlnp.NodeMasks) -> None:
    model, prompts = toy
    with temporary_hooks(model, [("blocks.0.hook_resid_pre", lambda x, hook: x * math.nan)]):
        with pytest.raises((FloatingPointError, ValueError), match="NaN or inf"):
            masks.prune(prompts, max_kl=0.1, progress=False)


@pytest.mark.parametrize(("given", "most"), [(40, 40), (0.05, 86)])
def test_max_nodes_is_met_by_the_binary_circuit(toy: Toy, masks: tlnp.NodeMasks, given: float | int, most: int) -> None:
    result = masks.prune(toy[1], max_nodes=given, steps=20, progress=False)
    assert 0 < result.circuit.size <= most and result.converged
    assert masks.to_circuit() == result.circuit and len(result.to_frame()) == len(result.history) <= 20
    assert result.history[0].step == 0 and result.seconds > 0 and result.peak_memory > 0


def test_a_circuit_that_misses_the_budget_says_by_how_much(toy: Toy, masks: tlnp.NodeMasks) -> None:
    steps = tlnp.pruning.Step
    with pytest.warns(UserWarning, match=r"the loss is .* above 1e-30"):
        # a loss that even the full model does not meet
        result = masks.prune(toy[1], loss=lambda a, b, p: any_loss(a, b, p) + 1, max_loss=1e-30, steps=2, progress=False)
    assert not result.converged and result.kl >= 1 and isinstance(result.history[0], steps)


def test_result_kl_is_what_evaluate_finds(toy: Toy) -> None:
    model, prompts = toy
    masks = model.add_node_masks(("head", "mlp"))
    result = masks.prune(prompts, max_kl=0.5, steps=20, progress=False)
    model.remove_node_masks()
    assert tlnp.evaluate(model, result.circuit, prompts).kl == pytest.approx(result.kl, abs=1e-5)
    assert result.converged == (result.kl <= 0.5)


@pytest.mark.parametrize(("loss", "error", "text"), [
    (lambda a, b, p: (a - b).abs().mean(-1) * math.nan, FloatingPointError, "NaN or inf in the loss of the circuit"),
    (lambda a, b, p: (a - b).abs().mean(), ValueError, r"one value for each of the 24 prompts; got \(\)"),
    (lambda a, b, p: 0.5, ValueError, "got float"),
])
def test_a_loss_of_ones_own_is_checked(toy: Toy, masks: tlnp.NodeMasks, loss: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        masks.prune(toy[1], loss=loss, max_loss=0.1, steps=3, progress=False)
    assert masks.to_circuit() == tlnp.Circuit.full(masks.space)


@pytest.mark.parametrize("budget", [{"max_kl": "a"}, {"max_nodes": "5"}, {"max_nodes": True}, {"max_loss": None, "max_kl": [0.1]},
                                    {"max_kl": 0.1, "agreement": "all"}])
def test_budgets_must_be_numbers(toy: Toy, masks: tlnp.NodeMasks, budget: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="must be a number"):
        masks.prune(toy[1], **budget)


def test_prompts_must_be_pairs_and_masks_switched_on(toy: Toy, masks: tlnp.NodeMasks) -> None:
    with pytest.raises(TypeError, match="must be PromptPairs, got NoneType"):
        masks.prune(None, max_kl=0.1)
    with masks.inactive(), pytest.raises(RuntimeError, match=r"switched off here; leave `with masks.inactive\(\)`"):
        masks.prune(toy[1], max_kl=0.1)


def test_means_are_fitted_to_each_searchs_own_prompts(toy: Toy) -> None:
    model, prompts = toy
    masks = model.add_node_masks("head", ablation="mean")
    first, second = (masks.prune(part, max_nodes=0.5, steps=3, progress=False).circuit for part in (prompts[:6], prompts[6:12]))
    model.remove_node_masks()
    hook = "blocks.0.attn.hook_z"
    assert not torch.equal(first.ablation.constants[hook], second.ablation.constants[hook])


def test_the_paper_objective_trains_inside_no_grad_too(toy: Toy, masks: tlnp.NodeMasks) -> None:
    with torch.no_grad():
        result = masks.prune(toy[1], objective=tlnp.PaperObjective(steps=3, batch_size=24), progress=False)
    assert len(result.history) == 3


def test_a_start_must_be_over_the_same_nodes_and_is_kept_where_nothing_is_smaller(toy: Toy) -> None:
    model, prompts = toy
    masks = model.add_node_masks(("head", "mlp"))
    found = masks.prune(prompts, max_kl=0.3, steps=40, progress=False)
    again = masks.prune(prompts, max_kl=0.3, steps=2, start=found.circuit, progress=False)
    assert again.circuit.size <= found.circuit.size and again.kl <= 0.3
    other = tlnp.Circuit.full(masks.space.restrict("head"))
    with pytest.raises(ValueError, match="start is a circuit over other nodes, head in layers"):
        masks.prune(prompts, max_kl=0.3, start=other)
    with pytest.raises(ValueError, match="start goes with max_kl, max_nodes or a loss; an objective starts from scores of its own"):
        masks.prune(prompts, objective=tlnp.PaperObjective(), start=found.circuit)
    model.remove_node_masks()


def test_no_circuit_is_claimed_where_the_labels_tell_nothing(toy: Toy) -> None:
    model, prompts = toy
    swap = torch.arange(len(prompts)) % 2 == 0
    mixed = tlnp.PromptPairs(torch.where(swap[:, None], prompts.corrupted, prompts.clean),
                             torch.where(swap[:, None], prompts.clean, prompts.corrupted), prompts.answers, prompts.wrong_answers)
    masks = model.add_node_masks(("head", "mlp"))
    with pytest.warns(UserWarning, match="no circuit is claimed"):
        nothing = masks.prune(mixed, max_kl=0.3, steps=20, progress=False)
    something = masks.prune(prompts, max_kl=0.3, steps=20, progress=False)
    model.remove_node_masks()
    assert not nothing.converged and nothing.p_value > 0.01
    assert something.converged and something.p_value < 1e-6


def test_the_gap_to_fresh_pairs_is_measured_from_16_pairs_on(toy: Toy) -> None:
    model, prompts = toy
    masks = model.add_node_masks(("head", "mlp"))
    assert masks.prune(prompts, max_kl=0.3, steps=24, progress=False).gap >= 1
    assert math.isnan(masks.prune(prompts[:15], max_kl=0.3, steps=24, progress=False).gap)
    model.remove_node_masks()


def test_pairs_too_few_to_hold_out_are_searched_within_half_the_budget(toy: Toy) -> None:
    """From 2 to 15 different pairs; a single one, however often, has the budget whole."""
    model, prompts = toy
    masks = model.add_node_masks(("head", "mlp_neuron"))
    few, enough, single = (masks.prune(pairs, max_kl=0.3, steps=steps, exact_tests=0, progress=False).kl
                           for pairs, steps in ((prompts[:15], 60), (prompts[:16], 10), (prompts[[0] * 15], 60)))
    model.remove_node_masks()
    assert few <= 0.15 < min(enough, single) and max(enough, single) <= 0.3


def test_corrupted_prompts_that_are_missing_in_part_are_said(toy: Toy, masks: tlnp.NodeMasks) -> None:
    prompts = toy[1]
    some = tlnp.PromptPairs(prompts.clean, torch.where(torch.arange(len(prompts))[:, None] < 5, prompts.clean, prompts.corrupted),
                            prompts.answers, prompts.wrong_answers, prompts.attention_mask)
    with pytest.warns(UserWarning, match="5 of the 24 corrupted prompts are the same as the clean ones") as caught:
        masks.prune(some, max_nodes=9, steps=1, exact_tests=0, progress=False)
    assert caught[0].filename == __file__


def test_a_result_names_its_loss(toy: Toy, masks: tlnp.NodeMasks) -> None:
    assert masks.prune(toy[1], loss=any_loss, max_loss=9.0, steps=1, exact_tests=0, progress=False).loss == "any_loss"
    for budget in ({"max_nodes": 9}, {"loss": tlnp.kl_divergence, "max_loss": 9.0}):
        assert masks.prune(toy[1], steps=1, exact_tests=0, progress=False, **budget).loss == "KL"


def test_the_paper_s_objective_needs_no_kept_stand_ins(toy: Toy, masks: tlnp.NodeMasks) -> None:
    """Recomputed for each batch, with the masks out of the way, they are the same."""
    objective = tlnp.PaperObjective(lam=0.5, steps=8, warmup=1)
    kept, recomputed = (masks.prune(toy[1], objective=objective, cache_bytes=size, progress=False) for size in (1 << 30, 0))
    assert kept.circuit == recomputed.circuit and kept.kl == pytest.approx(recomputed.kl)


def test_with_limits_nothing_is_cut_through_the_scores(toy: Toy, masks: tlnp.NodeMasks, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cut would be the circuit before its refinement: k has no say where each granularity has its own limit."""
    monkeypatch.setattr(Search, "cut", lambda search: pytest.fail("a cut"))
    found = masks.prune(toy[1], max_nodes={"head": 7}, steps=36, exact_tests=0, progress=False)
    assert not math.isnan(found.gap) and found.circuit.count()["head"] <= 7


def test_where_thresholding_stalls_it_goes_down_instead(toy: Toy, masks: tlnp.NodeMasks, monkeypatch: pytest.MonkeyPatch) -> None:
    def stalled(search: Search) -> Snapshot:
        land = search.landscape
        search.scores = torch.zeros(land.n)
        return land.snapshot(torch.ones(land.n, dtype=torch.bool), search.everything)

    monkeypatch.setattr(Search, "run", stalled)
    search: dict[str, Any] = {"max_kl": 0.1, "steps": 48, "exact_tests": 0, "progress": False}
    found = masks.prune(toy[1][:15], **search)
    monkeypatch.setattr(Stages, "_descend", lambda stages, rounds: False)
    assert found.kl <= 0.1 and found.circuit.size < 0.9 * masks.prune(toy[1][:15], **search).circuit.size


def test_numbers_of_numpy_will_do_and_a_result_is_no_start(toy: Toy, masks: tlnp.NodeMasks) -> None:
    found = masks.prune(toy[1], max_nodes=np.int64(5), steps=1, progress=False)
    assert found.circuit.size <= 5
    with pytest.raises(TypeError, match="start must be a Circuit, got PruneResult; of a result it is `result.circuit`"):
        masks.prune(toy[1], max_kl=np.float32(0.5), start=found)  # type: ignore[arg-type]


@pytest.mark.parametrize("search", [{"max_kl": 0.5, "steps": 40}, {"max_nodes": 60, "steps": 20}, {"max_nodes": {"head": 4}, "steps": 20},
                                    {"objective": tlnp.PaperObjective(lam=0.5, steps=8, batch_size=24, warmup=1)}])
def test_a_result_ranks_all_nodes_those_kept_first(toy: Toy, masks: tlnp.NodeMasks, search: dict[str, Any]) -> None:
    result = masks.prune(toy[1], progress=False, **search)
    scores = result.scores
    assert scores.top(result.circuit.size) == result.circuit
    assert sorted((scores.flat * scores.n).round().int().tolist()) == list(range(1, TOTAL + 1))


def test_what_a_result_ranks_next_helps_more_than_other_nodes(toy: Toy, masks: tlnp.NodeMasks) -> None:
    result = masks.prune(toy[1], max_nodes=100, steps=40, progress=False)
    with masks.inactive():
        next_best = tlnp.evaluate(toy[0], result.scores.top(150), toy[1]).kl
        lots = []
        for seed in range(10):
            lot = torch.rand(TOTAL, generator=torch.Generator().manual_seed(seed))
            order = tlnp.NodeScores.from_circuit(result.circuit, within=tlnp.NodeScores.from_flat(lot, masks.space))
            lots.append(tlnp.evaluate(toy[0], order.top(150), toy[1]).kl)
    assert next_best < min(lots)
