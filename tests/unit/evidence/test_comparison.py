"""Circuits side by side, against brute force over all sets of their sizes."""

from __future__ import annotations

import math
import random
from itertools import combinations, product
from typing import Any

import pytest
import torch

import tl_nodeprune as tlnp
from tl_nodeprune.nodes.probe import find_nodes

Toy = tuple[Any, tlnp.PromptPairs]
HEADS = [(layer, head) for layer in range(3) for head in range(4)]
MLPS = [(layer,) for layer in range(3)]


def random_sets(n: int, seed: int) -> list[tuple[int, int]]:
    return random.Random(seed).sample(HEADS, n)


@pytest.mark.parametrize(("n_a", "n_b"), [(2, 3), (4, 3), (0, 2), (12, 3), (0, 0)])
def test_chance_against_every_pair_of_sets(toy: Toy, n_a: int, n_b: int) -> None:
    a, b = random_sets(n_a, 1), random_sets(n_b, 2)
    row = tlnp.compare({name: tlnp.Circuit.from_nodes(toy[0], {"head": nodes}) for name, nodes in (("a", a), ("b", b))}).pairs.iloc[0]
    shared = [len(set(a) & set(other)) for other in combinations(HEADS, n_b)]  # by symmetry one of the two may stand still
    ious = [k / (n_a + n_b - k) if n_a + n_b > k else 1 for k in shared]
    now = len(set(a) & set(b))
    assert (row["kept_a"], row["kept_b"], row["shared"]) == (n_a, n_b, now)
    assert math.isclose(row["expected_iou"], sum(ious) / len(ious), abs_tol=1e-12)
    assert math.isclose(row["p_value"], sum(k >= now for k in shared) / len(shared), abs_tol=1e-12)
    assert math.isclose(row["iou"], now / (n_a + n_b - now) if n_a + n_b else 1)


def test_chance_of_two_granularities_is_of_both_together(toy: Toy) -> None:
    one = tlnp.Circuit.from_nodes(toy[0], {"head": HEADS[:3], "mlp": [(0,), (2,)]})
    two = tlnp.Circuit.from_nodes(toy[0], {"head": HEADS[2:4], "mlp": [(2,)]})
    row = tlnp.compare({"one": one, "two": two}, ("head", "mlp")).pairs.iloc[0]
    shared = [len(set(HEADS[:3]) & set(heads)) + len({(0,), (2,)} & set(mlps))
              for heads, mlps in product(combinations(HEADS, 2), combinations(MLPS, 1))]
    assert row["shared"] == 2 and math.isclose(row["p_value"], sum(k >= 2 for k in shared) / len(shared))
    assert math.isclose(row["expected_iou"], sum(k / (8 - k) for k in shared) / len(shared))


def test_nodes_are_those_of_the_circuits(toy: Toy) -> None:
    circuits = {f"c{i}": tlnp.Circuit.from_nodes(toy[0], {"head": random_sets(4, i)}) for i in range(3)}
    found = tlnp.compare(circuits)
    for name, circuit in circuits.items():
        assert sorted((row["layer"], *row["index"]) for _, row in found.nodes[found.nodes[name]].iterrows()) == circuit.nodes("head")
    assert len(found.pairs) == 3 and found.nodes["kept_by"].is_monotonic_decreasing and (found.nodes["kept_by"] > 0).all()
    for _, row in found.pairs.iterrows():
        assert math.isclose(row["iou"], circuits[row["a"]].iou(circuits[row["b"]]))
    assert not len(found.judged) and "only in c0" in repr(found)


def test_circuits_of_other_granularities_and_what_cannot_be_compared(toy: Toy, other_model: Any) -> None:
    model, space = toy[0], find_nodes(toy[0])
    generator = torch.Generator().manual_seed(0)
    fine = tlnp.Circuit(space, {key: torch.rand(shape, generator=generator) < 0.02 if key.granularity == "attn_neuron"
                                else torch.ones(shape) for key, shape in space.shapes.items()})
    heads = tlnp.Circuit.from_nodes(model, {"head": HEADS[:5]})
    row = tlnp.compare({"fine": fine, "heads": heads}).pairs.iloc[0]
    assert row["kept_a"] == fine.count()["head"] and math.isclose(row["iou"], fine.at("head").iou(heads))
    for level, text in (("mlp", r"level='mlp': circuits\['heads'\] is over head"), ("attn_neuron", "level='attn_neuron'"),
                        ("heads", "unknown granularity 'heads'"), ((), "granularities is empty")):
        with pytest.raises(ValueError, match=text):
            tlnp.compare({"fine": fine, "heads": heads}, level)
    with pytest.raises(ValueError, match="models of other shapes"):
        tlnp.compare({"a": heads, "b": tlnp.Circuit.full(find_nodes(other_model))})
    with pytest.raises(ValueError, match="circuits holds 1; give two or more"):
        tlnp.compare({"a": heads})
    with pytest.raises(ValueError, match="one named 'layer'"):
        tlnp.compare({"a": heads, "layer": heads})
    with pytest.raises(TypeError, match=r"circuits\['b'\] is dict"):
        tlnp.compare({"a": heads, "b": {}})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="model is given without prompts"):
        tlnp.compare({"a": heads, "b": heads}, model=model)
    with pytest.raises(ValueError, match="prompts is given without model"):
        tlnp.compare({"a": heads, "b": heads}, prompts={"a": toy[1]})


def test_circuits_on_each_other_s_prompts(toy: Toy, no_hooks_left: Any) -> None:
    model, prompts = toy
    others = tlnp.toy.load("gendered_pronoun", n=8)[1]
    circuits = {"all": tlnp.Circuit.full(find_nodes(model).restrict("head")), "few": tlnp.Circuit.from_nodes(model, {"head": HEADS[:2]})}
    found = tlnp.compare(circuits, model=model, prompts={"ioi": prompts, "pronoun": others}).judged
    assert list(zip(found["circuit"], found["prompts"], strict=True)) == list(product(circuits, ("ioi", "pronoun")))
    for _, row in found.iterrows():
        one = tlnp.evaluate(model, circuits[row["circuit"]], prompts if row["prompts"] == "ioi" else others)
        assert (row["kl"], row["accuracy"], row["full_accuracy"]) == (one.kl, one.accuracy, one.full.accuracy)
    assert (found["kl"][found["circuit"] == "all"] < 1e-6).all() and (found["kl"][found["circuit"] == "few"] > 1e-3).all()
    no_hooks_left(model)


def test_hundreds_of_thousands_of_nodes_are_no_trouble() -> None:
    """As many as the neurons of an 8B model: time and memory go with what chance may share, not with its square."""
    from tl_nodeprune.evidence.comparison import _shared_by_chance

    chances = _shared_by_chance([(459_776, 40_000, 60_000), (1_024, 100, 90)])
    mean = 40_000 * 60_000 / 459_776 + 100 * 90 / 1_024
    assert math.isclose(chances.sum(), 1, rel_tol=1e-9) and math.isclose(float(chances @ range(len(chances))), mean, rel_tol=1e-6)
