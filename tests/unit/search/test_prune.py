"""`prune`: what it refuses, what it restores, what it returns and says of it; other budgets from the same run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tl_nodeprune as tlnp
from tl_nodeprune.nodes.attachment import temporary_hooks

Toy = tuple[Any, tlnp.PromptPairs]
TOTAL = 288 + 1152 + 288
COARSE = ("head", "mlp")
FINE = ("attn_neuron", "mlp_out")


@pytest.fixture()
def masks(toy: Toy) -> Iterator[tlnp.NodeMasks]:
    masks = toy[0].add_node_masks()
    yield masks
    masks.remove()


@pytest.fixture()
def coarse(toy: Toy) -> Iterator[tlnp.NodeMasks]:
    masks = toy[0].add_node_masks(COARSE)
    yield masks
    masks.remove()


@pytest.fixture(scope="module")
def found() -> Iterator[tuple[tlnp.NodeMasks, tlnp.PruneResult]]:
    """A run over 576 nodes, and its masks, still attached to a model of their own."""
    model, prompts = tlnp.toy.load("ioi", n=24)
    masks = model.add_node_masks(FINE)
    yield masks, masks.prune(prompts, max_kl=0.3, steps=24, exact_tests=4, progress=False)


def different(prompts: tlnp.PromptPairs) -> int:
    return len(prompts.without_repeats())


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
    *[({"max_kl": 0.1, "time_limit": value}, f"time_limit={value}; it must be a finite number of seconds above 0, or None")
      for value in (0, -1.5, math.nan, math.inf)],
    ({"max_kl": 0.1, "exact_tests": -1}, "exact_tests=-1; it must be a whole number, 0 or more"),
])
def test_refuses_a_budget_that_is_none(toy: Toy, masks: tlnp.NodeMasks, budget: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        masks.prune(toy[1], progress=False, **budget)
    assert masks.attached and masks.to_circuit() == tlnp.Circuit.full(masks.space)


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


@pytest.mark.filterwarnings("ignore")
def test_a_model_in_place_of_masks(toy: Toy, no_hooks_left: Callable[[Any], None]) -> None:
    """The same circuit and scores as with masks that one puts on oneself; nothing is left on the model, also after an error."""
    model, prompts = toy
    kinds: dict[str, Any] = {"granularities": ["head", "mlp"], "layers": [1, 2], "ablation": "mean"}
    result = tlnp.prune(model, prompts, max_nodes=4, steps=5, progress=False, **kinds)
    scores = tlnp.rank(model, prompts, steps=5, progress=False, **kinds)
    no_hooks_left(model)
    with model.add_node_masks(**kinds) as masks:
        assert masks.prune(prompts, max_nodes=4, steps=5, progress=False).circuit == result.circuit
        assert torch.equal(tlnp.rank(masks, prompts, steps=5, progress=False).flat, scores.flat)
        with pytest.raises(ValueError, match=r"layers=\[0\] goes with a model"):
            masks.prune(prompts, max_nodes=4, layers=[0])
        with pytest.raises(RuntimeError, match="attached to this model already"):
            tlnp.prune(model, prompts, max_nodes=4)
        assert masks.attached
    for wrong, error, text in (({"max_kl": -1}, ValueError, "max_kl"), ({"max_kl": 1, "layers": [9]}, ValueError, "layer 9"),
                               ({"loss": interrupted, "max_loss": 1.0}, KeyboardInterrupt, "")):
        with pytest.raises(error, match=text):
            tlnp.prune(model, prompts, progress=False, **{"granularities": "mlp"} | wrong)  # type: ignore[arg-type]
    no_hooks_left(model)
    assert all(p.requires_grad for p in model.parameters())


def interrupted(*_: Any) -> torch.Tensor:
    raise KeyboardInterrupt


def test_prompts_of_another_tokenizer(toy: Toy, masks: tlnp.NodeMasks) -> None:
    bad = tlnp.PromptPairs(toy[1].clean + 500, toy[1].corrupted, toy[1].answers, toy[1].wrong_answers)
    with pytest.raises(ValueError, match="clean holds token id .* vocabulary ends at 198"):
        masks.prune(bad, max_kl=0.1)


@pytest.mark.parametrize("ablation", ["interchange", "mean"])
@pytest.mark.parametrize("options", [{"max_nodes": 0.5}, {"objective": tlnp.PaperObjective(steps=20, batch_size=24, warmup=1)}])
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
        return activation * math.nan if trained > 14 else None  # after the path's five points on two chunks of prompts, and step 0

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
    assert masks.to_circuit() == result.circuit and len(result.to_frame()) == len(result.history) == 20
    assert result.history[0].step == 0 and result.seconds > 0 and result.peak_memory > 0


@pytest.mark.parametrize(("loss", "error", "text"), [
    (lambda a, b, p: (a - b).abs().mean(-1) * math.nan, FloatingPointError, "NaN or inf in the loss of the circuit"),
    (lambda a, b, p: (a - b).abs().mean(), ValueError, r"one value for each of the .* prompts; got \(\)"),
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


def test_the_paper_objective_trains_inside_no_grad_too(toy: Toy, masks: tlnp.NodeMasks) -> None:
    with torch.no_grad():
        result = masks.prune(toy[1], objective=tlnp.PaperObjective(steps=3, batch_size=24), progress=False)
    assert len(result.history) == 3


def test_corrupted_prompts_that_are_missing_in_part_are_said(toy: Toy, masks: tlnp.NodeMasks) -> None:
    prompts = toy[1]
    some = tlnp.PromptPairs(prompts.clean, torch.where(torch.arange(len(prompts))[:, None] < 5, prompts.clean, prompts.corrupted),
                            prompts.answers, prompts.wrong_answers, prompts.attention_mask)
    with pytest.warns(UserWarning, match="5 of the 24 corrupted prompts are the same as the clean ones") as caught:
        masks.prune(some, max_nodes=9, steps=1, exact_tests=0, progress=False)
    assert caught[0].filename == __file__


def test_a_result_names_its_loss(toy: Toy, coarse: tlnp.NodeMasks) -> None:
    assert coarse.prune(toy[1], loss=any_loss, max_loss=9.0, steps=1, exact_tests=0, progress=False).loss == "any_loss"
    for budget in ({"max_nodes": 9}, {"loss": tlnp.kl_divergence, "max_loss": 9.0}):
        assert coarse.prune(toy[1], steps=1, exact_tests=0, progress=False, **budget).loss == "KL"


def test_the_paper_s_objective_needs_no_kept_stand_ins(toy: Toy, masks: tlnp.NodeMasks) -> None:
    """Recomputed for each batch, with the masks out of the way, they are the same."""
    objective = tlnp.PaperObjective(lam=0.5, steps=8, warmup=1)
    kept, recomputed = (masks.prune(toy[1], objective=objective, cache_bytes=size, progress=False) for size in (1 << 30, 0))
    assert kept.circuit == recomputed.circuit and kept.kl == pytest.approx(recomputed.kl)


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


def test_kl_is_evaluates_on_prompts_held_out_and_search_kl_on_those_searched(found: tuple[tlnp.NodeMasks, tlnp.PruneResult]) -> None:
    masks, result = found
    held, searched = (tlnp.evaluate(masks.model, result.circuit, part) for part in (result.held_out, result.searched))
    assert result.kl == pytest.approx(held.kl, abs=1e-5) and result.search_kl == pytest.approx(searched.kl, abs=1e-5)
    assert result.accuracy == held.accuracy and result.kl != pytest.approx(result.search_kl, rel=0.01)
    assert result.interval[0] <= result.kl <= result.interval[1] and result.kl <= 0.3 and not result.stopped
    assert result.converged is (True if result.interval[1] <= 1.25 * 0.3 else None)


def test_a_quarter_of_the_prompts_is_set_aside(toy: Toy, found: tuple[tlnp.NodeMasks, tlnp.PruneResult]) -> None:
    result = found[1]
    assert (len(result.searched), len(result.held_out)) == (16, 8) and different(toy[1]) == 24
    rows = [set(map(tuple, part.clean.tolist())) for part in (result.searched, result.held_out, toy[1])]
    assert not rows[0] & rows[1] and rows[0] | rows[1] == rows[2]


def test_others_can_be_held_out(toy: Toy, coarse: tlnp.NodeMasks, others: tlnp.PromptPairs) -> None:
    result = coarse.prune(toy[1], max_kl=0.5, held_out=others, steps=8, progress=False)
    assert torch.equal(result.searched.clean, toy[1].clean) and torch.equal(result.held_out.clean, others.clean)
    with coarse.inactive():
        assert result.kl == pytest.approx(tlnp.evaluate(toy[0], result.circuit, others).kl, abs=1e-5)
        assert result.search_kl == pytest.approx(tlnp.evaluate(toy[0], result.circuit, toy[1]).kl, abs=1e-5)


def test_kl_is_over_all_prompts_however_many(coarse: tlnp.NodeMasks) -> None:
    prompts = tlnp.toy.load("ioi", n=900)[1].without_repeats()
    held_out, searched = prompts[:270], prompts[270:]
    result = coarse.prune(searched, max_nodes=6, held_out=held_out, steps=2, progress=False)
    with coarse.inactive():
        assert result.kl == pytest.approx(tlnp.evaluate(coarse.model, result.circuit, held_out).kl, abs=1e-5)
        assert result.search_kl == pytest.approx(tlnp.evaluate(coarse.model, result.circuit, searched).kl, abs=1e-5)


@pytest.mark.parametrize(("held_out", "error", "text"), [
    (lambda p: p[:3], ValueError, "3 of the 3 prompts of held_out are searched on too; hold out others"),
    (lambda p: [1, 2], TypeError, "held_out must be PromptPairs, got list"),
    (lambda p: tlnp.PromptPairs(p.clean + 500, p.corrupted, p.answers, p.wrong_answers), ValueError, "clean holds token id"),
    (lambda p: tlnp.PromptPairs(p.corrupted, p.corrupted, p.answers, p.wrong_answers), ValueError, "corrupted prompts are missing"),
])
def test_prompts_that_cannot_be_held_out(toy: Toy, coarse: tlnp.NodeMasks, held_out: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        coarse.prune(toy[1], max_kl=0.5, held_out=held_out(toy[1]), progress=False)
    assert coarse.to_circuit() == tlnp.Circuit.full(coarse.space)


def test_one_prompt_cannot_be_judged(toy: Toy, coarse: tlnp.NodeMasks) -> None:
    for prompts in (toy[1][0], toy[1][[0] * 30]):
        with pytest.raises(ValueError, match=f"all {len(prompts)} prompts have the same clean prompt"):
            coarse.prune(prompts, max_kl=0.5, progress=False)


@pytest.mark.parametrize("n", [2, 12, 23])
def test_with_few_prompts_the_budget_is_untested_and_it_says_how_many_are_needed(toy: Toy, coarse: tlnp.NodeMasks, n: int) -> None:
    """The search then takes half of it."""
    text = f"{max(round(n / 4), 1)} different prompts held out are too few .* give [0-9]+ .*prompts"
    with pytest.warns(UserWarning, match=text) as caught:
        result = coarse.prune(toy[1][:n], max_kl=0.3, steps=8, exact_tests=0, progress=False)
    assert result.converged is None and result.kl <= 0.3 and result.search_kl <= 0.15
    assert len(caught) == 1 and math.isnan(result.interval[0]) == (n == 2)


def test_a_budget_that_is_missed_says_by_how_much(toy: Toy, coarse: tlnp.NodeMasks) -> None:
    """One that even the full model does not meet."""
    with pytest.warns(UserWarning, match=r"on prompts held out the loss is 1, 1 above 1e-30"):
        result = coarse.prune(toy[1], loss=lambda a, b, p: any_loss(a, b, p) + 1, max_loss=1e-30, steps=2, progress=False)
    assert result.converged is False and result.kl == pytest.approx(1) and result.circuit == tlnp.Circuit.full(coarse.space)


def test_no_circuit_is_claimed_where_the_labels_tell_nothing(toy: Toy, coarse: tlnp.NodeMasks) -> None:
    prompts = toy[1]
    swap = torch.arange(len(prompts)) % 2 == 0
    mixed = tlnp.PromptPairs(torch.where(swap[:, None], prompts.corrupted, prompts.clean),
                             torch.where(swap[:, None], prompts.clean, prompts.corrupted), prompts.answers, prompts.wrong_answers)
    with pytest.warns(UserWarning, match="no circuit is claimed"):
        nothing = coarse.prune(mixed, max_kl=0.3, steps=8, progress=False)
    something = coarse.prune(prompts, max_kl=0.3, steps=8, progress=False)
    assert nothing.converged is False and nothing.p_value > 0.01
    assert something.converged is True and something.p_value < 1e-3


def test_a_smaller_budget_takes_more_nodes_and_the_choice_can_be_asked_for(toy: Toy, coarse: tlnp.NodeMasks) -> None:
    tight, loose, sure = (coarse.prune(toy[1], steps=8, exact_tests=0, progress=False, **budget) for budget in (
        {"max_kl": 0.002}, {"max_kl": 8.0, "agreement": 0.0}, {"max_kl": 8.0, "agreement": 1.0}))
    assert tight.kl <= 0.002 and tight.circuit.size >= sure.circuit.size > loose.circuit.size and sure.accuracy == 1


def test_a_start_must_be_over_the_same_nodes_and_is_kept_where_nothing_is_smaller(toy: Toy, coarse: tlnp.NodeMasks) -> None:
    first = coarse.prune(toy[1], max_kl=0.3, steps=24, progress=False)
    again = coarse.prune(toy[1], max_kl=0.3, steps=1, start=first.circuit, progress=False)
    assert again.circuit.size <= first.circuit.size and again.kl <= 0.3
    other = tlnp.Circuit.full(coarse.space.restrict("head"))
    with pytest.raises(ValueError, match="start is a circuit over other nodes, head in layers"):
        coarse.prune(toy[1], max_kl=0.3, start=other)
    with pytest.raises(ValueError, match="start goes with max_kl, max_nodes or a loss; an objective starts from scores of its own"):
        coarse.prune(toy[1], objective=tlnp.PaperObjective(), start=first.circuit)


def test_means_are_fitted_to_each_searchs_own_prompts(toy: Toy) -> None:
    masks = toy[0].add_node_masks("head", ablation="mean")
    first, second = (masks.prune(part, max_nodes=0.5, steps=3, progress=False).circuit for part in (toy[1][:6], toy[1][6:12]))
    masks.remove()
    hook = "blocks.0.attn.hook_z"
    assert not torch.equal(first.ablation.constants[hook], second.ablation.constants[hook])


@pytest.mark.parametrize("ablation", ["mean", "zero", "optimal"])
@pytest.mark.parametrize("search", [
    {"max_nodes": 8, "steps": 6}, pytest.param({"objective": tlnp.PaperObjective(lam=0.9, steps=20, warmup=1, lr=0.5)})])
def test_kl_is_the_circuits_own_under_each_ablation(toy: Toy, search: dict[str, Any], ablation: str) -> None:
    masks = toy[0].add_node_masks(COARSE, ablation=ablation)
    result = masks.prune(toy[1], progress=False, **search)
    masks.remove()
    assert 0 < result.circuit.size < 15 and result.circuit.ablation.name == ablation
    assert result.kl == pytest.approx(tlnp.evaluate(toy[0], result.circuit, result.held_out).kl, rel=1e-3, abs=1e-5)
    assert result.search_kl == pytest.approx(tlnp.evaluate(toy[0], result.circuit, result.searched).kl, rel=1e-3, abs=1e-5)


def test_the_frontier_is_size_against_kl(found: tuple[tlnp.NodeMasks, tlnp.PruneResult]) -> None:
    masks, result = found
    table = result.frontier
    assert list(table) == ["nodes", "share", "search_kl", "kl", "low", "high", "accuracy"] and len(table) >= 20
    assert bool((table["nodes"].diff()[1:] > 0).all()) and bool((table["kl"].diff()[1:] < 0).all())
    assert table["nodes"].iloc[-1] == result.circuit.size_total and table["kl"].iloc[-1] == pytest.approx(0, abs=1e-5)
    assert list(table["share"]) == pytest.approx(list(table["nodes"] / result.circuit.size_total))
    assert bool((table["low"] <= table["kl"]).all()) and bool((table["kl"] <= table["high"]).all())
    for row in table.iloc[[2, len(table) // 2, -3]].to_dict("records"):
        circuit = result.ranking.top(int(row["nodes"]))
        assert tlnp.evaluate(masks.model, circuit, result.held_out).kl == pytest.approx(row["kl"], rel=1e-3, abs=1e-6)
    cut = table[table["kl"] <= 0.3]["nodes"].iloc[0]
    assert result.circuit.size <= 1.25 * cut + 1, "at most a quarter more, to be sure of the budget"


def test_a_few_nodes_have_every_size_on_the_frontier(toy: Toy, coarse: tlnp.NodeMasks) -> None:
    result = coarse.prune(toy[1], max_nodes=3, steps=4, progress=False)
    assert set(result.frontier["nodes"]) <= set(range(1, 16)) and 15 in set(result.frontier["nodes"])
    assert len(result.frontier) >= 8


@pytest.mark.parametrize("budget", [{"max_kl": 1.0}, {"max_kl": 0.05}, {"max_nodes": 100}, {"max_nodes": 0.5}])
def test_at_is_the_circuit_of_another_budget(found: tuple[tlnp.NodeMasks, tlnp.PruneResult], budget: dict[str, Any]) -> None:
    masks, result = found
    other, table = result.at(**budget), result.frontier
    if "max_kl" in budget:
        assert other.kl <= budget["max_kl"] and other.circuit.size == table[table["kl"] <= budget["max_kl"]]["nodes"].iloc[0]
    else:
        most = budget["max_nodes"] if isinstance(budget["max_nodes"], int) else round(budget["max_nodes"] * 576)
        assert other.circuit.size == table[table["nodes"] <= most]["nodes"].iloc[-1] and other.converged
    assert other.kl == pytest.approx(tlnp.evaluate(masks.model, other.circuit, other.held_out).kl, rel=1e-3, abs=1e-6)
    assert other.interval[0] <= other.kl <= other.interval[1] and not other.minimal and other.tested == 0
    assert other.scores.top(other.circuit.size) == other.circuit and other.frontier is table


def test_search_kl_of_another_budget_is_evaluates(found: tuple[tlnp.NodeMasks, tlnp.PruneResult]) -> None:
    masks, result = found
    other = result.at(max_nodes=100)
    assert other.search_kl == pytest.approx(tlnp.evaluate(masks.model, other.circuit, other.searched).kl, rel=1e-3)


def test_at_can_be_finished(found: tuple[tlnp.NodeMasks, tlnp.PruneResult]) -> None:
    masks, result = found
    for budget in ({"max_kl": 1.0}, {"max_nodes": 150}):
        plain, finished = result.at(**budget), result.at(**budget, finish=masks, exact_tests=2)
        assert finished.circuit.size <= 1.25 * plain.circuit.size if "max_kl" in budget else finished.circuit.size <= 150
        assert finished.kl <= 1.0 if "max_kl" in budget else finished.search_kl <= plain.search_kl
        assert finished.kl == pytest.approx(tlnp.evaluate(masks.model, finished.circuit, result.held_out).kl, abs=1e-5)
        assert masks.to_circuit() == finished.circuit and finished.history == result.history
        assert finished.frontier.equals(result.frontier) and finished.p_value == result.p_value


def test_the_warning_names_the_line_that_called(toy: Toy, coarse: tlnp.NodeMasks) -> None:
    with pytest.warns(UserWarning, match="untested") as caught:
        coarse.prune(toy[1][:4], max_kl=0.5, steps=1, exact_tests=0, progress=False)
    assert caught[0].filename == __file__


@pytest.mark.parametrize(("budget", "error", "text"), [
    ({}, ValueError, "give exactly one of max_kl, max_nodes"), ({"max_kl": 0.1, "max_nodes": 5}, ValueError, "got max_kl and max_nodes"),
    ({"max_kl": 0}, ValueError, "max_kl=0; it must be a finite number above 0"), ({"max_kl": "a"}, TypeError, "max_kl='a'"),
    ({"max_nodes": 577}, ValueError, "max_nodes=577;.* 1 to 576"),
    ({"max_kl": 1e-9}, ValueError, "no circuit of this run's frontier meets max_kl=1e-09; its lowest is KL .* Give finish=masks"),
    ({"max_nodes": 1}, ValueError, "no circuit of this run's frontier meets max_nodes=1; its lowest is [0-9]+ nodes"),
])
def test_at_refuses(found: tuple[tlnp.NodeMasks, tlnp.PruneResult], budget: dict[str, Any], error: type[Exception], text: str) -> None:
    result = replace(found[1], frontier=found[1].frontier.iloc[3:-2])
    with pytest.raises(error, match=text):
        result.at(**budget)


def test_at_needs_a_frontier_and_masks_over_the_same_nodes(toy: Toy, coarse: tlnp.NodeMasks, found: tuple[tlnp.NodeMasks, tlnp.PruneResult]
                                                           ) -> None:
    with pytest.raises(ValueError, match="finish: these masks are over other nodes than the run's"):
        found[1].at(max_kl=1.0, finish=coarse)
    for search in ({"max_nodes": {"head": 3}, "steps": 2}, {"objective": tlnp.PaperObjective(steps=2)}):
        with pytest.raises(ValueError, match="this result has no frontier"):
            coarse.prune(toy[1], progress=False, **search).at(max_kl=1.0)


@pytest.mark.parametrize("search", [{"max_kl": 0.3}, {"max_nodes": 5}, {"objective": tlnp.PaperObjective(steps=5000)}])
def test_a_time_limit_stops_the_search_with_what_is_best_so_far(toy: Toy, coarse: tlnp.NodeMasks, search: dict[str, Any]) -> None:
    began = time.perf_counter()
    result = coarse.prune(toy[1], steps=5000, time_limit=1.0, progress=False, **search)
    assert result.stopped == "time limit" and time.perf_counter() - began < 20 and 0 < len(result.history) < 5000
    assert coarse.to_circuit() == result.circuit
    if "max_kl" in search:
        assert result.kl <= 0.3 and result.converged is not False


def test_time_limits_must_be_numbers(toy: Toy, coarse: tlnp.NodeMasks) -> None:
    for value in ("a", True, [3]):
        with pytest.raises(TypeError, match="time_limit.* must be a number"):
            coarse.prune(toy[1], max_kl=0.3, time_limit=value)  # type: ignore[arg-type]


def test_same_seed_same_circuit_another_seed_other_prompts(toy: Toy, coarse: tlnp.NodeMasks) -> None:
    first, again, other = (coarse.prune(toy[1], max_nodes=6, steps=6, step_prompts=5, seed=seed, progress=False) for seed in (3, 3, 4))
    assert first.circuit == again.circuit and first.kl == again.kl and first.ranking == again.ranking and first.history == again.history
    assert not torch.equal(first.held_out.clean, other.held_out.clean) and first.ranking != other.ranking


def test_memory_is_no_matter_of_the_result(toy: Toy, coarse: tlnp.NodeMasks) -> None:
    """Small batches, and stand-ins kept for a part of the prompts only."""
    one, small, part = (coarse.prune(toy[1], max_nodes=6, steps=6, progress=False, **memory)
                        for memory in ({}, {"batch_size": 5}, {"cache_bytes": 300_000}))
    assert one.circuit == small.circuit == part.circuit
    assert one.kl == pytest.approx(small.kl, rel=1e-3) and one.kl == pytest.approx(part.kl, rel=1e-3)


def test_what_a_result_ranks_next_helps_more_than_other_nodes(found: tuple[tlnp.NodeMasks, tlnp.PruneResult]) -> None:
    masks, result = found
    small = result.at(max_nodes=100)
    next_best = tlnp.evaluate(masks.model, small.scores.top(150), small.held_out).kl
    for seed in range(6):
        chance = tlnp.NodeScores.from_flat(torch.rand(576, generator=torch.Generator().manual_seed(seed)), masks.space)
        order = tlnp.NodeScores.from_circuit(small.circuit, within=chance)
        assert next_best < tlnp.evaluate(masks.model, order.top(150), small.held_out).kl
