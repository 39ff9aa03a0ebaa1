"""The finish of a search: never worse at its size, never beyond a limit, and exact tests that say what could still go."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_landscape import all_rows, landscape_of, random_kept
from torch import Tensor

import tl_nodeprune as tlnp
from tl_nodeprune.search.budget import Budget, Limits
from tl_nodeprune.search.finish import Finish
from tl_nodeprune.search.landscape import Landscape, circuits_of
from tl_nodeprune.search.nested import effects

Toy = tuple[Any, tlnp.PromptPairs]
COARSE = ("head", "mlp")


def finish_of(landscape: Landscape, budget: Budget, begin: Tensor | None = None, scores: Tensor | None = None, **options: Any) -> Finish:
    """begin: a circuit whose hinge none may be above; None: any hinge will do."""
    made = Finish(landscape, budget, all_rows(landscape), torch.zeros(landscape.n) if scores is None else scores,
                  generator=torch.Generator().manual_seed(0), **options)
    if begin is not None:
        made.begin(begin)
    return made


def best_of(landscape: Landscape, share: float) -> Tensor:
    """The circuit of the largest effects."""
    scores = effects(landscape)
    kept = torch.zeros(landscape.n, dtype=torch.bool)
    kept[scores.topk(round(share * landscape.n)).indices] = True
    return kept


def loss_of(finish: Finish, kept: Tensor) -> float:
    return float(finish.measure([kept]).loss.mean())


def hinge_of(finish: Finish, kept: Tensor) -> float:
    return float(finish.measure([kept]).hinge.mean())


@pytest.mark.parametrize("kind", ["random", "effects"])
def test_exchanges_lower_the_loss_at_one_size(frozen_toy: Toy, kind: str) -> None:
    landscape = landscape_of(frozen_toy, ("mlp_neuron",))
    kept = best_of(landscape, 0.3) if kind == "effects" else random_kept(landscape, 0.5)
    finish = finish_of(landscape, Budget(max_size=int(kept.sum())), kept)
    found = finish.exchange(kept)
    assert int(found.sum()) == int(kept.sum()) and not torch.equal(found, kept)
    assert loss_of(finish, found) < 0.9 * loss_of(finish, kept) and hinge_of(finish, found) <= finish.hinge_limit + 1e-5


@pytest.mark.parametrize("seed", range(4))
def test_a_circuit_never_gets_worse_at_its_size(frozen_toy: Toy, seed: int) -> None:
    landscape = landscape_of(frozen_toy, COARSE)
    for share in (0.3, 0.8):
        kept = random_kept(landscape, share, seed)
        finish = finish_of(landscape, Budget(max_size=max(int(kept.sum()), 1)), kept)
        found = finish.exchange(kept)
        assert int(found.sum()) == int(kept.sum()) and loss_of(finish, found) <= loss_of(finish, kept) + 1e-6


def test_removals_stay_within_the_limit_and_get_ever_smaller(frozen_toy: Toy) -> None:
    landscape = landscape_of(frozen_toy, ("attn_neuron", "mlp_out"))
    kept = torch.ones(landscape.n, dtype=torch.bool)
    finish = finish_of(landscape, Budget(max_loss=0.1), kept)
    chain = finish.remove(kept, 0.1)
    sizes = [int(one.sum()) for one in chain]
    assert torch.equal(chain[0], kept) and sizes == sorted(sizes, reverse=True) and sizes[-1] < 0.9 * landscape.n
    assert all(loss_of(finish, one) <= 0.1 and hinge_of(finish, one) <= finish.hinge_limit + 1e-5 for one in chain)
    by_chance = torch.zeros(landscape.n, dtype=torch.bool)
    by_chance[torch.randperm(landscape.n, generator=torch.Generator().manual_seed(0))[: sizes[-1]]] = True
    assert loss_of(finish, by_chance) > 3 * loss_of(finish, chain[-1]), "a size-matched random circuit is much worse"


def test_nothing_is_removed_where_no_room_is_left(frozen_toy: Toy) -> None:
    landscape = landscape_of(frozen_toy, COARSE)
    kept = best_of(landscape, 0.5)
    finish = finish_of(landscape, Budget(max_loss=1e-4), kept)
    assert [torch.equal(one, kept) for one in finish.remove(kept, 1e-9)] == [True]


@pytest.mark.parametrize("granularities", [COARSE, ("attn", "head", "mlp", "mlp_neuron")])
@pytest.mark.parametrize("limit", [0.3, 0.02])
def test_minimal_means_that_no_unit_can_go(frozen_toy: Toy, granularities: tuple[str, ...], limit: float) -> None:
    """Complete with tests of all nodes; each is tried here once more. With few tests it says that some were left."""
    landscape = landscape_of(frozen_toy, granularities)
    kept = torch.ones(landscape.n, dtype=torch.bool)
    finish = finish_of(landscape, Budget(max_loss=limit), kept)
    found = finish.minimal(kept, limit, 10_000 if granularities == COARSE else 3)
    assert finish.tests.complete == (granularities == COARSE) and loss_of(finish, found) <= limit and int(found.sum()) < landscape.n
    units = landscape.units() if landscape.units() else [torch.tensor([i]) for i in range(landscape.n)]
    without = [found.index_fill(0, unit, False) for unit in units if found[unit].any()]
    losses = finish.measure(without)
    could_go = (losses.loss.mean(-1) <= limit) & (losses.hinge.mean(-1) <= finish.hinge_limit) & (losses.wrong.mean(-1) <= 0.02)
    assert not could_go.any()


def test_each_kept_unit_is_tested_or_ruled_out_and_none_of_these_could_go(frozen_toy: Toy) -> None:
    """Where none can go one round is all."""
    landscape = landscape_of(frozen_toy, ("attn", "head", "attn_neuron"), batch_size=240)
    kept = random_kept(landscape, 0.5)
    finish = finish_of(landscape, Budget(max_loss=50.0), kept)
    limit = loss_of(finish, kept) * (1 - 1e-6)
    assert torch.equal(finish.minimal(kept, limit, 10_000), kept) or loss_of(finish, kept) <= limit
    units = [unit for unit in landscape.units() if kept[unit].any()]
    assert finish.tests.complete and finish.tests.tested + finish.tests.ruled_out == len(units) + int(kept.sum())
    assert finish.tests.ruled_out > 0 and finish.tests.tested >= 32


def test_units_that_cost_far_more_than_the_room_are_ruled_out(frozen_toy: Toy) -> None:
    landscape = landscape_of(frozen_toy, ("head", "attn_neuron"), batch_size=240)
    kept = random_kept(landscape, 0.2)
    finish = finish_of(landscape, Budget(max_loss=50.0, agreement=0.0))
    limit = 1.01 * loss_of(finish, kept)
    found = finish.minimal(kept, limit, 10_000)
    assert finish.tests.ruled_out > 0 and finish.tests.complete and loss_of(finish, found) <= limit
    without = [found.index_fill(0, node, False) for node in found.nonzero()]
    assert (finish.measure(without).loss.mean(-1) > limit).all()


@pytest.mark.parametrize("tests", [0, 5, 20])
def test_no_more_nodes_are_tried_than_asked_for(frozen_toy: Toy, tests: int) -> None:
    """Also where 40 nodes can go one by one, but not together, so that some are tried again after others went."""
    landscape = landscape_of(frozen_toy, ("attn_neuron",), batch_size=240)
    kept = torch.ones(landscape.n, dtype=torch.bool)
    finish = finish_of(landscape, Budget(max_loss=50.0), kept)
    singles = finish.measure([kept.index_fill(0, node, False) for node in kept.nonzero()]).loss.mean(-1)
    finish.minimal(kept, float(singles.sort().values[40]), tests)
    assert finish.tests.tested <= tests and not finish.tests.complete


def test_above_the_limit_nothing_is_closed(frozen_toy: Toy) -> None:
    landscape = landscape_of(frozen_toy, COARSE)
    kept = random_kept(landscape, 0.5)
    finish = finish_of(landscape, Budget(max_loss=0.01), kept)
    assert loss_of(finish, kept) > 0.01
    found = finish.minimal(kept, 0.01, 100)
    assert torch.equal(found, kept) or loss_of(finish, found) <= 0.01


@pytest.mark.parametrize("granularities", [COARSE, None])
def test_when_time_is_up_the_circuit_stays(frozen_toy: Toy, granularities: Any) -> None:
    landscape = landscape_of(frozen_toy, granularities)
    kept = random_kept(landscape, 0.7)
    finish = finish_of(landscape, Budget(max_loss=50.0), kept, over=lambda: True)
    assert torch.equal(finish.exchange(kept), kept) and finish.remove(kept, 50.0) == [kept]
    assert torch.equal(finish.minimal(kept, 50.0, 10), kept) and not finish.tests.complete and finish.tests.tested == 0


def test_choices_stay_as_sure_as_they_were(frozen_toy: Toy) -> None:
    """Less sure by as much as the budget at most. A huge loss is allowed, so that only the hinge holds anything back."""
    landscape = landscape_of(frozen_toy, COARSE, batch_size=240)
    kept = torch.ones(landscape.n, dtype=torch.bool)
    sure, free = (finish_of(landscape, Budget(max_loss=0.05, agreement=0.0), begin) for begin in (kept, None))
    strict, loose = (finish.remove(kept, 99.0, rounds=6)[-1] for finish in (sure, free))
    assert hinge_of(sure, strict) <= sure.hinge_limit + 1e-5 < hinge_of(free, loose) and int(strict.sum()) > int(loose.sum())


@pytest.mark.parametrize("agreement", [1.0, 0.75])
def test_the_choice_is_kept_as_often_as_asked(frozen_toy: Toy, agreement: float) -> None:
    landscape = landscape_of(frozen_toy, COARSE, batch_size=240)
    kept = torch.ones(landscape.n, dtype=torch.bool)
    finish = finish_of(landscape, Budget(max_loss=99.0, agreement=agreement))
    chain = finish.remove(kept, 99.0, rounds=4)
    assert all(1 - float(finish.measure([one]).wrong.mean()) >= agreement - 1e-6 for one in chain[:2])
    assert 1 < int(chain[-1].sum()) < landscape.n


def test_within_limits_the_loss_falls_and_the_limits_hold(frozen_toy: Toy) -> None:
    landscape = landscape_of((frozen_toy[0], frozen_toy[1][:10]))
    limits, scores = Limits.of(landscape.space, {"head": 5, "mlp_neuron": 90}), torch.randn(
        landscape.n, generator=torch.Generator().manual_seed(1))
    kept = limits.best(scores)
    finish = finish_of(landscape, Budget(limits=limits), scores=scores)
    found = finish.exchange(kept)
    assert limits.hold(found) and loss_of(finish, found) < 0.95 * loss_of(finish, kept)
    assert landscape.circuit(found).count()["mlp_neuron"] <= 90


def test_a_loss_of_ones_own_is_finished_by_exact_tests(frozen_toy: Toy) -> None:
    """There is no quadratic of it; its nodes are tried in the order of the scores."""
    landscape = landscape_of(frozen_toy, COARSE)
    landscape.loss = tlnp.mib.distance
    kept = torch.ones(landscape.n, dtype=torch.bool)
    scores = landscape.losses(circuits_of([kept & (torch.arange(landscape.n) != i) for i in range(landscape.n)]),
                              all_rows(landscape)).loss.mean(-1)
    finish = finish_of(landscape, Budget(tlnp.mib.distance, 2.0), kept, scores)
    assert torch.equal(finish.exchange(kept), kept) and len(finish.remove(kept, 2.0)) == 1
    found = finish.minimal(kept, 2.0, 1000)
    assert int(found.sum()) < landscape.n and loss_of(finish, found) <= 2.0 and finish.tests.complete
