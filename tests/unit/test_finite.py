"""NaN, inf and -inf where logits become numbers: an error for what is broken, the right value for tokens that never occur."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import tl_nodeprune as tlnp
from tl_nodeprune.nodes.attachment import temporary_hooks
from tl_nodeprune.nodes.probe import find_nodes

Toy = tuple[Any, tlnp.PromptPairs]
HEADS = ("head", "mlp")
NEVER = 7  # tokens from the end of the vocabulary


@contextmanager
def logits_changed(model: Any, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    with temporary_hooks(model, [("unembed.hook_out", lambda x, hook: change(x))]):
        yield


def at_some_rows(value: float) -> Callable[[Tensor], Tensor]:
    """One logit of every batch of prompts is not a number that can be used."""
    def change(x: Tensor) -> Tensor:
        return x.index_fill(-1, torch.tensor([3]), value) if x.shape[0] > 1 else x
    return change


def everything_that_makes_numbers(model: Any, prompts: tlnp.PromptPairs) -> dict[str, Callable[[], object]]:
    space = find_nodes(model).restrict(HEADS)
    half = tlnp.Circuit(space, {key: torch.arange(math.prod(shape)).view(shape) % 2 == 0 for key, shape in space.shapes.items()})
    scores = tlnp.NodeScores({key: torch.ones(shape) for key, shape in space.shapes.items()}, space)
    return {
        "evaluate": lambda: tlnp.evaluate(model, half, prompts),
        "correct": lambda: prompts.correct(model),
        "report": lambda: tlnp.report(model, half, prompts, n_random=2, n_subsets=2, progress=False),
        "activation_patching": lambda: tlnp.crosscheck.activation_patching(model, prompts, progress=False),
        "attribution_patching": lambda: tlnp.crosscheck.attribution_patching(model, prompts),
        "mib.evaluate": lambda: tlnp.mib.evaluate(model, scores, prompts),
        "token_effects": lambda: tlnp.viz.token_effects(model, half, prompts),
        "overview": lambda: tlnp.viz.overview(model, half, prompts),
        "estimate": lambda: tlnp.estimate(model, prompts, granularities=HEADS),
        "sweep": lambda: tlnp.sweep(model, prompts, max_kl=(1.0,), seeds=(0,), granularities=HEADS, steps=2, progress=False),
    }


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nothing_makes_numbers_of_broken_logits(toy: Toy, value: float) -> None:
    model, prompts = toy
    calls = everything_that_makes_numbers(model, prompts)
    for name, call in calls.items():
        with logits_changed(model, at_some_rows(value)), pytest.raises(FloatingPointError, match="NaN or inf in"):
            call()
            pytest.fail(f"{name} made a number of {value}")


def test_a_broken_weight_is_named(fresh_toy: Toy) -> None:
    model, prompts = fresh_toy
    calls = everything_that_makes_numbers(model, prompts)
    next(iter(model.parameters())).data[5] = math.nan  # an embedding, which some prompts have
    for name, call in calls.items():
        with pytest.raises(FloatingPointError, match="NaN or inf in"):
            call()
            pytest.fail(f"{name} made a number of a NaN")


def test_an_answer_that_never_occurs_is_named(toy: Toy) -> None:
    model, prompts = toy
    circuit = tlnp.Circuit.full(find_nodes(model).restrict(HEADS))
    with logits_changed(model, lambda x: x.index_fill(-1, prompts.answers[:1], -math.inf)):
        with pytest.raises(FloatingPointError, match="NaN or inf in the logit difference.*not an answer"):
            tlnp.evaluate(model, circuit, prompts)


def test_kl_leaves_out_tokens_that_never_occur() -> None:
    """Value and gradients are those of the same logits without these tokens."""
    g = torch.Generator().manual_seed(0)
    whole, full = (torch.randn(5, 9, generator=g, dtype=torch.double) for _ in range(2))
    few, few_full = (x[:, :6].clone().requires_grad_() for x in (whole, full))
    tlnp.kl_divergence(few, few_full).sum().backward()
    whole[:, 6:] = full[:, 6:] = -math.inf
    whole.requires_grad_(), full.requires_grad_()
    found = tlnp.kl_divergence(whole, full)
    found.sum().backward()
    p, q = few_full.softmax(-1), few.softmax(-1)
    torch.testing.assert_close(found, (p * (p / q).log()).sum(-1))
    for given, wanted in ((whole, few), (full, few_full)):
        torch.testing.assert_close(given.grad[:, :6], wanted.grad)
        assert not given.grad[:, 6:].any()


def test_kl_is_finite_where_a_probability_is_too_small_for_a_float() -> None:
    full, logits = torch.tensor([[0.0, 1.0, -500.0]]), torch.tensor([[0.0, 1.0, -math.inf]])
    assert float(tlnp.kl_divergence(logits, full)) == pytest.approx(0, abs=1e-7)
    assert float(tlnp.kl_divergence(logits, full + torch.tensor([[0, 0, 500.0]]))) == math.inf  # negative control


def test_a_vocabulary_with_tokens_that_never_occur_gives_the_numbers_of_one_without(toy: Toy) -> None:
    """-inf against -1e4, at which a float32 softmax is 0 too."""
    model, prompts = toy
    space = find_nodes(model).restrict(HEADS)
    half = tlnp.Circuit(space, {key: torch.arange(math.prod(shape)).view(shape) % 2 == 0 for key, shape in space.shapes.items()})
    assert int(torch.cat([prompts.answers, prompts.wrong_answers]).max()) < model.cfg.d_vocab - NEVER
    some, found = prompts[:8], []
    for never in (-math.inf, -1e4):
        with logits_changed(model, lambda x, never=never: torch.cat([x[..., :-NEVER], torch.full_like(x[..., -NEVER:], never)], -1)):
            masks = model.add_node_masks(HEADS)
            try:
                scores = tlnp.rank(masks, some, steps=2, progress=False)
            finally:
                model.remove_node_masks()
            found.append((tlnp.evaluate(model, half, some), scores))
    assert found[0] == found[1] and found[0][0].kl > 0.1


def test_broken_activations_are_no_means_and_no_pictures(toy: Toy) -> None:
    model, prompts = toy
    space = find_nodes(model)
    everything = tlnp.Circuit.full(space)
    for at, call in {
        "blocks.1.mlp.hook_post": lambda: tlnp.Ablation("mean").fit(model, prompts, ["blocks.1.mlp.hook_post"]),
        "blocks.1.attn.hook_pattern": lambda: tlnp.viz.kept_heads(model, everything, prompts),
        "blocks.0.mlp.hook_post": lambda: tlnp.viz.kept_neurons(model, everything, prompts),
    }.items():
        with temporary_hooks(model, [(at, lambda x, hook: x.index_fill(-1, torch.tensor([0]), math.nan))]):
            with pytest.raises(FloatingPointError, match=f"NaN or inf in the .* at {at}"):
                call()
