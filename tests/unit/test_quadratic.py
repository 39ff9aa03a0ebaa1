"""The loss near a circuit as a quadratic of its gates: its slope is exact, it foretells removals, and its plans keep what they promise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_landscape import all_rows, landscape_of, random_kept
from torch import Tensor

import tl_nodeprune as tlnp
from tl_nodeprune.search.landscape import circuits_of
from tl_nodeprune.search.quadratic import Quadratic, fisher_probes, quadratic

Toy = tuple[Any, tlnp.PromptPairs]


def made(n: int = 40, seed: int = 0, loss: float = 0.3) -> Quadratic:
    """A quadratic of random numbers, half of its gates kept."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(n, generator=generator) < 0.5
    slope = 0.1 * torch.randn(n, generator=generator)
    return Quadratic(torch.arange(100, 100 + n), kept, slope, 0.08 * torch.randn(12, n, generator=generator), loss)


def value(model: Quadratic, start: Quadratic, kept: Tensor) -> float:
    """The loss by its formula, from where `start` is."""
    d = kept.float() - start.kept.float()
    return start.loss + float(start._slope @ d + (start.rows @ d).pow(2).sum() / 2)


@pytest.mark.parametrize("granularities", [None, ("head", "mlp"), ("layer", "attn", "mlp_neuron"), ("attn_neuron", "mlp_out")])
def test_the_slope_is_exact(frozen_toy: Toy, granularities: tuple[str, ...] | None) -> None:
    """Of the mean over prompts of KL + hinge, as the search's gradient has it."""
    landscape, generator = landscape_of(frozen_toy, granularities), torch.Generator().manual_seed(0)
    kept, rows = random_kept(landscape, 0.7), all_rows(landscape)
    gradient = landscape.gradient(kept.float().expand(len(rows), -1), rows, 0)[1].mean(0)
    model = quadratic(landscape, kept, rows, torch.arange(landscape.n), generator)
    costs = torch.where(kept, -gradient, gradient) + model.rows.pow(2).sum(0) / 2
    assert gradient.abs().max() > 0 and torch.allclose(model.costs(), costs, atol=1e-4 * float(costs.abs().max()))
    assert model.loss == pytest.approx(float(landscape.losses(circuits_of([kept]), rows).loss.mean()), rel=1e-4)


def test_single_removals_are_foretold(frozen_toy: Toy) -> None:
    landscape = landscape_of(frozen_toy, ("attn_neuron",))
    kept, rows = torch.ones(landscape.n, dtype=torch.bool), all_rows(landscape)
    model = quadratic(landscape, kept, rows, torch.arange(landscape.n), torch.Generator().manual_seed(0))
    some = model.costs().argsort(descending=True)[:60:10]
    without = [kept & (torch.arange(landscape.n) != i) for i in some]
    measured, foretold = landscape.losses(circuits_of(without), rows).loss.mean(-1), model.costs()[some]
    assert torch.corrcoef(torch.stack([foretold, measured]))[0, 1] > 0.9
    assert 0.5 < float(foretold.sum()) / float(measured.sum()) < 2


@pytest.mark.parametrize("seed", range(3))
def test_flipping_adds_up_and_back(seed: int) -> None:
    model, start, generator = made(seed=seed), made(seed=seed), torch.Generator().manual_seed(seed)
    closing = start.kept.nonzero()[:5, 0]
    assert float(model.cost_of_closing(closing)) == pytest.approx(value(model, start, start.kept & ~torch.isin(torch.arange(40), closing))
                                                                  - start.loss, abs=1e-5)
    moves = [torch.randperm(40, generator=generator)[:k] for k in (1, 4, 9)]
    for move in moves:
        alone, before = model.costs()[move], model.loss
        added = model.flip(move)
        assert model.loss == pytest.approx(before + added) and (len(move) > 1 or added == pytest.approx(float(alone[0]), abs=1e-5))
        assert model.loss == pytest.approx(value(model, start, model.kept), abs=1e-4)
    for move in reversed(moves):
        model.flip(move)
    assert model.loss == pytest.approx(start.loss, abs=1e-4) and torch.equal(model.kept, start.kept)
    torch.testing.assert_close(model.costs(), start.costs(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("most", [1, 5, 16])
def test_exchanges_keep_the_size_and_lower_the_loss_as_foretold(seed: int, most: int) -> None:
    model, start = made(seed=seed), made(seed=seed)
    pairs = model.exchanges(most)
    assert 0 < len(pairs) <= most + 2 and len(pairs.flatten().unique()) == 2 * len(pairs), "no node is moved twice"
    assert not start.kept[pairs[:, 0]].any() and start.kept[pairs[:, 1]].all()
    assert int(model.kept.sum()) == int(start.kept.sum()) and model.loss < start.loss
    assert model.loss == pytest.approx(value(model, start, model.kept), abs=1e-4)


def test_there_is_nothing_to_exchange_where_no_pair_helps() -> None:
    """At the minimum, or where all or none is kept."""
    slope = torch.where(torch.arange(10) < 5, -1.0, 1.0)
    best = Quadratic(torch.arange(10), torch.arange(10) < 5, slope, torch.zeros(1, 10), 1.0)
    for model in (best, *(Quadratic(torch.arange(10), torch.full((10,), side), slope, torch.zeros(1, 10), 1.0) for side in (True, False))):
        before = model.loss
        assert model.exchanges(4).shape == (0, 2) and model.loss == before


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rise", [0.0, 0.05, 0.5, 100.0])
def test_removals_stay_within_the_limit_as_foretold(seed: int, rise: float) -> None:
    model, start = made(seed=seed), made(seed=seed)
    closed = model.removals(start.loss + rise, 9)
    assert len(closed) <= 9 + 1 and len(closed.unique()) == len(closed) and bool(start.kept[closed].all())
    assert model.loss <= start.loss + rise + 1e-6 and not model.kept[closed].any()
    assert int(model.kept.sum()) == int(start.kept.sum()) - len(closed) and (rise < 100 or len(closed) >= 9)


def test_fisher_probes_make_the_hessian_of_kl() -> None:
    logits = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
    q = logits.softmax(-1)
    wanted = torch.diag_embed(q) - q.unsqueeze(2) * q.unsqueeze(1)
    exact = sum(v.unsqueeze(2) * v.unsqueeze(1) for v in fisher_probes(logits, exact=7))
    assert torch.allclose(exact, wanted, atol=1e-6)
    generator = torch.Generator().manual_seed(0)
    drawn = [sum(v.unsqueeze(2) * v.unsqueeze(1) for v in fisher_probes(logits, generator, exact=3)) for _ in range(3000)]
    assert torch.allclose(torch.stack(drawn).mean(0), wanted, atol=0.01)  # type: ignore[arg-type]
