"""A model under masks by hook name: all open is the model, and masks are those of a circuit with the same hooks by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from circuits import circuit_logits, full_logits, random_circuit

import tl_nodeprune as tlnp
from tl_nodeprune.masks.masked_model import MaskedModel
from tl_nodeprune.nodes.probe import find_nodes

Toy = tuple[Any, tlnp.PromptPairs]


def masked(toy: Toy, ablation: str, batch_size: int = 24) -> tuple[MaskedModel, tlnp.Circuit]:
    space = find_nodes(toy[0])
    fitted = tlnp.Ablation(ablation).fit(toy[0], toy[1], space.hooks)
    return MaskedModel(*toy, fitted, space.hooks, batch_size=batch_size), random_circuit(space, 0).under(fitted)


def test_all_open_is_the_model_bit_for_bit(toy: Toy) -> None:
    runs, circuit = masked(toy, "interchange")
    ones = {hook: torch.ones_like(mask) for hook, mask in circuit.items()}
    assert torch.equal(runs.all_logits(ones), full_logits(*toy)) and torch.equal(runs.all_logits(), full_logits(*toy))


@pytest.mark.parametrize("ablation", ["interchange", "mean", "zero", "optimal"])
def test_masks_of_a_circuit_give_its_logits(toy: Toy, ablation: str) -> None:
    runs, circuit = masked(toy, ablation)
    assert torch.equal(runs.all_logits(circuit), circuit_logits(toy[0], circuit, toy[1]))
    few, _ = masked(toy, ablation, batch_size=7)
    torch.testing.assert_close(few.all_logits(circuit), runs.all_logits(circuit), rtol=1e-4, atol=1e-4)


def test_a_mask_of_its_own_to_each_prompt(toy: Toy) -> None:
    runs, circuit = masked(toy, "zero")
    n = len(toy[1])
    own = {hook: torch.ones(n, 1, *(mask.shape or (1,))) for hook, mask in circuit.items()}
    for hook, mask in circuit.items():
        own[hook][: n // 2] = mask
    found = runs.all_logits(own)
    torch.testing.assert_close(found[: n // 2], runs.all_logits(circuit)[: n // 2], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[n // 2:], full_logits(*toy)[n // 2:], rtol=1e-4, atol=1e-4)
