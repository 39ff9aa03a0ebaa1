"""Stand-ins: each ablation against values worked out from the cache."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import tl_nodeprune as tlnp
from tl_nodeprune.nodes.probe import find_nodes

Toy = tuple[Any, tlnp.PromptPairs]
HOOKS = ["blocks.0.attn.hook_z", "blocks.1.hook_mlp_out", "blocks.2.hook_resid_post"]


def added(cache: Any, hook: str) -> torch.Tensor:
    """What a hook point adds: for a layer the change of the residual stream."""
    return cache[hook] - cache[hook.replace("post", "pre")] if "resid" in hook else cache[hook]  # type: ignore[no-any-return]


def test_mean_is_per_position_without_padding(toy: Toy) -> None:
    model, prompts = toy
    _, cache = model.run_with_cache(prompts.clean)
    real = prompts.attention_mask
    assert real is not None and not real.all()
    fitted = tlnp.Ablation("mean").fit(model, prompts, HOOKS, batch_size=7)
    optimal = tlnp.Ablation("optimal").fit(model, prompts, HOOKS)
    for hook in HOOKS:
        x = added(cache, hook)
        by_hand = torch.stack([x[real[:, pos], pos].mean(0) for pos in range(x.shape[1])])
        torch.testing.assert_close(fitted.constants[hook], by_hand, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(optimal.constants[hook], x[real].mean(0), atol=1e-5, rtol=1e-4)
    assert fitted.fit(model, prompts[:3], HOOKS) is fitted  # what is fitted stays so


def test_columns_of_padding_alone_change_nothing(toy: Toy) -> None:
    model, prompts = toy
    names = ("clean", "corrupted", "attention_mask")
    wide = {name: torch.cat([getattr(prompts, name), getattr(prompts, name)[:, :4] * 0], 1) for name in names}
    padded = tlnp.PromptPairs(**wide, answers=prompts.answers, wrong_answers=prompts.wrong_answers)
    for name in ("mean", "optimal"):
        want, got = (tlnp.Ablation(name).fit(model, p, HOOKS).constants for p in (prompts, padded))
        assert all(torch.isfinite(got[hook]).all() for hook in HOOKS)
        width = slice(17 if name == "mean" else None)
        assert all(torch.allclose(got[hook][width], want[hook], atol=1e-6) for hook in HOOKS)


def test_interchange_and_zero(toy: Toy) -> None:
    model, prompts = toy
    _, cache = model.run_with_cache(prompts.corrupted)
    values = tlnp.Ablation().values(model, prompts, HOOKS, batch_size=5)
    for hook in HOOKS:
        torch.testing.assert_close(values[hook], added(cache, hook), atol=1e-5, rtol=1e-4)
    assert all(float(v) == 0 for v in tlnp.Ablation("zero").values(model, prompts, HOOKS).values())


def test_mean_on_other_lengths(toy: Toy) -> None:
    model, prompts = toy
    short = tlnp.PromptPairs(prompts.clean[:, :15], prompts.corrupted[:, :15], prompts.answers, prompts.wrong_answers)
    fitted = tlnp.Ablation("mean").fit(model, prompts, HOOKS)
    assert all(len(v) == 15 for v in fitted.values(model, short, HOOKS).values())
    with pytest.raises(ValueError, match="prompts of 15 tokens, these have 17"):
        tlnp.Ablation("mean").fit(model, short, HOOKS).values(model, prompts, HOOKS)


def test_errors(toy: Toy) -> None:
    model, prompts = toy
    with pytest.raises(ValueError, match="unknown ablation 'noise'"):
        tlnp.Ablation("noise")
    for value in (torch.tensor([1.0, torch.nan]), torch.full((1, 2), -torch.inf, dtype=torch.float16)):
        with pytest.raises(ValueError, match=r"constants\['a'\] holds NaN or inf"):
            tlnp.Ablation("mean", {"a": value})
    ones = torch.ones(2)
    for kind, value in (("sparse", ones.to_sparse()), ("complex", ones * 1j), ('on the device "meta"', ones.to("meta"))):
        with pytest.raises(ValueError, match=rf"constants\['a'\] is {kind}"):
            tlnp.Ablation("mean", {"a": value})
    with pytest.raises(TypeError, match=r"constants\['a'\] must be a tensor of floats, got torch.int64"):
        tlnp.Ablation("optimal", {"a": torch.ones(2).long()})
    with pytest.raises(ValueError, match="constants are given, and 'zero' ablation has none"):
        tlnp.Ablation("zero", {"a": torch.ones(2)})
    with pytest.raises(ValueError, match=r"'mean' has no constant for 'blocks\.0\.attn\.hook_z'"):
        tlnp.Ablation("mean").values(model, prompts, HOOKS)


def test_zero_ablation_is_the_embedding_alone(toy: Toy) -> None:
    model, prompts = toy
    empty = tlnp.Circuit.empty(find_nodes(model), tlnp.Ablation("zero"))
    with empty.applied(model, prompts):
        _, cache = model.run_with_cache(prompts.clean)
    torch.testing.assert_close(cache["blocks.2.hook_resid_post"], cache["blocks.0.hook_resid_pre"], atol=1e-6, rtol=0)


def test_a_mean_is_of_positions_that_prompts_reach(toy: Toy) -> None:
    """Padding that all prompts end in has none: longer prompts are refused, not given zeros."""
    model, prompts = toy
    lengths = prompts.attention_mask.sum(1)
    short, hook = prompts[(lengths == lengths.min()).nonzero()[:, 0]], "blocks.1.attn.hook_z"
    assert short.clean.shape[1] > lengths.min()
    mean = tlnp.Ablation("mean").fit(model, short, [hook])
    assert len(mean.constants[hook]) == lengths.min()
    with pytest.raises(ValueError, match=f"fitted on prompts of {int(lengths.min())} tokens, these have {prompts.clean.shape[1]}"):
        mean.values(model, prompts, [hook])


def test_constants_are_summed_in_float32(toy: Toy) -> None:
    model, prompts = toy
    hook = "blocks.1.attn.hook_z"
    half = copy.deepcopy(model).to(torch.bfloat16)
    one, all_at_once = (tlnp.Ablation("mean").fit(half, prompts, [hook], batch_size=size).constants[hook] for size in (1, 64))
    assert one.dtype == torch.float32 and float((one - all_at_once).norm() / all_at_once.norm()) < 0.01


def test_ablations_are_equal_by_name_and_constants() -> None:
    ones, zeros = ({"a": torch.full((2,), value)} for value in (1.0, 0.0))
    assert tlnp.Ablation("optimal", ones) == tlnp.Ablation("optimal", {"a": torch.ones(2)}) and tlnp.Ablation() == tlnp.Ablation()
    assert tlnp.Ablation("optimal", ones) != tlnp.Ablation("optimal", zeros) and tlnp.Ablation("zero") != tlnp.Ablation()
