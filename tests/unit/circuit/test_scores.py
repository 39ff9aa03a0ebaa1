"""Scores of nodes: their order, circuits of every size, files' shapes, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import tl_nodeprune as tlnp
from tl_nodeprune.circuit.scores import NodeScores, check_sizes, kept_first, ranks
from tl_nodeprune.nodes.probe import find_nodes
from tl_nodeprune.nodes.space import GateKey

Toy = tuple[Any, tlnp.PromptPairs]
COARSE = ("head", "mlp")


def random_scores(model: Any, granularities: tuple[str, ...] | None = None, seed: int = 0) -> NodeScores:
    space = find_nodes(model).restrict(granularities)
    return NodeScores.from_flat(torch.rand(space.free_total(), generator=torch.Generator().manual_seed(seed)), space)


def leaves(circuit: tlnp.Circuit) -> torch.Tensor:
    return torch.cat([circuit.live(*key).flatten() for key in circuit.space.free()])


def test_the_best_nodes_are_kept_and_circuits_are_nested(toy: Toy) -> None:
    scores = random_scores(toy[0])
    before = torch.zeros(scores.n, dtype=torch.bool)
    for size in (1, 17, 0.1, 0.5, 1.0):
        kept = leaves(scores.top(size))
        best = torch.zeros(scores.n, dtype=torch.bool)
        best[scores.flat.topk(scores.count(size)).indices] = True
        assert torch.equal(kept, best) and bool((kept | ~before).all())
        before = kept
    assert scores.top(0) == tlnp.Circuit.empty(scores.space) and scores.top(1.0) == tlnp.Circuit.full(scores.space)


def test_ties_go_to_the_first_and_a_share_is_the_nearest_count_but_one_at_least(toy: Toy) -> None:
    space = find_nodes(toy[0]).restrict(COARSE)
    scores = NodeScores.from_flat(torch.zeros(space.free_total()), space)
    assert leaves(scores.top(3)).tolist() == [True] * 3 + [False] * (scores.n - 3)
    assert [scores.count(size) for size in (0, 0.0, 0.001, 0.5, 1.0)] == [0, 0, 1, round(scores.n / 2), scores.n]


def test_scores_are_a_mapping_with_the_shapes_of_a_circuit(toy: Toy) -> None:
    scores = random_scores(toy[0])
    circuit = scores.top(0.5)
    shapes = {hook: tuple(value.shape) for hook, value in scores.items()}
    assert shapes == {hook: tuple(circuit[hook].shape) for hook in shapes} and len(shapes) == len(scores)
    scores["blocks.0.attn.hook_z"].zero_()
    assert scores["blocks.0.attn.hook_z"].abs().sum() > 0
    with pytest.raises(KeyError, match="'blocks.0.hook_resid_post' has no scores; scored are blocks.0.attn.hook_z"):
        scores["blocks.0.hook_resid_post"]


def test_a_circuit_ranks_its_nodes_first_each_side_in_the_given_order(toy: Toy) -> None:
    first, second = random_scores(toy[0], COARSE), random_scores(toy[0], COARSE, seed=1)
    circuit = first.top(5)
    made = NodeScores.from_circuit(circuit, within=second)
    assert made.top(5) == circuit and sorted((made.flat * made.n).round().tolist()) == list(range(1, made.n + 1))
    kept = leaves(circuit)
    for side in (kept, ~kept):
        assert torch.equal(made.flat[side].argsort(), second.flat[side].argsort())
    with pytest.raises(ValueError, match="over different nodes"):
        NodeScores.from_circuit(circuit, within=random_scores(toy[0]))


def test_effects_rank_what_helps_first_in_both_directions(toy: Toy) -> None:
    model, prompts = toy
    for direction, sign in (("denoise", 1), ("noise", -1)):
        effects = tlnp.crosscheck.attribution_patching(model, prompts, COARSE, direction=direction)
        scores = NodeScores.from_effects(effects)
        key = max(effects.gates, key=lambda key: float((sign * effects.gates[key]).max()))
        best = int((sign * effects.gates[key]).argmax()) if effects.gates[key].ndim else ()
        assert bool(scores.top(1).live(*key)[best])
        assert torch.equal(NodeScores.from_effects(effects, absolute=True).flat, scores.flat.abs())


@pytest.mark.parametrize(("size", "text"), [(1.5, "size=1.5; give a share of 0.0 to 1.0"), (-1, "a count of 0 to 15"), (16, "size=16"),
                                            (True, "size=True; it must be a number")])
def test_sizes_outside_are_named(toy: Toy, size: Any, text: str) -> None:
    with pytest.raises(TypeError if size is True else ValueError, match=text):
        random_scores(toy[0], COARSE).top(size)


def test_wrong_scores_are_named(toy: Toy) -> None:
    good = random_scores(toy[0], COARSE)
    key = GateKey("head", 1)
    for bad, text in ((None, r"head nodes of layer 1 are missing; expected \[4\]"), (torch.zeros(3), r"are \[3\]; expected \[4\]"),
                      (torch.full((4,), torch.nan), "NaN or inf in the scores of the head nodes of layer 1")):
        gates = {k: v for k, v in {**good.gates, key: bad}.items() if v is not None}
        with pytest.raises(ValueError, match=text):
            NodeScores(gates, good.space)
    with pytest.raises(TypeError, match="scores of the head nodes of layer 1 are ndarray; give a tensor"):
        NodeScores({**good.gates, key: np.zeros(4)}, good.space)


def test_scores_are_equal_by_their_values_and_counts_may_be_numpy(toy: Toy) -> None:
    scores = random_scores(toy[0], COARSE)
    assert scores == random_scores(toy[0], COARSE) and scores != random_scores(toy[0], COARSE, seed=1)
    assert scores != random_scores(toy[0], ("head",))
    assert scores.count(np.int64(3)) == 3 and scores.top(np.int64(3)) == scores.top(3)


def test_ranks_go_from_one_down_in_steps_of_one_over_n() -> None:
    assert ranks(torch.tensor([0.1, 3.0, -2.0, 0.5])).tolist() == [0.5, 1.0, 0.25, 0.75]
    assert ranks(torch.zeros(4)).tolist() == [1.0, 0.75, 0.5, 0.25], "of equal keys the first come first"


def test_kept_nodes_come_first_each_side_in_its_order() -> None:
    kept, scores = torch.tensor([0.0, 1, 0, 1, 0]), torch.tensor([9.0, -5, 3, -1, 7])
    assert kept_first(kept, scores).argsort(descending=True).tolist() == [3, 1, 0, 4, 2]


@pytest.mark.parametrize("sizes", [(0.5, 0.1, 1.0), (0.1, 0.5), (1.0,), (0.0, 1.0), (0.5, 0.5, 1.0)])
def test_sizes_must_ascend_to_one(sizes: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="give two or more shares of the nodes, ascending, above 0, the last one 1.0"):
        check_sizes(sizes)
    check_sizes((0.1, 0.5, 1.0))


def test_ranks_are_apart_whatever_the_default_dtype() -> None:
    """bfloat16 as the default, which people set to load a model, has no 1,000 numbers below 1."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = ranks(torch.arange(1000))
    finally:
        torch.set_default_dtype(torch.float32)
    assert len(found.unique()) == 1000 and found.dtype == torch.float32
