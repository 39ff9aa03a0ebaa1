"""Nested training: masks of each size, scores to start from, and a state that can be saved and taken up again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from landscapes import all_rows, landscape_of
from torch import Tensor

import tl_nodeprune as tlnp
from tl_nodeprune.masks.landscape import circuits_of
from tl_nodeprune.search.budget import Limits
from tl_nodeprune.search.nested import BINS, ELSEWHERE, FARTHEST, SIZE_BINS, START_WIDTH, Nested, effects, groups, thresholds

Toy = tuple[Any, tlnp.PromptPairs]
COARSE = ("head", "mlp")


def trained(toy: Toy, steps: int, *, granularities: tuple[str, ...] | None = COARSE, ablation: str = "interchange", seed: int = 0,
            step_prompts: int = 5, limits: dict[str, int] | None = None, until: int | None = None, given: bool = False) -> Nested:
    """given: from scores sampled at random, not the landscape's effects."""
    landscape = landscape_of(toy, granularities, ablation)
    nested = Nested(landscape, steps=steps, step_prompts=step_prompts, generator=torch.Generator().manual_seed(seed),
                    limits=Limits.of(landscape.space, limits) if limits else None)
    nested.begin()
    if given:
        nested.state["scores"] = torch.randn(landscape.n, generator=torch.Generator().manual_seed(9))
    go_on(nested, until)
    return nested


def go_on(nested: Nested, until: int | None = None) -> None:
    while nested.done < (nested.steps if until is None else until):
        nested.step(nested.done / nested.steps)


@pytest.mark.parametrize("n", [15, 1728, 2 * BINS, 2 * BINS + 1, 30_000])
@pytest.mark.parametrize("temperature", [0.5, 0.1])
@pytest.mark.parametrize("spread", [1.0, 8.0])
def test_a_soft_mask_sums_to_its_size(n: int, temperature: float, spread: float) -> None:
    """Also where there are so many scores that a histogram stands for them."""
    generator = torch.Generator().manual_seed(n)
    scores = spread * torch.randn(n, generator=generator)
    sizes = torch.tensor([max(0.005 * n, 1), 0.02 * n + 1, 0.3 * n, 0.5 * n, 0.999 * n])
    masks = torch.sigmoid((scores - thresholds(scores, sizes, temperature)[:, None]) / temperature)
    torch.testing.assert_close(masks.sum(1), sizes, rtol=0.005, atol=0)


def test_equal_scores_give_every_node_the_same_share() -> None:
    for n in (10, 3 * BINS):
        scores, sizes = torch.zeros(n), torch.tensor([0.1 * n, 0.7 * n])
        masks = torch.sigmoid((scores - thresholds(scores, sizes, 0.3)[:, None]) / 0.3)
        torch.testing.assert_close(masks, sizes[:, None].expand(2, n) / n, rtol=1e-3, atol=1e-3)


def test_scores_start_from_how_much_nodes_matter_to_any_prompt(frozen_toy: Toy) -> None:
    """Standardised, the one whose removal costs most high, one without effect lowest; by their mean where signed."""
    landscape = landscape_of(frozen_toy, COARSE)
    found, signed = effects(landscape), effects(landscape, signed=True)
    assert float(found.mean()) == pytest.approx(0, abs=0.2) and found.abs().max() <= START_WIDTH * FARTHEST
    assert float(found.std()) == pytest.approx(START_WIDTH, rel=0.3)
    without = [torch.arange(landscape.n) != i for i in range(landscape.n)]
    rises = landscape.losses(circuits_of(without), all_rows(landscape)).loss.mean(-1)
    assert torch.isin(rises.argmax(), found.topk(4).indices) and torch.isin(rises.argmax(), signed.topk(4).indices)
    assert float(signed.pow(2).mean()) == pytest.approx(1, rel=1e-4) and signed.min() < signed.max()


def test_training_orders_nodes_better_than_their_start(frozen_toy: Toy) -> None:
    nested, landscape = trained(frozen_toy, 40, granularities=None, step_prompts=16), landscape_of(frozen_toy)

    def loss(scores: Tensor) -> float:
        kept = [scores >= scores.topk(round(share * landscape.n)).values[-1] for share in (0.2, 0.3, 0.45)]
        return float(landscape.losses(circuits_of(kept), all_rows(landscape)).loss.mean())

    start, chance = effects(landscape), torch.rand(landscape.n, generator=torch.Generator().manual_seed(0))
    assert loss(nested.scores) < 0.8 * loss(start) and loss(start) < 0.2 * loss(chance)
    trace = nested.state["trace"]
    assert bool((trace[:, 2].diff() < 0).all()) and trace[:, 1].min() > 0 and trace[:, 1].max() < landscape.n


def test_every_prompt_is_used_once_before_any_is_used_twice(frozen_toy: Toy) -> None:
    nested = trained(frozen_toy, 1, step_prompts=9, given=True)
    drawn = torch.cat([nested._rows() for _ in range(8)])
    assert [sorted(part.tolist()) for part in (drawn[15:39], drawn[39:63])] == [list(range(24))] * 2, "the first step took 9"
    everything = trained(frozen_toy, 1, step_prompts=100, given=True)
    assert everything._rows().tolist() == list(range(24))


@pytest.mark.parametrize(("ablation", "limits"), [("interchange", None), ("optimal", None), ("mean", {"head": 3})])
def test_a_training_taken_up_again_ends_in_the_same_scores(frozen_toy: Toy, ablation: str, limits: dict[str, int] | None) -> None:
    """Bit for bit: scores, constants, and what is drawn."""
    whole, first, second = (trained(frozen_toy, 6, until=until, ablation=ablation, limits=limits, given=True) for until in (6, 4, 0))
    saved = {name: value.clone() for name, value in first.saved().items()}
    second.generator.set_state(first.generator.get_state())
    go_on(first)
    second.load(saved)
    assert second.done == 4
    go_on(second)
    assert all(torch.equal(value, whole.saved()[name]) for nested in (first, second) for name, value in nested.saved().items())
    other = trained(frozen_toy, 6, ablation=ablation, limits=limits, given=True, seed=1)
    assert not torch.equal(other.scores, whole.scores), "another seed draws other prompts"


def test_within_limits_the_masks_are_circuits_within_them(frozen_toy: Toy) -> None:
    nested = trained(frozen_toy, 4, granularities=("head", "mlp_neuron"), limits={"head": 3, "mlp_neuron": 50}, given=True)
    gates, _, _ = nested._within(8)
    assert gates.shape[0] == 8 and set(gates.unique().tolist()) == {0.0, 1.0}
    assert nested.limits is not None and nested.limits.hold(gates[0].bool())


def test_dims_of_a_head_and_a_side_of_an_mlp_are_a_group_and_coarse_nodes_stand_alone(frozen_toy: Toy) -> None:
    landscape = landscape_of(frozen_toy)
    ids, found = landscape.gates(torch.arange(landscape.n)), groups(landscape.space)
    expected = [row for key in landscape.keys for row in (ids[key] if key.granularity == "attn_neuron" else [ids[key]])]
    assert int(found.max()) + 1 == len(expected) and all(len(found[row].unique()) == 1 for row in expected)
    assert groups(landscape_of(frozen_toy, COARSE).space).tolist() == list(range(landscape_of(frozen_toy, COARSE).n))


def test_what_a_group_has_in_common_moves_it_beyond_what_moves_its_nodes(frozen_toy: Toy) -> None:
    nested = trained(frozen_toy, 1, granularities=None, given=True, until=0)
    group = nested.groups == nested.groups[0]
    signs = torch.where(torch.arange(int(group.sum())) % 2 == 0, 1.0, -1.0)
    moves = []
    for values in (torch.ones(int(group.sum())), signs):
        nested.state["first"].zero_()
        nested.state["second"].zero_()
        moves.append(nested._move(torch.zeros(nested.landscape.n).masked_scatter(group, values)))
    assert float(moves[0][group].min()) > 1.5 * float(moves[1][group].max()) and not moves[0][~group].any()


@pytest.mark.parametrize("near", [0.1, 60])
def test_sizes_are_drawn_most_often_near_what_is_asked_for(frozen_toy: Toy, near: float | int) -> None:
    """A loss that falls with the size from 10 to .001; before every size was seen all are drawn alike."""
    nested = trained(frozen_toy, 1, granularities=None, given=True, until=0)
    nested.near = near
    assert nested._often().tolist() == [1.0] * SIZE_BINS
    nested.state["losses"] = torch.logspace(1, -3, SIZE_BINS)
    often, wanted = nested._often(), near
    if isinstance(near, float):
        assert float(nested.state["losses"][often.argmax()]) == pytest.approx(near, rel=0.5)
    assert float(often.min()) < 1.5 * ELSEWHERE and float(often.max()) > 0.9
    sizes = torch.cat([nested._nested(64, 0.5)[0].sum(1) for _ in range(8)])
    middle = float(sizes.log().median().exp()) if isinstance(wanted, int) else None
    assert middle is None or wanted / 3 < middle < 3 * wanted
