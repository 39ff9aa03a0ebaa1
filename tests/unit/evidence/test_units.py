"""Units of a circuit: which there are, taking them out and putting them in, and random circuits of equal size."""

from __future__ import annotations

from itertools import permutations, product
from typing import Any

import pytest
import torch

import tl_nodeprune as tlnp
from tl_nodeprune.evidence.units import SizeMatched, Unit, closed, opened, units_of
from tl_nodeprune.nodes.probe import find_nodes
from tl_nodeprune.nodes.space import GateKey, NodeSpace

Toy = tuple[Any, tlnp.PromptPairs]
SUBSETS = [None, ("head", "mlp"), ("attn", "mlp"), ("layer",), ("attn_neuron", "mlp_out"), ("layer", "head"), ("mlp_neuron",)]


def random_circuit(space: NodeSpace, seed: int, share: float = 0.6) -> tlnp.Circuit:
    generator = torch.Generator().manual_seed(seed)
    return tlnp.Circuit(space, {key: torch.rand(shape, generator=generator) < share for key, shape in space.shapes.items()})


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


def spread_over(circuit: tlnp.Circuit, granularity: str) -> list[int]:
    return [int(circuit.live(granularity, layer).sum()) for layer in circuit.space.layers]


def test_random_circuits_have_as_many_nodes_of_each_kind(toy: Toy) -> None:
    circuit = random_circuit(find_nodes(toy[0]), 0, 0.5)
    null, generator = SizeMatched(circuit), torch.Generator().manual_seed(0)
    drawn = [null.draw(generator) for _ in range(5)]
    assert not null.over_layers and null.possible > 1e6 and len({str(one.masks) for one in drawn}) == 5
    for one in drawn:
        assert one.size == circuit.size and one.count()["head"] == circuit.count()["head"]
        for granularity in ("attn_neuron", "mlp_neuron", "mlp_out", "head"):
            assert spread_over(one, granularity) == spread_over(circuit, granularity)
        for layer in range(3):
            rows, own = (c.live("attn_neuron", layer).sum(1).sort().values for c in (one, circuit))
            assert torch.equal(rows, own), "dims stay together in heads"


def test_few_circuits_are_counted_and_then_drawn_over_all_layers(toy: Toy) -> None:
    space = find_nodes(toy[0]).restrict(("head", "mlp"))
    gates = {key: torch.zeros(shape) for key, shape in space.shapes.items()}
    gates[GateKey("head", 0)][1] = gates[GateKey("mlp", 2)][()] = 1
    null, generator = SizeMatched(tlnp.Circuit(space, gates)), torch.Generator().manual_seed(0)
    assert null.over_layers and null.possible == 12 * 3  # within their layers it would be 4 * 3
    drawn = {tuple(map(tuple, (*one.nodes("head"), *one.nodes("mlp")))) for one in (null.draw(generator) for _ in range(600))}
    assert len(drawn) == 36
    assert SizeMatched(tlnp.Circuit.full(space)).possible == SizeMatched(tlnp.Circuit.empty(space)).possible == 1


def test_under_a_layer_gate_random_circuits_have_the_size_too(toy: Toy) -> None:
    """Above heads but not MLPs a layer's gate decides by itself."""
    space = find_nodes(toy[0]).restrict(("layer", "head"))
    gates = {key: torch.ones(shape) for key, shape in space.shapes.items()}
    gates[GateKey("layer", 1)][()] = 0
    gates[GateKey("head", 0)][1:] = gates[GateKey("head", 2)][2:] = 0
    circuit = tlnp.Circuit(space, gates)
    null, generator = SizeMatched(circuit), torch.Generator().manual_seed(0)
    assert null.over_layers and null.possible == 56  # 3 of 8
    drawn = [null.draw(generator) for _ in range(200)]
    assert {one.size for one in drawn} == {5} and all(one.count() == circuit.count() for one in drawn)
    assert len({str(one.nodes("head")) for one in drawn}) > 40


def test_arrangements_by_brute_force(toy: Toy) -> None:
    from tl_nodeprune.evidence.units import _log_arrangements

    for counts in ([0, 1, 2], [1, 1, 2], [3, 0, 0]):
        rows = torch.tensor([[1] * c + [0] * (3 - c) for c in counts])
        within = [set(permutations(row)) for row in rows.tolist()]
        different = {choice for order in permutations(range(3)) for choice in product(*(within[i] for i in order))}
        assert round(torch.tensor(_log_arrangements(rows)).exp().item()) == len(different)
