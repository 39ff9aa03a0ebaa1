"""The finish of a search: never worse, within the budget, minimal where exact tests say so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_landscape import landscape_of

import tl_nodeprune as tlnp
from tl_nodeprune.budget import Budget
from tl_nodeprune.landscape import Landscape
from tl_nodeprune.refine import Descent, Refinement

Toy = tuple[Any, tlnp.PromptPairs]


def refinement(landscape: Landscape, kept: torch.Tensor, budget: Budget) -> Refinement:
    landscape.budget = budget
    rows = torch.arange(len(landscape.reference.prompts))
    return Refinement(landscape, rows, landscape.snapshot(kept, rows), torch.zeros(landscape.n), step_prompts=128,
                      generator=torch.Generator().manual_seed(0), record=lambda *step: None)


def test_a_full_model_shrinks_within_its_budget(frozen_toy: Toy) -> None:
    landscape = landscape_of(frozen_toy, ("attn_neuron", "mlp_out"))
    finish = refinement(landscape, torch.ones(landscape.n, dtype=torch.bool), Budget(max_loss=0.1))
    sizes = []
    for _ in range(4):
        finish.run(1, 0)
        sizes.append(finish.best.size)
        assert finish.best.violation <= 1
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] < 0.9 * landscape.n


def test_at_a_fixed_size_exchanges_only_lower_the_loss(frozen_toy: Toy) -> None:
    landscape = landscape_of(frozen_toy, ("mlp_neuron",))
    kept = torch.arange(landscape.n) % 2 == 0
    finish = refinement(landscape, kept, Budget(max_size=int(kept.sum())))
    before = finish.best.loss
    finish._hinge_limit = float("inf")
    finish.run(4, 0)
    assert finish.best.loss < 0.7 * before and finish.best.size == int(kept.sum())


def test_above_the_budget_it_opens_nodes(frozen_toy: Toy) -> None:
    landscape = landscape_of(frozen_toy, ("head", "mlp"))
    finish = refinement(landscape, torch.zeros(landscape.n, dtype=torch.bool), Budget(max_loss=0.5))
    assert finish.best.violation > 1
    finish._hinge_limit = float("inf")
    finish.run(12, 0)
    assert finish.best.violation <= 1 and finish.best.size > 0


def test_where_only_choices_differ_it_opens_as_many_nodes_again_at_most(frozen_toy: Toy) -> None:
    landscape = landscape_of(frozen_toy, None)
    kept = torch.zeros(landscape.n, dtype=torch.bool)
    kept[torch.randperm(landscape.n, generator=torch.Generator().manual_seed(0))[:200]] = True
    finish = refinement(landscape, kept, Budget(max_loss=1e3, agreement=1.0))
    before = finish.best.violation
    assert before > 1 and finish.best.loss < 1e3
    finish._hinge_limit = float("inf")
    finish.run(1, 0)
    assert finish.best.violation < before and finish.best.size <= 400


@pytest.mark.parametrize("granularities", [("head", "mlp"), None])
def test_minimal_means_that_no_unit_can_go(frozen_toy: Toy, granularities: tuple[str, ...] | None) -> None:
    landscape = landscape_of(frozen_toy, granularities)
    finish = refinement(landscape, torch.ones(landscape.n, dtype=torch.bool), Budget(max_loss=0.3))
    complete = finish.minimal(1000 if granularities else 4)
    assert complete == bool(granularities) and finish.best.violation <= 1 and finish.best.size < landscape.n
    units = landscape.units() if granularities is None else [torch.tensor([i]) for i in range(landscape.n)]
    for unit in units:
        kept = finish.best.kept.clone()
        kept[unit] = False
        if int(kept.sum()) < finish.best.size:
            found = landscape.snapshot(kept, finish.everything)
            assert found.violation > 1 or found.measured.hinge > finish._hinge_limit


def test_the_way_down_removes_alone_and_stays_within_the_budget(frozen_toy: Toy) -> None:
    landscape = landscape_of(frozen_toy, ("attn_neuron", "mlp_out"))
    landscape.budget = Budget(max_loss=0.1)
    rows = torch.arange(len(landscape.reference.prompts))
    descent = Descent(landscape, rows, landscape.snapshot(torch.ones(landscape.n, dtype=torch.bool), rows), torch.zeros(landscape.n),
                      step_prompts=128, generator=torch.Generator().manual_seed(0), record=lambda *step: None)
    before = descent.best.kept
    for _ in range(4):
        descent.run(1, 0)
        assert descent.best.violation <= 1 and not (descent.best.kept & ~before).any()
        before = descent.best.kept
    lot = torch.zeros(landscape.n, dtype=torch.bool)
    lot[torch.randperm(landscape.n, generator=torch.Generator().manual_seed(0))[: descent.best.size]] = True
    assert descent.best.size < 0.8 * landscape.n and landscape.snapshot(lot, rows).violation > 1
