"""Effects as a mapping, by granularity, normalised, and as a table."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tl_nodeprune as tlnp
from tl_nodeprune.circuit.effects import Effects
from tl_nodeprune.evidence.crosscheck import attribution_patching
from tl_nodeprune.nodes.space import GateKey, NodeSpace

Toy = tuple[Any, tlnp.PromptPairs]


def some_effects() -> Effects:
    """One layer with two heads of three dims each and an MLP of four output dims; the metric is 5 clean and 1 corrupted."""
    shapes = {GateKey("mlp", 0): (), GateKey("head", 0): (2,), GateKey("mlp_out", 0): (4,)}
    space = NodeSpace(shapes, shapes | {GateKey("attn_neuron", 0): (2, 3)}, d_model=4, n_layers=1, kv_heads=1, gated_mlp=False)
    gates = {GateKey("mlp", 0): torch.tensor(2.0), GateKey("head", 0): torch.tensor([-4.0, 1.0]),
             GateKey("mlp_out", 0): torch.tensor([0.0, 0.5, -0.25, 3.0])}
    return Effects(gates, space, "denoise", "activation patching", 5.0, 1.0, 7)


def test_a_hook_point_holds_the_finest_granularity_at_its_own_shape() -> None:
    effects = some_effects()
    assert list(effects) == ["blocks.0.attn.hook_z", "blocks.0.hook_mlp_out"] and len(effects) == 2
    assert effects["blocks.0.attn.hook_z"].tolist() == [[-4.0] * 3, [1.0] * 3]
    assert effects["blocks.0.hook_mlp_out"].tolist() == [0.0, 0.5, -0.25, 3.0]
    assert effects.of("mlp")[0] == 2 and effects.of("head")[0].tolist() == [-4.0, 1.0]


def test_normalised_by_hand() -> None:
    shares = some_effects().normalised()
    assert shares.of("head")[0].tolist() == [-1.0, 0.25] and shares.of("mlp")[0] == 0.5
    assert (shares.clean, shares.corrupted, shares.n_prompts) == (1, 0, 7) and shares.normalised() == shares != some_effects()


def test_the_table_is_by_size() -> None:
    frame = some_effects().to_frame()
    assert frame["effect"].tolist() == [-4.0, 3.0, 2.0, 1.0, 0.5, -0.25, 0.0]
    assert frame.iloc[0].tolist() == ["head", 0, (0,), -4.0] and frame.iloc[2].tolist() == ["mlp", 0, (), 2.0]


def test_effects_are_frozen_and_say_what_they_are(toy: Toy) -> None:
    effects = attribution_patching(toy[0], toy[1][:4], ["head", "mlp"])
    effects["blocks.1.attn.hook_z"].zero_()
    effects.of("head")[1].zero_()
    assert effects["blocks.1.attn.hook_z"].abs().max() > 0.1 and effects == effects and len(effects) == 6
    with pytest.raises(AttributeError):
        effects.direction = "noise"  # type: ignore[misc]
    assert repr(effects).startswith("Effects(3 mlp, 12 head; attribution patching, denoise; metric ") and "4 prompts" in repr(effects)
    with pytest.raises(KeyError, match="'blocks.0.hook_attn_out' was not patched; patched were blocks.0.attn.hook_z, "):
        effects["blocks.0.hook_attn_out"]
    with pytest.raises(KeyError, match="'attn' was not patched; patched were mlp, head"):
        effects.of("attn")
