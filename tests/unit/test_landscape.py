"""Losses, gradients and local quadratic models of circuits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import tl_nodeprune as tlnp
from tl_nodeprune.budget import Budget, Measured, budget_of
from tl_nodeprune.landscape import Landscape, Quadratic
from tl_nodeprune.objective import Reference, fisher_probes
from tl_nodeprune.probe import find_nodes
from tl_nodeprune.search import Search

Toy = tuple[Any, tlnp.PromptPairs]


def landscape_of(toy: Toy, granularities: tuple[str, ...] | None = None) -> Landscape:
    model, prompts = toy
    space = find_nodes(model).restrict(granularities)
    hooks = tuple(dict.fromkeys(key.hook for key in space.free()))
    reference = Reference(model, prompts, tlnp.Ablation(), hooks, batch_size=10)
    return Landscape(space, reference, Budget(), torch.zeros(len(prompts), dtype=torch.long))


@pytest.mark.parametrize("granularities", [None, ("attn", "head", "mlp", "mlp_neuron"), ("layer", "head", "mlp_neuron")])
@pytest.mark.parametrize("ablation", tlnp.ablation.ABLATIONS)
def test_what_is_measured_is_the_circuit_that_comes_of_it(frozen_toy: Toy, ablation: str, granularities: tuple[str, ...] | None) -> None:
    """Also where whole blocks are closed: a circuit closes their gates too, which puts the block's stand-in in place of its parts'."""
    model, prompts = frozen_toy
    space = find_nodes(model).restrict(granularities)
    hooks = tuple(dict.fromkeys(key.hook for key in space.free()))
    fitted = tlnp.Ablation(ablation).fit(model, prompts, space.hooks)
    landscape = Landscape(space, Reference(model, prompts, fitted, hooks), Budget(), torch.zeros(len(prompts), dtype=torch.long))
    generator = torch.Generator().manual_seed(0)
    for constant in landscape.constants.values():
        constant.data += 0.1 * torch.randn(constant.shape, generator=generator)
    kept = torch.rand(landscape.n, generator=generator) < 0.6
    for key, ids in landscape.gates(torch.arange(landscape.n)).items():
        if key in landscape.keys and (key.layer == 1 or key.layer == 2 and key.granularity in ("attn_neuron", "head")):
            kept[ids.flatten()] = False
    found = landscape.snapshot(kept, torch.arange(len(prompts)))
    circuit = landscape.circuit(kept, landscape.with_coarse(found.ablation))
    assert not circuit.live(space.granularities[0], 1).any()
    assert found.loss > 0.01 and tlnp.evaluate(model, circuit, prompts).kl == pytest.approx(found.loss, rel=1e-3)


def test_under_zero_ablation_the_nodes_of_a_closed_block_can_return(frozen_toy: Toy) -> None:
    model, prompts = frozen_toy
    space = find_nodes(model).restrict(("attn", "head"))
    landscape = Landscape(space, Reference(model, prompts, tlnp.Ablation("zero"), space.hooks), Budget(),
                          torch.zeros(len(prompts), dtype=torch.long))
    kept = torch.ones(landscape.n)
    kept[4:8] = 0
    _, gradient = landscape.gradient(kept, torch.arange(len(prompts)), 0)
    assert gradient[4:8].abs().min() > 0


@pytest.mark.parametrize("cache_bytes", [0, 1 << 30])
def test_stand_ins_are_those_of_the_rows_in_any_order(toy: Toy, cache_bytes: int) -> None:
    model, prompts = toy
    reference = Reference(model, prompts, tlnp.Ablation(), ("blocks.1.attn.hook_z",), cache_bytes=cache_bytes)
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(0))
    for rows in (order, order[:5], torch.arange(len(prompts))):
        (found,) = reference.stand_ins(rows).values()
        (wanted,) = tlnp.Ablation().values(model, prompts[rows], ["blocks.1.attn.hook_z"]).values()
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("granularities", [None, ("head", "mlp"), ("layer", "attn", "mlp_neuron"), ("attn_neuron", "mlp_out")])
def test_the_quadratic_has_the_exact_slope(frozen_toy: Toy, granularities: tuple[str, ...] | None) -> None:
    """Prompts' own gates and their backward passes, summed, are the one gradient that the search takes."""
    landscape, generator = landscape_of(frozen_toy, granularities), torch.Generator().manual_seed(0)
    kept, rows = torch.rand(landscape.n, generator=generator) < 0.7, torch.arange(len(frozen_toy[1]))
    _, gradient = landscape.gradient(kept.float(), rows, 0)
    model = landscape.quadratic(kept, rows, torch.arange(landscape.n), generator)
    costs = torch.where(kept, -gradient, gradient) + model.rows.pow(2).sum(0) / 2
    assert gradient.abs().max() > 0 and torch.allclose(model.costs(), costs, atol=1e-4 * float(costs.abs().max()))


def test_the_quadratic_foretells_single_removals(frozen_toy: Toy) -> None:
    landscape, rows = landscape_of(frozen_toy, ("attn_neuron",)), torch.arange(len(frozen_toy[1]))
    kept = torch.ones(landscape.n, dtype=torch.bool)
    model = landscape.quadratic(kept, rows, torch.arange(landscape.n), torch.Generator().manual_seed(0))
    some = model.costs().argsort(descending=True)[:60:10].tolist()
    measured = []
    for i in some:
        kept[i] = False
        measured.append(landscape.measure(kept.float(), rows).loss)
        kept[i] = True
    foretold = model.costs()[some]
    assert torch.corrcoef(torch.stack([foretold, torch.tensor(measured)]))[0, 1] > 0.9
    assert 0.5 < float(foretold.sum()) / sum(measured) < 2


def test_a_limit_only_cuts_short_what_is_above_it(frozen_toy: Toy) -> None:
    """Below the limit a measurement is the whole one, above it the violation says so, from fewer prompts."""
    landscape, rows = landscape_of(frozen_toy), torch.arange(len(frozen_toy[1]))
    landscape.groups[len(rows) // 2 :] = 1
    forwards: list[int] = []
    frozen_toy[0].add_hook("blocks.0.hook_resid_pre", lambda value, hook: forwards.append(len(value)))
    generator = torch.Generator().manual_seed(0)
    try:
        for share in (0.0, 0.5, 0.9, 0.99, 1.0):
            kept = torch.rand(landscape.n, generator=generator) < share
            whole = landscape.snapshot(kept, rows)
            forwards.clear()
            for limit in (whole.violation * 1.01, whole.violation * 0.99, whole.violation / 4):
                found = landscape.snapshot(kept, rows, limit=limit)
                assert (found.violation > limit) == (whole.violation > limit)
                assert found.violation <= whole.violation * (1 + 1e-5)
                if limit > whole.violation:
                    assert found.measured == pytest.approx(whole.measured, rel=1e-5)
            if share == 0:
                assert sum(forwards) < 3 * len(rows)
    finally:
        frozen_toy[0].reset_hooks()


@pytest.mark.parametrize(("max_loss", "agreement", "allowed"), [
    (0.05, None, 0.02), (0.01, None, 0.02), (0.5, None, 0.2), (0.5, 0.98, 0.02), (0.01, 0.9, 0.1)])
def test_what_a_budget_allows(toy: Toy, max_loss: float, agreement: float | None, allowed: float) -> None:
    """Of choices by what was asked for, also where the search takes less of the loss."""
    budget = budget_of(find_nodes(toy[0]), max_loss, agreement, None, None, None, None)
    assert budget.violation(Measured(max_loss, 0.0, 0.0)) == pytest.approx(1)
    for taken in (budget, replace(budget, max_loss=0.4 * max_loss)):
        assert taken.violation(Measured(0.0, allowed, 0.0)) == pytest.approx(1)
    assert Budget(agreement=1.0).violation(Measured(0.0, 0.0, 0.0)) == 0 and Budget(agreement=1.0).violation(Measured(0.0, 0.001, 0.0)) > 1


def test_flipping_adds_up_and_back() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, slope, kept = torch.randn(6, 5, generator=generator), torch.randn(5, generator=generator), torch.tensor([1, 1, 0, 0, 1]).bool()
    model = Quadratic(torch.arange(5), kept, slope, rows, 0.3)
    together = model.cost_of_closing(torch.tensor([0, 1]))
    assert model.flip(0) + model.flip(1) == pytest.approx(float(together), abs=1e-5)
    model.flip(2)
    d = torch.tensor([-1.0, -1, 1, 0, 0])
    assert model.loss == pytest.approx(float(0.3 + slope @ d + (rows @ d).pow(2).sum() / 2), abs=1e-4)
    for i in (2, 1, 0):
        model.flip(i)
    assert model.loss == pytest.approx(0.3, abs=1e-5) and torch.equal(model.kept, kept)


def test_fisher_probes_make_the_hessian_of_kl() -> None:
    logits = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
    q = logits.softmax(-1)
    wanted = torch.diag_embed(q) - q.unsqueeze(2) * q.unsqueeze(1)
    exact = sum(v.unsqueeze(2) * v.unsqueeze(1) for v in fisher_probes(logits, exact=7))
    assert torch.allclose(exact, wanted, atol=1e-6)
    generator = torch.Generator().manual_seed(0)
    drawn = [sum(v.unsqueeze(2) * v.unsqueeze(1) for v in fisher_probes(logits, generator, exact=3)) for _ in range(3000)]
    assert torch.allclose(torch.stack(drawn).mean(0), wanted, atol=0.01)  # type: ignore[arg-type]


def test_units_are_the_leaves_below_each_coarse_gate(frozen_toy: Toy) -> None:
    landscape = landscape_of(frozen_toy)
    sizes = sorted(len(unit) for unit in landscape.units())
    heads, attns, mlps, layers = 12 * [24], 3 * [96], 3 * [480], 3 * [576]
    assert sizes == sorted(heads + attns + mlps + layers)
    assert landscape_of(frozen_toy, ("attn_neuron",)).units() == []


def test_a_search_cut_anew_meets_another_budget_by_the_scores_it_was_cut_from(frozen_toy: Toy) -> None:
    landscape, rows = landscape_of(frozen_toy, ("head", "mlp")), torch.arange(len(frozen_toy[1]))
    landscape.budget = Budget(max_loss=1.0)
    search = Search(landscape, rows, steps=12, step_prompts=64, generator=torch.Generator().manual_seed(0), record=lambda *_: None)
    loose = search.run()
    landscape.budget = Budget(max_loss=loose.loss / 4)
    assert search.best is not None and landscape.snapshot(loose.kept, rows).violation > 1
    scores, cut = search.best.scores, search.cut()
    assert scores is not None and cut.violation <= 1 and cut.size > loose.size
    fewer = torch.zeros_like(cut.kept)
    fewer[scores.topk(cut.size - 1).indices] = True
    assert bool((fewer <= cut.kept).all()) and landscape.snapshot(fewer, rows).violation > 1


def test_a_search_that_meets_no_budget_gives_the_nearest_circuit(frozen_toy: Toy) -> None:
    landscape, rows = landscape_of(frozen_toy, ("head", "mlp")), torch.arange(len(frozen_toy[1]))
    landscape.budget, losses = Budget(max_loss=1e-6), list[float]()
    search = Search(landscape, rows, steps=8, step_prompts=64, generator=torch.Generator().manual_seed(0),
                    record=lambda step, loss, size, score: losses.append(loss))
    found = search.run()
    assert search.best is None and len(losses) == 8 and min(losses) > 1e-6
    assert found.size < landscape.n and found.loss == min(losses) == pytest.approx(landscape.snapshot(found.kept, rows).loss, rel=1e-5)
