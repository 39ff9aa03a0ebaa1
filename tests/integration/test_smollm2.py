"""A real model of 80,640 leaf nodes, made by `make smollm2`. It is no part of the project."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from integration_support import run
from transformer_lens.model_bridge import TransformerBridge

import tl_nodeprune as tlnp

ROOT = Path(__file__).resolve().parents[2]


def folder() -> Path:
    """Under TL_NODEPRUNE_MODELS, or where `make smollm2` puts it."""
    places = [Path(given) / "smollm2" for given in [os.environ.get("TL_NODEPRUNE_MODELS")] if given] + [ROOT / "out" / "models" / "smollm2"]
    found = [place for place in places if (place / "model.safetensors").is_file()]
    if not found:
        pytest.skip(f"there is no SmolLM2 in {' or '.join(map(str, places))}; `make smollm2` makes it")
    return found[0]


@pytest.mark.slow
def test_a_search_in_a_minute_gives_a_frontier_and_leaves_the_model_as_it_was() -> None:
    model = TransformerBridge.boot_transformers(str(folder()), device="cpu").eval()
    prompts = tlnp.tasks.ioi(model, n=14, seed=0).correct(model)
    plain, masks = run(model, prompts.clean[:2]), model.add_node_masks()
    with pytest.warns(UserWarning, match="untested|no circuit"):
        result = masks.prune(prompts, max_kl=1.0, steps=3, time_limit=60, progress=False)
    model.remove_node_masks()
    assert torch.equal(run(model, prompts.clean[:2]), plain)
    assert result.circuit.size_total == 80_640 and 0 < result.circuit.size <= 80_640
    assert bool((result.frontier["kl"].diff()[1:] < 0).all()) and result.converged is not True
    assert tlnp.evaluate(model, result.circuit, result.held_out).kl == pytest.approx(result.kl, rel=1e-3)
