"""Many circuits at once are the same as one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from circuits import circuit_logits

import tl_nodeprune as tlnp
from tl_nodeprune.evidence.runs import CircuitRuns
from tl_nodeprune.nodes.probe import find_nodes

Toy = tuple[Any, tlnp.PromptPairs]


@pytest.mark.parametrize("ablation", ["interchange", "zero", "mean", "optimal"])
@pytest.mark.parametrize("batch_size", [5, 64])
def test_as_evaluate_has_them(each_toy: Toy, ablation: str, batch_size: int) -> None:
    model, prompts = each_toy
    space = find_nodes(model)
    fitted = tlnp.Ablation(ablation).fit(model, prompts, space.hooks)
    generator = torch.Generator().manual_seed(0)
    circuits = [tlnp.Circuit(space, {key: torch.rand(shape, generator=generator) < 0.9 for key, shape in space.shapes.items()}, fitted)
                for _ in range(3)]
    circuits.append(tlnp.Circuit.full(space, fitted))
    runs = CircuitRuns(model, prompts, space, fitted, batch_size=batch_size)
    scores = runs(iter(circuits))
    assert len(scores) == 4 and scores.logit_diff.shape == (4, 24)
    for i, circuit in enumerate(circuits):
        found = tlnp.evaluate(model, circuit, prompts)
        assert float(scores.kl[i].mean()) == pytest.approx(found.kl, abs=1e-4)
        assert float(scores.agrees[i].float().mean()) == found.exact_match
        assert torch.allclose(scores.logit_diff[i], prompts.logit_diff(circuit_logits(model, circuit, prompts)), atol=1e-3)
    assert torch.allclose(scores.logit_diff[3], runs.full.logit_diff[0], atol=runs.resolution) and runs.full.kl.abs().max() < 1e-5
    one, rest = scores.split(1, 3)
    assert len(one) == 1 and torch.equal(rest.kl, scores.kl[1:])


@pytest.mark.parametrize(("dtype", "share"), [(torch.float64, 1.5e-8), (torch.float32, 3.5e-4), (torch.bfloat16, 0.0157)])
def test_resolution_is_far_below_the_scores_in_half_precision_too(dtype: torch.dtype, share: float) -> None:
    model, prompts = tlnp.toy.load("ioi", n=4)
    runs = CircuitRuns(model.to(dtype), prompts, find_nodes(model), tlnp.Ablation())
    assert runs.resolution / float(runs.full.logit_diff.abs().mean()) == pytest.approx(share, rel=0.05)


def test_no_circuits_are_no_scores(toy: Toy) -> None:
    space = find_nodes(toy[0])
    assert CircuitRuns(toy[0], toy[1], space, tlnp.Ablation())([]).logit_diff.shape == (0, 24)
