"""Random circuits, and logits at the answer positions by plain hooks, for the tests of several packages to compare with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import tl_nodeprune as tlnp
from tl_nodeprune.nodes.space import NodeSpace


def random_circuit(space: NodeSpace, seed: int, share: float = 0.6) -> tlnp.Circuit:
    """Every gate open with this chance."""
    generator = torch.Generator().manual_seed(seed)
    return tlnp.Circuit(space, {key: torch.rand(shape, generator=generator) < share for key, shape in space.shapes.items()})


def full_logits(model: Any, prompts: tlnp.PromptPairs) -> Tensor:
    """The model's, as it is: [batch d_vocab], float32."""
    with torch.no_grad():
        return model(prompts.clean)[torch.arange(len(prompts)), prompts.answer_positions].float()


def circuit_logits(model: Any, circuit: tlnp.Circuit, prompts: tlnp.PromptPairs) -> Tensor:
    """The circuit's: [batch d_vocab], float32."""
    with torch.no_grad():
        logits = model.run_with_hooks(prompts.clean, fwd_hooks=circuit.fwd_hooks(model, prompts))
    return logits[torch.arange(len(prompts)), prompts.answer_positions].float()
