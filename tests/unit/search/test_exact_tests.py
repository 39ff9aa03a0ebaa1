"""Exact tests of what is left: none goes beyond the limit, and what is said to be needed is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from landscapes import all_rows, landscape_of, random_kept
from torch import Tensor

import tl_nodeprune as tlnp
from tl_nodeprune.masks.landscape import Landscape, circuits_of
from tl_nodeprune.search.budget import Budget
from tl_nodeprune.search.exact_tests import ExactTests

Toy = tuple[Any, tlnp.PromptPairs]
COARSE = ("head", "mlp")


def exact(landscape: Landscape, budget: Budget, scores: Tensor | None = None, **options: Any) -> ExactTests:
    return ExactTests(landscape, budget, all_rows(landscape), torch.zeros(landscape.n) if scores is None else scores, **options)


def loss_of(tests: ExactTests, kept: Tensor) -> float:
    return float(tests.measure([kept]).loss.mean())


def hinge_of(tests: ExactTests, kept: Tensor) -> float:
    return float(tests.measure([kept]).hinge.mean())


@pytest.mark.parametrize("granularities", [COARSE, ("attn", "head", "mlp", "mlp_neuron")])
@pytest.mark.parametrize("limit", [0.3, 0.02])
def test_minimal_means_that_no_unit_can_go(frozen_toy: Toy, granularities: tuple[str, ...], limit: float) -> None:
    """Complete with tests of all nodes; each is tried here once more. With few tests it says that some were left."""
    landscape = landscape_of(frozen_toy, granularities)
    kept = torch.ones(landscape.n, dtype=torch.bool)
    tests = exact(landscape, Budget(max_loss=limit))
    most_hinge = hinge_of(tests, kept) + limit - loss_of(tests, kept)
    found = tests.minimal(kept, limit, 10_000 if granularities == COARSE else 3)
    assert tests.complete == (granularities == COARSE) and loss_of(tests, found) <= limit and int(found.sum()) < landscape.n
    units = landscape.units() if landscape.units() else [torch.tensor([i]) for i in range(landscape.n)]
    losses = tests.measure([found.index_fill(0, unit, False) for unit in units if found[unit].any()])
    assert not ((losses.loss.mean(-1) <= limit) & (losses.hinge.mean(-1) <= most_hinge) & (losses.wrong.mean(-1) <= 0.02)).any()


def test_each_kept_unit_is_tested_or_ruled_out_and_none_of_these_could_go(frozen_toy: Toy) -> None:
    """Where none can go one round is all. A head and the block in which nothing else is kept are one unit."""
    landscape = landscape_of(frozen_toy, ("attn", "head", "attn_neuron"), batch_size=240)
    kept = random_kept(landscape, 0.5)
    units = landscape.units()
    heads = [unit for unit in units if len(unit) == min(map(len, units))]
    for head in heads[1: len(heads) // 2]:
        kept[head] = False  # in the first block one head is left
    tests = exact(landscape, Budget(max_loss=50.0))
    limit = loss_of(tests, kept) * (1 - 1e-6)
    assert torch.equal(tests.minimal(kept, limit, 10_000), kept)
    different = {tuple(unit[kept[unit]].tolist()) for unit in units if kept[unit].any()}
    assert tests.complete and tests.tested + tests.ruled_out == len(different) + int(kept.sum())
    assert len(different) < sum(bool(kept[unit].any()) for unit in units) and tests.ruled_out > 0


def test_what_costs_far_more_than_the_room_is_ruled_out(frozen_toy: Toy) -> None:
    landscape = landscape_of(frozen_toy, ("head", "attn_neuron"), batch_size=240)
    kept = random_kept(landscape, 0.2)
    tests = exact(landscape, Budget(max_loss=50.0, agreement=0.0))
    limit = 1.01 * loss_of(tests, kept)
    found = tests.minimal(kept, limit, 10_000)
    assert tests.ruled_out > 0 and tests.complete and loss_of(tests, found) <= limit
    without = [found.index_fill(0, node, False) for node in found.nonzero()]
    losses = tests.measure(without)
    could_go = (losses.loss.mean(-1) <= limit) & (losses.hinge.mean(-1) <= hinge_of(tests, kept) + 0.01 * limit)
    assert not could_go.any()


@pytest.mark.parametrize("most", [0, 5, 20])
def test_no_more_nodes_are_tried_than_asked_for(frozen_toy: Toy, most: int) -> None:
    """Also where 40 nodes can go one by one, but not together, so that some are tried again after others went."""
    landscape = landscape_of(frozen_toy, ("attn_neuron",), batch_size=240)
    kept = torch.ones(landscape.n, dtype=torch.bool)
    tests = exact(landscape, Budget(max_loss=50.0))
    singles = tests.measure([kept.index_fill(0, node, False) for node in kept.nonzero()]).loss.mean(-1)
    tests.minimal(kept, float(singles.sort().values[40]), most)
    assert tests.tested <= most and not tests.complete


def test_above_the_limit_nothing_is_closed_that_does_not_help(frozen_toy: Toy) -> None:
    landscape = landscape_of(frozen_toy, COARSE)
    kept = random_kept(landscape, 0.5)
    tests = exact(landscape, Budget(max_loss=0.01))
    assert loss_of(tests, kept) > 0.01
    found = tests.minimal(kept, 0.01, 100)
    assert torch.equal(found, kept) or loss_of(tests, found) <= 0.01


@pytest.mark.parametrize("granularities", [COARSE, None])
def test_when_time_is_up_the_circuit_stays(frozen_toy: Toy, granularities: Any) -> None:
    landscape = landscape_of(frozen_toy, granularities)
    kept = random_kept(landscape, 0.7)
    tests = exact(landscape, Budget(max_loss=50.0), over=lambda: True)
    assert torch.equal(tests.minimal(kept, 50.0, 10), kept) and not tests.complete and tests.tested == 0


def test_when_time_is_up_while_candidates_are_looked_at_the_rest_is_left(frozen_toy: Toy) -> None:
    """Two looks at the clock: the second one, before the second block of candidates, says that time is up."""
    landscape, looks = landscape_of(frozen_toy, ("attn_neuron",), batch_size=240), iter([False] * 2 + [True] * 99)
    kept = random_kept(landscape, 0.7)
    tests = exact(landscape, Budget(max_loss=50.0), over=lambda: next(looks))
    assert torch.equal(tests.minimal(kept, 50.0, 100), kept) and not tests.complete and (tests.tested, tests.ruled_out) == (0, 0)


def test_choices_get_less_sure_by_as_much_as_the_loss_may_rise_at_most(frozen_toy: Toy) -> None:
    """A huge loss is allowed, and where the hinge is held to what it was, far less goes."""
    landscape = landscape_of(frozen_toy, COARSE, batch_size=240)
    kept = torch.ones(landscape.n, dtype=torch.bool)
    tests = exact(landscape, Budget(max_loss=0.05, agreement=0.0))
    sure = tests.minimal(kept, loss_of(tests, kept) + 0.3, 1000)
    assert hinge_of(tests, sure) <= hinge_of(tests, kept) + 0.3 + 1e-5
    free = tests.minimal(kept, 99.0, 1000)
    assert hinge_of(tests, free) > hinge_of(tests, sure) and int(free.sum()) < int(sure.sum())


@pytest.mark.parametrize("agreement", [1.0, 0.75])
def test_the_choice_is_kept_as_often_as_asked(frozen_toy: Toy, agreement: float) -> None:
    landscape = landscape_of(frozen_toy, COARSE, batch_size=240)
    kept = torch.ones(landscape.n, dtype=torch.bool)
    tests = exact(landscape, Budget(max_loss=99.0, agreement=agreement))
    found = tests.minimal(kept, 99.0, 1000)
    assert 1 - float(tests.measure([found]).wrong.mean()) >= agreement - 1e-6
    assert int(found.sum()) < landscape.n


def test_a_loss_of_ones_own_is_tested_alike(frozen_toy: Toy) -> None:
    landscape = landscape_of(frozen_toy, COARSE)
    landscape.loss = tlnp.mib.distance
    kept = torch.ones(landscape.n, dtype=torch.bool)
    scores = landscape.losses(circuits_of([kept & (torch.arange(landscape.n) != i) for i in range(landscape.n)]),
                              all_rows(landscape)).loss.mean(-1)
    tests = exact(landscape, Budget(tlnp.mib.distance, 2.0), scores)
    found = tests.minimal(kept, 2.0, 1000)
    assert int(found.sum()) < landscape.n and loss_of(tests, found) <= 2.0 and tests.complete
