"""Circuits of the literature on models of their shape, and overlap against brute force."""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import pytest
import torch
import transformers
from transformer_lens.model_bridge import TransformerBridge

import tl_nodeprune as tlnp
from tl_nodeprune.nodes.probe import find_nodes

Toy = tuple[Any, tlnp.PromptPairs]
KNOWN = (tlnp.known.ioi_gpt2, tlnp.known.greater_than_gpt2, tlnp.known.docstring_attn_only_4l, tlnp.known.induction_gpt2)


def shaped(n_layers: int, n_heads: int) -> Any:
    """A random GPT-2 with heads of 2 dims."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=n_layers, n_head=n_heads, n_embd=2 * n_heads, n_positions=32, vocab_size=199)
    return TransformerBridge.boot_transformers("gpt2", hf_model=transformers.GPT2LMHeadModel(config).eval(), device="cpu",
                                               tokenizer=transformers.PreTrainedTokenizerFast.from_pretrained(tlnp.toy.FOLDER)).eval()


@pytest.fixture(scope="module")
def small_gpt2() -> Any:
    return shaped(12, 12)


def test_known_circuits_are_circuits_of_models_of_their_shape(small_gpt2: Any) -> None:
    assert len(tlnp.known.ioi_gpt2().heads) == 26 and len(tlnp.known.greater_than_gpt2().heads) == 11
    assert all(one().source and len(one().heads) == sum(map(len, one().roles.values())) for one in KNOWN), "no head has two roles"
    for one in (known() for known in KNOWN):
        model = small_gpt2 if one.n_layers == 12 else shaped(4, 8)
        circuit = one.circuit(model, "zero")
        assert tuple(circuit.nodes("head")) == one.heads and circuit.ablation.name == "zero"
        assert ("mlp" in circuit.space.granularities) == bool(one.mlps)
        if one.mlps:
            assert [layer for (layer,) in circuit.nodes("mlp")] == list(one.mlps)
        found = tlnp.known.overlap(circuit, one)
        assert (found["recall"] == 1).all() and found.loc["all heads", "precision"] == 1
        assert str(one.roles) and "\n  " in repr(one)


def test_a_known_circuit_runs(small_gpt2: Any) -> None:
    prompts = tlnp.tasks.ioi(small_gpt2, n=4, seed=0)
    assert tlnp.evaluate(small_gpt2, tlnp.known.ioi_gpt2().circuit(small_gpt2), prompts).n_prompts == 4


def test_models_of_other_shapes(toy: Toy) -> None:
    known, circuit = tlnp.known.ioi_gpt2(), tlnp.Circuit.full(find_nodes(toy[0]))
    with pytest.raises(ValueError, match="12 layers of 12 heads; this model has 3 layers of 4 heads"):
        known.circuit(toy[0])
    with pytest.raises(ValueError, match="12 layers of 12 heads; the circuit's model has 3 layers of 4 heads"):
        tlnp.known.overlap(circuit, known)
    with pytest.raises(ValueError, match="circuit gates mlp: no heads"):
        tlnp.known.overlap(tlnp.Circuit.from_nodes(toy[0], {"mlp": [(0,)]}), planted())
    outside = [((0, 4),), ((3, 0),), ((0,),), ((-1, 0),), ()]
    for heads, error in (*((heads, ValueError) for heads in outside), (((0, 0.5),), TypeError), (("09",), TypeError)):
        with pytest.raises(error, match="roles"):
            tlnp.known.KnownCircuit("x", "y", {"r": heads}, n_layers=3, n_heads=4)
    with pytest.raises(ValueError, match="mlps holds 3; give layers of 0 to 2"):
        tlnp.known.KnownCircuit("x", "y", {"r": ((0, 1),)}, mlps=(3,), n_layers=3, n_heads=4)


def planted() -> Any:
    return tlnp.known.KnownCircuit("planted", "here", {"a": ((0, 1), (1, 1)), "b": ((2, 0), (2, 1), (2, 2))}, n_layers=3, n_heads=4)


def test_overlap_against_every_set_of_heads_of_that_size(toy: Toy) -> None:
    """The p-value is the share of the 495 sets of 4 heads of 12 that hold as many of the known."""
    known, everyone = planted(), [(layer, head) for layer in range(3) for head in range(4)]
    kept = [(0, 1), (1, 1), (2, 2), (1, 3)]
    table = tlnp.known.overlap(tlnp.Circuit.from_nodes(toy[0], {"head": kept}), known)
    assert table.attrs == {"kept": 4, "heads": 12} and list(table.index) == ["a", "b", "all heads"]
    for role, heads in {**known.roles, "all heads": known.heads}.items():
        hits = [len(set(heads) & set(chosen)) for chosen in combinations(everyone, 4)]
        found = len(set(heads) & set(kept))
        row = table.loc[role]
        assert row["found"] == found and row["recall"] == found / len(heads) and row["precision"] == found / 4
        assert math.isclose(row["p_value"], sum(hit >= found for hit in hits) / len(hits), rel_tol=1e-9)
        assert math.isclose(row["expected"], sum(hits) / len(hits), rel_tol=1e-9)


def test_overlap_of_fine_circuits_of_few_layers_and_of_none(toy: Toy) -> None:
    space = find_nodes(toy[0]).restrict(("attn_neuron", "mlp"), layers=[0, 1])
    gates = {key: torch.zeros(shape) for key, shape in space.shapes.items()}
    nothing = tlnp.known.overlap(tlnp.Circuit(space, gates), planted())
    assert nothing.attrs == {"kept": 0, "heads": 8} and math.isnan(nothing.loc["a", "precision"]) and nothing.loc["a", "p_value"] == 1
    gates[next(key for key in gates if key == ("attn_neuron", 1))][1, 5] = 1
    one = tlnp.known.overlap(tlnp.Circuit(space, gates), planted())
    assert one.loc["a", "found"] == 1 and one.loc["b", "known"] == 0 and one.loc["all heads", "known"] == 2
    assert math.isclose(one.loc["a", "p_value"], 2 / 8)


def test_random_circuits_are_rarely_far_from_chance(small_gpt2: Any) -> None:
    """The negative control: p below .05 for at most 5 % of random lists of heads."""
    space, generator, found = find_nodes(small_gpt2).restrict("head"), torch.Generator().manual_seed(0), []
    for _ in range(100):
        kept = (torch.randperm(144, generator=generator) < 20).view(12, 12)
        circuit = tlnp.Circuit(space, {key: kept[key.layer] for key in space.shapes})
        found.append(tlnp.known.overlap(circuit, tlnp.known.ioi_gpt2()).loc["all heads", "p_value"])
    assert sum(p < 0.05 for p in found) <= 9
