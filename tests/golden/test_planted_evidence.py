"""The report on circuits wired by hand: it ranks the planted nodes first, passes the truth, fails what is not the truth and says why.

A node's score is what its removal adds to the KL, nats, by exact one-node ablation (`Report.effects`), in the circuit it is kept in; nodes
that are not kept have the score 0.
"""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import planted
import pytest
import torch
from planted import Node, Nodes, Plant, circuit_of, leaves_of
from scipy import stats

import tl_nodeprune as tlnp
from tl_nodeprune.evidence.units import Unit

KNOWN = ("lookup", "induction", "conjunction")
COARSE = ("head", "mlp")
SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))]
PLAIN = {"n_random": 60, "n_subsets": 6, "batch_size": 480, "progress": False}
CHEAP = PLAIN | {"n_random": 1, "n_subsets": 3}
BY_NODE = CHEAP | {"units": "node", "max_units": 1000}


@cache
def plant(name: str, seed: int = 0) -> Plant:
    return planted.PLANTS[name](seed)


def leaf_truths(wired: Plant, space: Any) -> list[Nodes]:
    leaves = set(leaves_of(space))
    return sorted((answer & leaves for answer in wired.answers(space)), key=sorted)


def auroc(effects: Any, leaves: list[Node], truth: Nodes) -> float:
    scores = {leaf: effects["kl_rise"].get(str(Unit(leaf[0], leaf[1], leaf[2:])), 0.0) for leaf in leaves}
    inside, outside = ([scores[leaf] for leaf in leaves if (leaf in truth) == wanted] for wanted in (True, False))
    return float(stats.mannwhitneyu(inside, outside).statistic) / (len(inside) * len(outside))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("granularities", [None, COARSE])
@pytest.mark.parametrize("name", KNOWN)
def test_the_planted_nodes_rank_first(name: str, granularities: Any, seed: int) -> None:
    """In the full model, and in a circuit that keeps half of the distractors too."""
    wired = plant(name, seed)
    space, prompts = wired.space(granularities), wired.prompts(24, seed + 50)
    leaves, (truth,) = leaves_of(space), leaf_truths(wired, space)
    others = [leaf for leaf in leaves if leaf not in truth]
    wider = circuit_of(space, [*truth, *random.Random(seed).sample(others, len(others) // 2)])
    for circuit in (tlnp.Circuit.full(space), wider):
        effects = tlnp.report(wired.model, circuit, prompts, **BY_NODE).effects
        assert len(effects) == circuit.size and auroc(effects, leaves, truth) == 1
        assert auroc(effects, leaves, frozenset(random.Random(seed).sample(others, len(truth)))) < 0.9, "a wrong truth is told apart"


@pytest.mark.parametrize("name", KNOWN)
def test_so_they_do_in_what_the_search_finds(name: str) -> None:
    wired = plant(name)
    masks = wired.model.add_node_masks(COARSE)
    try:
        circuit = masks.prune(wired.prompts(24, 0), max_kl=0.05, steps=40, progress=False).circuit
    finally:
        wired.model.remove_node_masks()
    report = tlnp.report(wired.model, circuit, wired.prompts(24, 0), held_out=wired.prompts(24, 50), **PLAIN)
    (truth,) = leaf_truths(wired, circuit.space)
    assert auroc(report.effects, leaves_of(circuit.space), truth) == 1
    for verdict in ("task", "completeness", "minimality", "redundancy"):
        assert report.verdict(verdict).passed, report.verdict(verdict)


@pytest.mark.parametrize("granularities", [None, COARSE])
def test_the_truth_passes_and_circuits_by_lot_do_not(granularities: Any) -> None:
    wired, generator = plant("lookup"), torch.Generator().manual_seed(0)
    space, prompts = wired.space(granularities), wired.prompts(40, 50)
    truth = circuit_of(space, leaf_truths(wired, space)[0])
    report = tlnp.report(wired.model, truth, prompts, **PLAIN)
    for verdict in ("task", "completeness", "random circuits", "equivalence", "minimality", "redundancy"):
        assert report.verdict(verdict).passed, report.verdict(verdict)
    by_lot = tlnp.evidence.reports.random_circuits.SizeMatched(truth).draw(generator)
    assert by_lot != truth and by_lot.size == truth.size
    bad = tlnp.report(wired.model, by_lot, prompts, **PLAIN)
    for verdict in ("completeness", "random circuits", "equivalence", "minimality"):
        assert bad.verdict(verdict).passed is False, bad.verdict(verdict)
    assert bad.verdict("task").passed, "the model does the task all the same"


@pytest.mark.parametrize("name", KNOWN)
def test_a_useless_head_fails_minimality_and_is_named(name: str) -> None:
    wired = plant(name)
    space, prompts = wired.space(COARSE), wired.prompts(24, 50)
    (truth,) = leaf_truths(wired, space)
    useless = next(leaf for leaf in leaves_of(space) if leaf[0] == "head" and leaf[1] == 2)
    report = tlnp.report(wired.model, circuit_of(space, [*truth, useless]), prompts, **PLAIN)
    verdict, label = report.verdict("minimality"), str(Unit("head", 2, useless[2:]))
    assert verdict.passed is False and f"1 of {len(truth) + 1} units tried could not be shown" in verdict.sentence
    assert f": {label} (p" in verdict.sentence and report.effects.loc[label, "p_value"] > 0.05
    assert report.effects.drop(label)["p_value"].max() < 0.05 and report.effects.index[-1] == label


def redundant_heads(wired: Plant) -> list[str]:
    space = wired.space(("head",))
    return [str(Unit("head", *[(layer, (index,)) for _, layer, index in truth][0])) for truth in leaf_truths(wired, space)]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("granularities", [None, ("head",), COARSE])
def test_of_a_redundant_pair_either_suffices_and_both_are_named(granularities: Any, seed: int) -> None:
    wired = plant("redundant", seed)
    space, prompts, heads = wired.space(granularities), wired.prompts(24, seed + 50), redundant_heads(wired)
    for truth in leaf_truths(wired, space):
        report = tlnp.report(wired.model, circuit_of(space, truth), prompts, **CHEAP)
        verdict = report.verdict("redundancy")
        assert verdict.passed is False and "So the circuit is one of several that do the same." in verdict.sentence
        for redundancy in report.redundancies:
            assert {str(redundancy.unit), *map(str, redundancy.others)} == set(heads) and redundancy.recovered > 0.95
            assert f"ither {redundancy.unit} or {redundancy.others[0]} suffices" in verdict.sentence
        assert report.redundancies and report.verdict("completeness").passed is False, "the other head does the task without this one"


@pytest.mark.parametrize("seed", SEEDS)
def test_where_both_of_the_pair_are_kept_either_may_go(seed: int) -> None:
    wired, heads = plant("redundant", seed), redundant_heads(plant("redundant", seed))
    report = tlnp.report(wired.model, tlnp.Circuit.full(wired.space(COARSE)), wired.prompts(24, seed + 50), **CHEAP)
    (found,) = report.redundancies
    assert found.kept and {str(found.unit), str(found.others[0])} == set(heads) and found.rise > 1
    assert "suffices, both are kept" in report.verdict("redundancy").sentence


@pytest.mark.parametrize("granularities", [("head",), COARSE])
def test_of_three_redundant_heads_any_one_suffices(granularities: Any) -> None:
    """None of them matters alone, nor do two; that is no sign of a circuit without spare parts."""
    wired = planted.redundant(0, copies=3)
    space, prompts = wired.space(granularities), wired.prompts(24, 50)
    heads = {leaf for truth in leaf_truths(wired, wired.space(("head",))) for leaf in truth}
    assert len(heads) == 3
    for circuit in (tlnp.Circuit.full(space), circuit_of(space, heads)):
        report = tlnp.report(wired.model, circuit, prompts, **CHEAP)
        (found,) = report.redundancies
        assert found.kept and {str(unit) for unit in (found.unit, *found.others)} == {f"head {a}.{b}" for _, a, b in heads}
        assert found.rise > 1 and found.recovered > 0.95
        assert report.verdict("redundancy").passed is False and "Any one of head" in report.verdict("redundancy").sentence


def test_a_pair_whose_halves_matter_a_little_is_named_too() -> None:
    """With weaker logits each of the two heads alone costs more than nothing, but far less than both."""
    wired, heads = plant("redundant"), redundant_heads(plant("redundant"))
    with torch.no_grad():
        wired.model.unembed.W_U.mul_(0.3)
    report = tlnp.report(wired.model, tlnp.Circuit.full(wired.space(COARSE)), wired.prompts(24, 50), **CHEAP)
    assert min(report.effects.loc[head, "kl_rise"] for head in heads) > 0.1 * report.evaluation.ablated.kl
    assert any({str(one.unit), *map(str, one.others)} == set(heads) for one in report.redundancies)


@pytest.mark.parametrize("name", KNOWN)
def test_no_redundancy_is_claimed_where_there_is_none(name: str) -> None:
    wired = plant(name)
    for circuit in (circuit_of(space := wired.space(COARSE), leaf_truths(wired, space)[0]), tlnp.Circuit.full(space)):
        report = tlnp.report(wired.model, circuit, wired.prompts(24, 50), **BY_NODE)
        assert not report.redundancies and report.verdict("redundancy").passed
