"""What a circuit must keep: a bound on loss and choices, and limits by granularity with `prune(max_nodes={...})`."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations, product
from typing import Any

import pytest
import torch
from landscapes import landscape_of
from torch import Tensor

import tl_nodeprune as tlnp
from tl_nodeprune.circuit.conversion import leaves_of
from tl_nodeprune.masks.landscape import Losses, circuits_of
from tl_nodeprune.nodes.probe import find_nodes
from tl_nodeprune.nodes.space import GateKey, NodeSpace
from tl_nodeprune.search.budget import Budget, Limits, budget_of

Toy = tuple[Any, tlnp.PromptPairs]
COARSE = ("layer", "attn", "mlp", "head")
APART = [{"head": 2}, {"layer": 1}, {"attn_neuron": 5}, {"head": 3, "mlp_neuron": 4}, {"attn": 1, "mlp": 2}]
NESTED = [{"head": 3, "attn_neuron": 4}, {"layer": 1, "head": 2}, {"layer": 2, "head": 2, "mlp_neuron": 5},
          {"layer": 2, "head": 2, "attn_neuron": 6, "mlp": 1, "mlp_neuron": 4, "mlp_out": 2}]


def small_space() -> NodeSpace:
    """Three layers of three heads with four dims, six neurons, three output dims."""
    one = {"layer": (), "attn": (), "mlp": (), "head": (3,), "attn_neuron": (3, 4), "mlp_neuron": (6,), "mlp_out": (3,)}
    shapes = {GateKey(name, layer): shape for layer in range(3) for name, shape in one.items()}
    return NodeSpace(shapes, shapes, 3, 3, 3, False)


def live_counts(space: NodeSpace, kept: Tensor) -> dict[str, int]:
    """As a circuit counts them."""
    sizes = [math.prod(space.shapes[key]) for key in space.free()]
    pieces = dict(zip(space.free(), kept.split(sizes), strict=True))
    return tlnp.Circuit(space, {k: pieces[k].view(s) if k in pieces else torch.ones(s) for k, s in space.shapes.items()}).count()


def draws(n: int) -> list[Tensor]:
    """Scores of the small space: normal, and with heavy tails."""
    generator, size = torch.Generator().manual_seed(0), small_space().free_total()
    normal = [torch.randn(size, generator=generator) for _ in range(n)]
    return [scores * scores.abs() ** (i % 2) for i, scores in enumerate(normal)]


def highest_sum(limits: Limits, scores: Tensor) -> float:
    """The sum of positive scores of the best circuit, by trying all choices of coarse nodes."""
    worth, highest = scores.clamp(min=0), 0.0
    coarse, fine = ([name for name in limits.most if (name in COARSE) == which] for which in (True, False))
    for choice in product(*(combinations(range(int(limits.units[name].max()) + 1), limits.most[name]) for name in coarse)):
        left, total = worth.clone(), 0.0
        for name, chosen in zip(coarse, choice, strict=True):
            left[(limits.units[name] >= 0) & ~torch.isin(limits.units[name], torch.tensor(chosen))] = 0
        for name in fine:
            inside = limits.units[name] >= 0
            total += float(left[inside].topk(limits.most[name]).values.sum())
            left[inside] = 0
        highest = max(highest, total + float(left.sum()))
    return highest


@pytest.mark.parametrize("given", APART)
def test_limits_that_lie_apart_keep_the_highest_sum(given: dict[str, int]) -> None:
    limits = Limits.of(small_space(), given)
    for scores in draws(10):
        kept = limits.best(scores)
        assert limits.hold(kept) and float(scores.clamp(min=0)[kept].sum()) == pytest.approx(highest_sum(limits, scores), rel=1e-5)


@pytest.mark.parametrize("given", NESTED)
def test_nested_limits_keep_nearly_the_highest_sum(given: dict[str, int]) -> None:
    limits = Limits.of(small_space(), given)
    shares = [float(scores.clamp(min=0)[limits.best(scores)].sum()) / highest_sum(limits, scores) for scores in draws(12)]
    assert min(shares) > 0.9 and sum(shares) / len(shares) > 0.99


@pytest.mark.parametrize("given", [*APART, *NESTED])
def test_counts_are_a_circuits_own_and_at_the_limit_where_scores_are_positive(given: dict[str, int]) -> None:
    space, limits = small_space(), Limits.of(small_space(), given)
    for scores in draws(6):
        counts = live_counts(space, limits.best(scores))
        assert all(counts[name] <= most for name, most in given.items())
    if given in APART:
        counts = live_counts(space, limits.best(draws(1)[0].abs()))
        assert {name: counts[name] for name in given} == given


def test_what_is_not_limited_closes_only_where_its_score_is_clearly_negative() -> None:
    space = small_space()
    limits = Limits.of(space, {"mlp_neuron": 4})
    scores = torch.full((space.free_total(),), -0.5)
    assert live_counts(space, limits.best(scores)) == {**space.totals(), "mlp_neuron": 0}
    assert not limits.best(scores - 1).any() and limits.best(scores + 1).sum() == space.free_total() - 18 + 4


@pytest.mark.parametrize(("max_kl", "agreement", "allowed"), [
    (0.05, None, 0.02), (0.01, None, 0.02), (0.5, None, 0.2), (0.5, 0.98, 0.02), (0.01, 0.9, 0.1)])
def test_what_a_budget_allows(toy: Toy, max_kl: float, agreement: float | None, allowed: float) -> None:
    """Of choices by what was asked for, also where the search takes less of the loss."""
    budget = budget_of(find_nodes(toy[0]), max_kl=max_kl, agreement=agreement)
    assert float(budget.violation(losses(max_kl, 0.0))) == pytest.approx(1)
    for taken in (budget, replace(budget, max_loss=0.4 * max_kl)):
        assert float(taken.violation(losses(0.0, allowed))) == pytest.approx(1)
    assert float(Budget(agreement=1.0).violation(losses(0.0, 0.0))) == 0 and float(Budget(agreement=1.0).violation(losses(0.0, 0.001))) > 1


def test_circuits_of_one_size_are_told_apart_by_their_loss_alone(toy: Toy) -> None:
    several = Losses(*(torch.tensor(value) for value in ([[0.1, 0.3], [0.5, 0.5]], [[1.0, 1.0], [0.0, 0.0]], [[9.0, 9.0], [0.0, 0.0]])))
    for asked in ({"max_nodes": 5}, {"max_nodes": {"head": 2}}):
        budget = budget_of(find_nodes(toy[0]), **asked)  # type: ignore[arg-type]
        assert budget.violation(several).tolist() == pytest.approx([0.2, 0.5]) and not budget.smallest
    own = Budget(tlnp.mib.distance, 0.1)
    assert own.violation(several).tolist() == pytest.approx([2.0, 5.0]), "a loss of one's own asks nothing of the choice"


def losses(loss: float, wrong: float) -> Losses:
    return Losses(torch.tensor([loss]), torch.tensor([wrong]), torch.zeros(1))


def pruned(toy: Toy, given: Any, granularities: tuple[str, ...] | None = None, **search: Any) -> tlnp.PruneResult:
    masks = toy[0].add_node_masks(granularities)
    try:
        result = masks.prune(toy[1], max_nodes=given, progress=False, **search)
        assert masks.to_circuit() == result.circuit
        return result
    finally:
        toy[0].remove_node_masks()


@pytest.mark.parametrize(("granularities", "given", "most"), [
    (None, {"mlp_neuron": 50}, {"mlp_neuron": 50}),
    (None, {"layer": 2, "attn": 0.34, "mlp": 1, "head": 0.2}, {"layer": 2, "attn": 1, "mlp": 1, "head": 2}),
    (None, {"head": 4, "attn_neuron": 30, "mlp_neuron": 0.1, "mlp_out": 20},
     {"head": 4, "attn_neuron": 30, "mlp_neuron": 115, "mlp_out": 20}),
    (("head", "mlp"), {"mlp": 2, "head": 1.0}, {"mlp": 2, "head": 12}),
    (("layer", "head"), {"layer": 2, "head": 3}, {"layer": 2, "head": 3}),
    (("layer", "attn", "mlp_neuron"), {"attn": 2, "mlp_neuron": 40}, {"attn": 2, "mlp_neuron": 40}),
])
def test_limits_hold_for_each_granularity(toy: Toy, granularities: Any, given: dict[str, float | int], most: dict[str, int]) -> None:
    result = pruned(toy, given, granularities, steps=6)
    counts = result.circuit.count()
    assert result.converged and result.circuit.size and not result.minimal
    assert all(counts[name] <= n for name, n in most.items()), counts


def test_limits_hold_after_all_stages_of_the_search(toy: Toy) -> None:
    result = pruned((toy[0], toy[1][:16]), {"head": 3, "mlp_neuron": 50}, steps=26)
    assert result.circuit.count()["head"] <= 3 and result.circuit.count()["mlp_neuron"] <= 50
    assert len(result.history) == 26 and result.frontier.empty and result.converged


@pytest.mark.parametrize("n", [2, 3])
def test_no_heads_are_better_with_all_else_kept(frozen_toy: Toy, others: tlnp.PromptPairs, n: int) -> None:
    """Every n heads of the twelve. The search may find other heads than the best of these, since it may close what is not limited."""
    toy = (frozen_toy[0], frozen_toy[1][:8])
    found = pruned(toy, {"head": n}, steps=60, held_out=others).circuit
    landscape, rows = landscape_of(toy, batch_size=240), torch.arange(8)
    head_of = Limits.of(landscape.space, {"head": n}).units["head"]
    kept = torch.stack([(head_of < 0) | torch.isin(head_of, torch.tensor(heads)) for heads in combinations(range(12), n)])
    measured = landscape.losses(circuits_of([*kept, leaves_of(found)]), rows).loss.mean(-1)
    assert measured[-1] < measured[:-1].min()
    assert found.count()["head"] == n and found.count()["mlp_neuron"] > 0.7 * 1152


def test_no_limit_at_all_keeps_the_model(toy: Toy) -> None:
    assert pruned(toy, {"head": 12, "mlp": 3}, ("head", "mlp"), steps=6).kl < 0.05


@pytest.mark.parametrize("k", [20, 100])
def test_limited_neurons_are_more_faithful_than_attributions_best(toy: Toy, others: tlnp.PromptPairs, k: int) -> None:
    """On the prompts searched and on others."""
    model, prompts = toy
    result = pruned(toy, {"mlp_neuron": k}, ("mlp_neuron",), steps=20, held_out=others)
    effects = tlnp.crosscheck.attribution_patching(model, prompts, ["mlp_neuron"], direction="noise")
    for absolute in (False, True):
        best = tlnp.NodeScores.from_effects(effects, absolute=absolute).top(k)
        assert result.search_kl < tlnp.evaluate(model, best, prompts).kl and result.kl < tlnp.evaluate(model, best, others).kl
    assert result.circuit.size <= k


def test_a_start_within_the_limits_is_not_made_worse(toy: Toy) -> None:
    toy = (toy[0], toy[1][:12])
    first = pruned(toy, {"head": 4}, steps=8)
    again = pruned(toy, {"head": 4}, steps=1, start=first.circuit)
    assert again.search_kl <= first.search_kl + 1e-6 and again.circuit.count()["head"] <= 4
    tighter = pruned(toy, {"head": 2}, steps=1, start=first.circuit)
    assert tighter.circuit.count()["head"] <= 2 and set(tighter.circuit.nodes("head")) <= set(first.circuit.nodes("head"))


@pytest.mark.parametrize("ablation", ["mean", "optimal"])
def test_limits_hold_under_other_ablations(toy: Toy, ablation: str) -> None:
    masks = toy[0].add_node_masks(ablation=ablation)
    result = masks.prune(toy[1], max_nodes={"head": 3, "mlp_neuron": 50}, steps=4, progress=False)
    toy[0].remove_node_masks()
    assert result.circuit.count()["head"] <= 3 and result.circuit.count()["mlp_neuron"] <= 50


GATED = "these masks gate head, mlp_neuron"


@pytest.mark.parametrize(("given", "error", "text"), [
    ({}, ValueError, f"max_nodes is empty; give a share or count for one granularity or more: {GATED}"),
    ({"heads": 3}, ValueError, f"max_nodes limits 'heads' nodes, which do not exist; {GATED}"),
    ({"head": 3, "layer": 1}, ValueError, f"max_nodes limits 'layer' nodes, which are not gated; {GATED}"),
    *[({"head": value}, ValueError, rf"max_nodes\['head'\]={value}; give a share above 0 and up to 1.0 as a float, or a count of 1 to 12")
      for value in (0, -1, 13, 0.0, 1.5, -0.5, math.nan, 0.01)],
    ({"mlp_neuron": 1153}, ValueError, r"max_nodes\['mlp_neuron'\]=1153; .* 1 to 1152"),
    *[({"head": value}, TypeError, r"max_nodes\['head'\]=.*; it must be a number") for value in (True, "3", None)],
    ([("head", 3)], TypeError, r"max_nodes must be a number or a mapping, got list"),
])
def test_refuses_limits_that_are_none(toy: Toy, given: Any, error: type[Exception], text: str) -> None:
    masks = toy[0].add_node_masks(("head", "mlp_neuron"))
    try:
        with pytest.raises(error, match=text):
            masks.prune(toy[1], max_nodes=given, progress=False)
        assert masks.attached and masks.to_circuit() == tlnp.Circuit.full(masks.space)
        with pytest.raises(ValueError, match="got max_kl and max_nodes"):
            masks.prune(toy[1], max_nodes={"head": 3}, max_kl=0.1, progress=False)
    finally:
        toy[0].remove_node_masks()
