"""Effects of single nodes in circuits wired by hand: which have one, what attribution gets exactly, and what a redundant pair hides."""

from __future__ import annotations

from functools import cache

import planted
import pytest
import torch
from planted import Plant, circuit_of, leaves_of

from tl_nodeprune.circuit.effects import Effects
from tl_nodeprune.evidence.agreement import agreement
from tl_nodeprune.evidence.crosscheck import activation_patching, attribution_patching
from tl_nodeprune.masks.losses import kl_divergence


@cache
def plant(name: str) -> Plant:
    return planted.PLANTS[name](0)


@cache
def exact(name: str, direction: str) -> Effects:
    return activation_patching(plant(name).model, plant(name).prompts(16, 0), None, direction=direction, progress=False)


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("name", ["lookup", "redundant"])
def test_attribution_is_exact_where_the_model_is_linear_in_the_node(name: str, direction: str) -> None:
    """There is no normalisation, so the logits are linear in what the last layer adds, and in all it is made of."""
    wired = plant(name)
    fast, last = attribution_patching(wired.model, wired.prompts(16, 0), direction=direction), wired.space().n_layers - 1
    for granularity in ("attn_neuron", "head", "mlp", "mlp_out", "mlp_neuron", "layer"):
        want = exact(name, direction).of(granularity)[last]
        linear = torch.allclose(fast.of(granularity)[last], want, atol=2e-5, rtol=1e-4)
        assert linear == (granularity in ("mlp", "mlp_out", "mlp_neuron", "layer"))  # attention is read by the MLP above it, a relu
        assert want.abs().max() > 1e-3


@pytest.mark.parametrize("name", ["lookup", "induction", "conjunction"])
def test_noise_finds_every_planted_head_and_nothing_else(name: str) -> None:
    """Each head is needed, so corrupting it alone undoes the task: scores and truth agree in full."""
    wired = plant(name)
    space = wired.space(["head"])
    (answer,) = wired.answers(space)
    row = agreement(circuit_of(space, answer.intersection(leaves_of(space))), exact(name, "noise"), share=0.2).of("head")
    assert (row.auroc, row.precision_at_k) == (1, 1) and not row.kept_without_effect and not row.cut_with_effect


def test_nodes_of_a_conjunction_have_no_effect_alone_when_denoised() -> None:
    """A neuron that is the AND of two heads: the clean activation of one head alone does not turn it on."""
    wired = plant("conjunction")
    space = wired.space(["head"])
    (answer,) = wired.answers(space)
    truth = answer.intersection(leaves_of(space))
    effects = exact("conjunction", "denoise")
    assert all(abs(float(effects.normalised().of("head")[node[1]][node[2]])) < 0.05 for node in truth)


def test_a_redundant_pair_is_kept_without_an_effect_of_its_own() -> None:
    """Either head suffices, in KL: corrupt one and the other stands in; in the corrupted run either one brings the answer back."""
    wired = plant("redundant")
    pair = {(node[1], node[2]) for truth in wired.truths for node in truth}
    circuit = circuit_of(wired.space(["head"]), [("head", *node) for node in pair])
    noise, denoise = (activation_patching(wired.model, wired.prompts(16, 0), ["head"], direction=direction, metric=kl_divergence,
                                          progress=False) for direction in ("noise", "denoise"))
    assert all(float(denoise.normalised().of("head")[layer][head]) > 0.99 for layer, head in pair)
    assert all(abs(float(noise.normalised().of("head")[layer][head])) < 1e-3 for layer, head in pair)
    assert {(node.layer, *node.index) for node in agreement(circuit, noise).of("head").kept_without_effect} == pair
    for effects in (denoise, denoise.normalised()):
        row = agreement(circuit, effects).of("head")
        assert not row.kept_without_effect and not row.cut_with_effect and row.auroc == 1
    lone = agreement(circuit_of(wired.space(["head"]), [("head", *min(pair))]), denoise).of("head")
    assert [(node.layer, *node.index) for node in lone.cut_with_effect] == [max(pair)]
