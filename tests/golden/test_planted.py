"""Circuits wired by hand: that they are what they are said to be, that `prune` finds them, and a negative control."""

from __future__ import annotations

import random
from functools import cache
from itertools import chain, combinations
from typing import Any

import planted
import pytest
import torch
from planted import Plant, circuit_of, kl_of, leaves_of, nodes_of

import tl_nodeprune as tlnp
from tl_nodeprune.nodes.hooks import capture_nodes

MAX_KL, EXACT, COSTS = 0.05, 0.005, 0.15
"""The budget; what the truth alone may differ from the full model; what each of its nodes is worth at least: nats."""
SUBSETS = {"all": None, "head": ("head",), "blocks": ("attn", "mlp"), "layer": ("layer",), "attn_neuron": ("attn_neuron",),
           "mlp_neuron": ("mlp_neuron",)}
HAS_NEURONS = ("lookup", "conjunction")
CASES = [(name, which) for name in planted.PLANTS for which in SUBSETS
         if (which in ("blocks", "layer") if name == "blocks" else which != "mlp_neuron" or name in HAS_NEURONS)]
COARSE = ("head", "blocks", "layer")  # nine nodes at most: every subset can be tried, and 40 steps are plenty
NOTHING_NEEDED = [("induction", "mlp_neuron"), ("redundant", "mlp_neuron")]


SEEDED = [pytest.param(*case, seed, marks=[pytest.mark.slow] * (seed > 0)) for case in CASES for seed in range(3)]


@cache
def plant(name: str, seed: int = 0) -> Plant:
    return planted.PLANTS[name](seed)


def prune(found: Plant, prompts: tlnp.PromptPairs, which: str, seed: int = 0, **search: Any) -> tlnp.PruneResult:
    masks = found.model.add_node_masks(SUBSETS[which])
    try:
        return masks.prune(prompts, max_kl=MAX_KL, seed=seed, progress=False, **search)
    finally:
        found.model.remove_node_masks()


@pytest.mark.parametrize(("name", "which", "seed"), SEEDED)
def test_the_truth_suffices_and_each_node_of_it_is_needed(name: str, which: str, seed: int) -> None:
    wired, chance = plant(name, seed), random.Random(seed)
    prompts, space = wired.prompts(24, seed), wired.space(SUBSETS[which])
    leaves = leaves_of(space)
    for answer in wired.answers(space):
        truth = sorted(answer.intersection(leaves))
        others = [leaf for leaf in leaves if not any(leaf in more for more in wired.answers(space))]
        wider = [[*truth, *chance.sample(others, len(others) // 2)] for _ in truth]
        assert truth and nodes_of(circuit_of(space, truth)) == answer
        assert kl_of(wired, prompts, space, [truth, *wider]).max() < EXACT
        without = [[leaf for leaf in kept if leaf != lost] for kept in (truth, *wider) for lost in truth]
        assert kl_of(wired, prompts, space, without).min() > COSTS
    assert tlnp.evaluate(wired.model, circuit_of(space, truth), prompts).kl == pytest.approx(
        float(kl_of(wired, prompts, space, [truth])[0]), abs=1e-5)


@pytest.mark.parametrize(("name", "which"), [case for case in CASES if case[1] in COARSE])
def test_no_other_circuit_does_it(name: str, which: str) -> None:
    """Every subset of the nodes: those within the budget are the ones that contain a truth."""
    wired = plant(name)
    space = wired.space(SUBSETS[which])
    leaves = leaves_of(space)
    subsets = list(chain.from_iterable(combinations(leaves, k) for k in range(len(leaves) + 1)))
    within = kl_of(wired, wired.prompts(16, 0), space, subsets) <= MAX_KL
    truths = [answer.intersection(leaves) for answer in wired.answers(space)]
    assert within.tolist() == [any(truth <= set(subset) for truth in truths) for subset in subsets]


@pytest.mark.parametrize("name", planted.PLANTS)
def test_the_model_does_the_task_and_distractors_of_every_layer_are_active(name: str) -> None:
    wired = plant(name)
    prompts, space = wired.prompts(64, 0), wired.space()
    report = tlnp.evaluate(wired.model, tlnp.Circuit.empty(space), prompts)
    assert report.full.accuracy == 1 and report.circuit.accuracy < 0.6 and report.circuit.kl > 1
    clean, corrupted = (capture_nodes(wired.model, tokens, space.hooks) for tokens in (prompts.clean, prompts.corrupted))
    for hook in space.hooks:
        active = ((clean[hook] - corrupted[hook]).abs() > 1e-3).flatten(0, 1).any(0)
        if hook.endswith("hook_mlp_out"):  # dims that carry a signal are no distractors, and still where nothing is planted
            assert active.sum() >= 14
        elif hook.endswith(("hook_z", "hook_post")):
            assert active.all(), f"{hook}: {active}"
        else:
            assert active.any(), hook


def test_the_redundant_pair_fails_without_both_heads_only() -> None:
    wired = plant("redundant")
    space, prompts = wired.space(("head",)), wired.prompts(24, 0)
    (one,), (other,) = ({node for node in answer if node[0] == "head"} for answer in wired.answers(space))
    everything = set(leaves_of(space))
    kl = kl_of(wired, prompts, space, [everything - {one}, everything - {other}, everything - {one, other}])
    assert kl[:2].max() < EXACT and kl[2] > 1


@pytest.mark.parametrize(("name", "which", "seed"), SEEDED)
def test_prune_recovers_the_truth(name: str, which: str, seed: int) -> None:
    wired = plant(name, seed)
    result = prune(wired, wired.prompts(24, seed), which, seed, steps=40 if which in COARSE else 300)
    assert result.converged
    found, answers = nodes_of(result.circuit), wired.answers(result.circuit.space)
    nearest = min(answers, key=lambda answer: len(answer ^ found))
    assert found in answers, f"missing {sorted(nearest - found)}, {len(found - nearest)} too many: {sorted(found - nearest)[:8]}"


@pytest.mark.parametrize(("name", "which"), NOTHING_NEEDED)
def test_prune_keeps_nothing_where_nothing_is_needed(name: str, which: str) -> None:
    wired = plant(name)
    assert not nodes_of(prune(wired, wired.prompts(24, 0), which).circuit)


def exchanged(prompts: tlnp.PromptPairs, seed: int) -> tlnp.PromptPairs:
    """Clean and corrupted exchanged in half of the pairs, sampled at random, the answers left: they no longer tell the two apart."""
    swap = torch.arange(len(prompts)) % 2 == 0
    swap = swap[torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed))][:, None]
    sides = (torch.where(swap, a, b) for a, b in ((prompts.corrupted, prompts.clean), (prompts.clean, prompts.corrupted)))
    return tlnp.PromptPairs(*sides, prompts.answers, prompts.wrong_answers)


def claims_a_circuit(wired: Plant, prompts: tlnp.PromptPairs) -> bool:
    try:
        return prune(wired, prompts, "blocks", steps=20).converged
    except ValueError:
        return False


@pytest.mark.parametrize("name", planted.PLANTS)
def test_a_circuit_is_claimed_where_there_is_a_task(name: str) -> None:
    assert claims_a_circuit(plant(name), plant(name).prompts(24, 0))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", planted.PLANTS)
def test_no_circuit_is_claimed_where_the_answers_tell_nothing(name: str) -> None:
    wired = plant(name)
    prompts = exchanged(wired.prompts(24, 0), seed=0)
    assert not claims_a_circuit(wired, prompts)
