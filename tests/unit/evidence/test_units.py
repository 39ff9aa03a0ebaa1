"""Units of a circuit: which there are, taking them out and putting them in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from circuits import random_circuit

import tl_nodeprune as tlnp
from tl_nodeprune.evidence.units import Unit, closed, opened, units_of
from tl_nodeprune.nodes.probe import find_nodes

Toy = tuple[Any, tlnp.PromptPairs]
SUBSETS = [None, ("head", "mlp"), ("attn", "mlp"), ("layer",), ("attn_neuron", "mlp_out"), ("layer", "head"), ("mlp_neuron",)]


def names(units: list[Unit]) -> list[str]:
    return [str(unit) for unit in units]


def test_which_units_there_are(toy: Toy) -> None:
    space = find_nodes(toy[0])
    blocks = [f"head {layer}.{i}" for layer in range(3) for i in range(4)]
    assert sorted(names(units_of(space))) == sorted([*blocks, "MLP 0", "MLP 1", "MLP 2"])
    assert names(units_of(space.restrict(("attn", "mlp"), [1]))) == ["attention 1", "MLP 1"]
    assert names(units_of(space.restrict(("layer",)))) == ["layer 0", "layer 1", "layer 2"]
    assert sorted(names(units_of(space.restrict(("layer", "head"), [2])))) == [*(f"head 2.{i}" for i in range(4)), "layer 2"]
    fine = units_of(space.restrict(("head", "attn_neuron", "mlp_out"), [0]), "node")
    assert len(fine) == 96 + 96 and {"head dim 0.3.23", "MLP output dim 0.95"} <= set(names(fine))
    with pytest.raises(ValueError, match="units='head'; allowed: 'block', 'node'"):
        units_of(space, "head")


@pytest.mark.parametrize("granularities", SUBSETS)
def test_units_cover_every_leaf_once(toy: Toy, granularities: Any) -> None:
    space = find_nodes(toy[0]).restrict(granularities)
    for kind in ("block", "node"):
        units = [unit for unit in units_of(space, kind) if unit.granularity != "layer" or granularities == ("layer",)]
        total = {key: sum(unit.members(space).get(key, torch.zeros(space.shapes[key])).long() for unit in units) for key in space.finest()}
        assert all(bool((count == 1).all()) for count in total.values())


@pytest.mark.parametrize("granularities", SUBSETS)
def test_taking_out_and_putting_in(toy: Toy, granularities: Any) -> None:
    space = find_nodes(toy[0]).restrict(granularities)
    circuit, full, empty = random_circuit(space, 3), tlnp.Circuit.full(space), tlnp.Circuit.empty(space)
    units = units_of(space)
    assert closed(full, units) == empty and opened(empty, units) == full and closed(circuit, []) == circuit == opened(circuit, [])
    for unit in units:
        without, having = closed(circuit, [unit]), opened(circuit, [unit])
        assert not unit.kept(without) and unit.whole(having)
        assert closed(circuit, [unit]) == closed(having, [unit]) or not unit.kept(circuit)
        assert without.size <= circuit.size <= having.size and closed(full, units, only=circuit).size <= full.size
    if "layer" not in (granularities or ()) or granularities == ("layer",):
        assert closed(full, units, only=circuit) == ~circuit


def test_an_mlp_node_alone_is_opened_with_its_other_side(toy: Toy) -> None:
    space = find_nodes(toy[0])
    neuron = opened(tlnp.Circuit.empty(space), [Unit("mlp_neuron", 1, (7,))])
    assert neuron.nodes("mlp_neuron") == [(1, 7)] and len(neuron.nodes("mlp_out")) == 96
    both = opened(neuron, [Unit("mlp_neuron", 1, (9,))])
    assert both.nodes("mlp_neuron") == [(1, 7), (1, 9)]
