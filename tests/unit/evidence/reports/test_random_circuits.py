"""Random circuits of equal size: as many nodes of each kind, each as likely as the next, counted right."""

from __future__ import annotations

from itertools import permutations, product
from typing import Any

import torch
from circuits import random_circuit

import tl_nodeprune as tlnp
from tl_nodeprune.evidence.reports.random_circuits import SizeMatched, _log_arrangements
from tl_nodeprune.nodes.probe import find_nodes
from tl_nodeprune.nodes.space import GateKey

Toy = tuple[Any, tlnp.PromptPairs]


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
    for counts in ([0, 1, 2], [1, 1, 2], [3, 0, 0]):
        rows = torch.tensor([[1] * c + [0] * (3 - c) for c in counts])
        within = [set(permutations(row)) for row in rows.tolist()]
        different = {choice for order in permutations(range(3)) for choice in product(*(within[i] for i in order))}
        assert round(torch.tensor(_log_arrangements(rows)).exp().item()) == len(different)
