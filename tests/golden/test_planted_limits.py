"""Circuits wired by hand, found from how many nodes of a granularity they have."""

from __future__ import annotations

import planted
import pytest
from planted import nodes_of
from test_planted import plant

CASES = [
    ("lookup", ("head", "mlp_neuron"), {"head": 1, "mlp_neuron": 4}), ("lookup", None, {"head": 1}), ("lookup", None, {"mlp_neuron": 4}),
    ("lookup", None, {"head": 1, "attn_neuron": 2, "mlp_neuron": 4, "mlp_out": 4}),
    ("induction", ("head",), {"head": 2}), ("induction", None, {"head": 2}), ("induction", None, {"head": 2, "attn_neuron": 6}),
    ("conjunction", None, {"head": 2}), ("conjunction", None, {"head": 2, "mlp_neuron": 1}), ("conjunction", None, {"mlp": 1}),
    ("redundant", ("head",), {"head": 1}), ("blocks", ("attn", "mlp"), {"attn": 1, "mlp": 1}), ("blocks", None, {"attn": 1, "mlp": 1}),
    ("blocks", None, {"layer": 2}),
]
SEEDED = [pytest.param(*case, seed, marks=[pytest.mark.slow] * (seed > 0)) for case in CASES for seed in range(3)]


@pytest.mark.parametrize(("name", "granularities", "most", "seed"), SEEDED)
def test_the_nodes_that_do_the_task_are_kept(name: str, granularities: tuple[str, ...] | None, most: dict[str, int], seed: int) -> None:
    """The limits are as many as are planted, so the live ones are exactly those."""
    wired = plant(name, seed)
    masks = wired.model.add_node_masks(granularities)
    try:
        result = masks.prune(wired.prompts(24, seed), max_nodes=most, steps=40, seed=seed, progress=False)
    finally:
        wired.model.remove_node_masks()
    truths = [{node for node in answer if node[0] in most} for answer in wired.answers(wired.space(planted_at(name, granularities)))]
    assert {node for node in nodes_of(result.circuit) if node[0] in most} in truths
    assert result.kl < 0.05


def planted_at(name: str, granularities: tuple[str, ...] | None) -> tuple[str, ...]:
    """Of the granularities gated, those at which the truth is known."""
    return tuple(g for g in planted.PLANTS[name](0).defined if granularities is None or g in granularities)
