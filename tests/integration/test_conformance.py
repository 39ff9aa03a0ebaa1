"""Every decoder family either does what plain hooks on an untouched Hugging Face copy do, or is refused in words."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from conformance import TOLERANCE, conform, row
from families import bridge_of, families, hf_family
from integration_support import random_pairs, run
from oracle import Oracle

import tl_nodeprune as tlnp
from tl_nodeprune.nodes.space import GateKey

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "architectures.md"
KINDS = {
    "gpt2": "dense, fused", "llama": "grouped-query, gated", "gemma2": "norms on the branches", "olmo2": "norms only there",
    "gptj": "parallel", "falcon": "multi-query", "bloom": "modules that add the stream themselves", "opt": "an MLP that is no module",
    "phi3": "fused gate and up", "granitemoe": "a factor and a mixture of experts", "deepseek_v2": "latent attention", "lfm2": "hybrid",
    "mamba": "no attention", "bert": "post-norm",
}
"""The families that stand for the rest in a fast run."""


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=() if kind in KINDS else pytest.mark.slow) for kind in families()])
def test_a_family_agrees_with_plain_hooks_or_is_refused_in_words(kind: str, tmp_path: Path) -> None:
    found = conform(kind)
    if found.space is not None:
        assert found.agrees, (found.worst, found.where, found.parameters)
        assert found.moved > 10 * TOLERANCE, "closing a node must do something for this test to mean anything"
        saved = tlnp.Circuit.full(found.space)
        saved.save(tmp_path / "circuit.safetensors")
        assert (loaded := tlnp.Circuit.load(tmp_path / "circuit.safetensors")) == saved and loaded.parameters == saved.parameters
    else:
        assert found.by == "TransformerLens" or "hook_resid" in found.refused or "resid_post" in found.refused, found.refused
    if not hooked_transformer():
        assert row(found) in PAGE.read_text(encoding="utf-8").splitlines(), "the page is old; conformance.py says how to make it"


def hooked_transformer() -> bool:
    """Whether this is TransformerLens 3, of which the page does not speak."""
    try:
        from transformer_lens import HookedTransformer  # noqa: F401
    except ImportError:
        return False
    return True


def test_the_oracle_tells_one_node_from_another() -> None:
    hf, prompts = hf_family("llama"), random_pairs()
    oracle = Oracle(copy.deepcopy(hf))
    masks = tlnp.add_node_masks(bridge_of(hf), ["head"], ablation="zero")
    with torch.no_grad():
        masks.score(GateKey("head", 1))[2] = masks.gate.closed_score
    got = run(masks.model, prompts.clean)
    closed = [(("head", layer), oracle.scaled("head", layer, (head,), 0.0, None)) for layer in range(3) for head in range(4)]
    wants = [oracle.run(prompts.clean, {where: change}) for where, change in closed]
    agree = [bool((got - want).abs().max() <= TOLERANCE * want.abs().max()) for want in wants]
    assert agree == [i == 4 + 2 for i in range(12)]
