"""A circuit's dictionary in TransformerLens' patching tools: hooks by hand, generic_activation_patch, path patching; 3.9 and 4.x."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from integration_support import ARCHITECTURES, NO_HOOKED, HookedTransformer, build, cache_of, random_circuit, random_pairs, run
from torch import Tensor
from transformer_lens import patching
from transformer_lens.tools.analysis import get_act_patch_direct_path

import tl_nodeprune as tlnp
from tl_nodeprune.nodes.attachment import temporary_hooks
from tl_nodeprune.nodes.probe import find_nodes
from tl_nodeprune.nodes.space import GateKey

Toy = tuple[Any, tlnp.PromptPairs]
NO_LAYER = ("attn", "mlp", "head", "attn_neuron", "mlp_neuron", "mlp_out")
SHORT = {"attn_neuron": "z", "attn": "attn_out", "mlp_neuron": "post", "mlp_out": "mlp_out"}
"""Granularities, and what TransformerLens' get_act_name calls their hook points."""


def metric_of(prompts: tlnp.PromptPairs) -> Any:
    rows = torch.arange(len(prompts))
    return lambda logits: prompts.logit_diff(logits[rows, prompts.answer_positions]).mean()


def kept_only(circuit: tlnp.Circuit, clean: Any, corrupted: Any) -> dict[str, Tensor]:
    """A cache that is clean at the kept nodes and corrupted elsewhere."""
    return {hook: torch.where(mask == 1, clean[hook], corrupted[hook]) for hook, mask in circuit.items()}


def patched_by(circuit: tlnp.Circuit) -> Any:
    """A patch setter that patches the kept nodes of a layer."""
    def setter(name: str, corrupted: Tensor, index: list[int], clean: Tensor) -> Tensor:
        return torch.where(circuit[f"blocks.{index[0]}.{name}"] == 1, clean, corrupted)
    return setter


def test_hooks_by_hand_from_the_dictionary_are_the_circuits_own(each_toy: Toy) -> None:
    model, prompts = each_toy
    circuit, corrupted = random_circuit(find_nodes(model).restrict(NO_LAYER), "interchange", seed=0), cache_of(model, prompts.corrupted)

    def keep(activation: Tensor, hook: Any, name: str) -> Tensor:
        return circuit[name] * activation + (1 - circuit[name]) * corrupted[name]

    with torch.no_grad():
        by_hand = model.run_with_hooks(prompts.clean, fwd_hooks=[(name, partial(keep, name=name)) for name in circuit])
        own = model.run_with_hooks(prompts.clean, fwd_hooks=circuit.fwd_hooks(model, prompts))
    torch.testing.assert_close(by_hand, own, atol=1e-5, rtol=1e-5)
    assert (own - run(model, prompts.clean)).abs().max() > 0.1


def test_a_circuits_hooks_serve_the_hooks_context_and_its_cache(each_toy: Toy) -> None:
    """run_with_cache has no fwd_hooks of its own; `model.hooks` with the circuit's around it gives what `applied` gives."""
    model, prompts = each_toy
    circuit = random_circuit(find_nodes(model), "interchange", seed=1)
    with torch.no_grad(), model.hooks(fwd_hooks=circuit.fwd_hooks(model, prompts)):
        logits, cache = model.run_with_cache(prompts.clean)
    with circuit.applied(model, prompts):
        want = cache_of(model, prompts.clean)
        assert torch.equal(run(model, prompts.clean), logits)
    assert all(torch.equal(cache[hook], want[hook]) for hook in circuit)


@pytest.mark.parametrize("granularity", SHORT)
def test_generic_activation_patch_of_kept_nodes_only(each_toy: Toy, granularity: str) -> None:
    """Layer by layer it is the circuit's complement applied with clean and corrupted swapped: what is kept takes the clean activation."""
    model, p = each_toy
    swapped = tlnp.PromptPairs(p.corrupted, p.clean, p.answers, p.wrong_answers, p.attention_mask, p.answer_positions)
    space = find_nodes(model).restrict([granularity])
    circuit = (random_circuit(space, "interchange", seed=3, keep=0.5) if granularity != "attn" else
               tlnp.Circuit(space, {key: torch.tensor(key.layer != 1) for key in space.shapes}))
    hooks, clean = [key.hook for key in sorted(circuit.space.shapes, key=lambda key: key.layer)], cache_of(model, p.clean)

    def patch(chosen: tlnp.Circuit) -> Tensor:
        setter = partial(patched_by(chosen), hooks[0].split(".", 2)[2])
        with torch.no_grad():
            return patching.generic_activation_patch(model, p.corrupted, clean, metric_of(p), setter, SHORT[granularity], ["layer"])

    got, plain = patch(circuit), metric_of(p)(run(model, p.corrupted))
    for layer, hook in enumerate(hooks):
        one_layer = tlnp.Circuit(circuit.space.restrict(None, [layer]), {GateKey(granularity, layer): circuit.live(granularity, layer)})
        with (~one_layer).applied(model, swapped):
            torch.testing.assert_close(got[layer], metric_of(p)(run(model, p.corrupted)), atol=1e-5, rtol=1e-5, msg=hook)
    assert (got - plain).abs().max() > 0.05
    assert torch.allclose(patch(tlnp.Circuit.empty(circuit.space)), plain.expand(3), atol=1e-5)
    assert (patch(tlnp.Circuit.full(circuit.space)) - got).abs().max() > 0.05


def test_generic_activation_patch_over_the_kept_heads_is_their_effect(each_toy: Toy) -> None:
    model, prompts = each_toy
    circuit = random_circuit(find_nodes(model).restrict(["head"]), "interchange", seed=0, keep=0.5)
    heads = pd.DataFrame(circuit.nodes("head"), columns=["layer", "head"])
    assert 2 < len(heads) < 12
    with torch.no_grad():
        theirs = patching.generic_activation_patch(model, prompts.corrupted, cache_of(model, prompts.clean), metric_of(prompts),
                                                   patching.layer_head_vector_patch_setter, "z", index_df=heads)
    effects = tlnp.crosscheck.activation_patching(model, prompts, ["head"], progress=False)
    ours = torch.stack([effects.of("head")[layer][head] for layer, head in circuit.nodes("head")])
    torch.testing.assert_close(ours, theirs - metric_of(prompts)(run(model, prompts.corrupted)), atol=1e-5, rtol=1e-5)


def direct_paths(model: Any, p: tlnp.PromptPairs, clean: Any, head: int) -> Tensor:
    """TransformerLens' direct path patching from a head of layer 0 into every later head's query: [layer head]."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 3.9 warns of LayerNorms that are not folded
        return get_act_patch_direct_path(  # type: ignore[no-any-return]
            model, p.corrupted, clean, cache_of(model, p.corrupted), metric_of(p), 0, head, component="q", verbose=False)


def path_by_hand(model: Any, p: tlnp.PromptPairs, clean: Any, source: int, target: int) -> Tensor:
    """The same for one head of layer 1: the query that it has with the source's write changed in its input, put into the corrupted run.
    TransformerLens 3.9 does so to first order: divided by the corrupted run's layer norm scale, neither centred nor weighed."""
    z, q, corrupted = "blocks.0.attn.hook_z", "blocks.1.attn.hook_q", cache_of(model, p.corrupted)
    delta = (clean[z] - corrupted[z])[:, :, source] @ model.blocks[0].attn.W_O[source]
    if HookedTransformer is None:
        with torch.no_grad(), temporary_hooks(model, [("blocks.1.hook_resid_pre", lambda stream, hook: stream + delta)]):
            query = cache_of(model, p.corrupted)[q][:, :, target]
    else:
        query = corrupted[q][:, :, target] + delta / corrupted["blocks.1.ln1.hook_scale"] @ model.blocks[1].attn.W_Q[target]

    def patch(activation: Tensor, hook: Any) -> Tensor:
        return activation.index_copy(2, torch.tensor([target]), query.unsqueeze(2))

    with torch.no_grad():
        return metric_of(p)(model.run_with_hooks(p.corrupted, fwd_hooks=[(q, patch)]))  # type: ignore[no-any-return]


@pytest.mark.parametrize("keep", [0.0, 0.5, 1.0])
def test_path_patching_from_the_kept_dims_of_a_head(each_toy: Toy, keep: float) -> None:
    (model, p), source, target = each_toy, 2, 2
    circuit = random_circuit(find_nodes(model).restrict(["attn_neuron"], [0]), "interchange", seed=0, keep=keep)
    clean = kept_only(circuit, cache_of(model, p.clean), cache_of(model, p.corrupted))
    plain, got = metric_of(p)(run(model, p.corrupted)), direct_paths(model, p, clean, source)
    torch.testing.assert_close(got[1, target], path_by_hand(model, p, clean, source, target), atol=1e-5, rtol=1e-5)
    effects = got[1:] - plain
    if keep == 0:
        assert torch.allclose(effects, torch.zeros_like(effects), atol=1e-5)
    else:
        assert effects.abs().max() > 0.2


def test_path_patching_between_kept_heads(each_toy: Toy) -> None:
    """Of all paths into queries of layer 1, the strongest is one between heads that a circuit keeps; a cut source has none."""
    model, p = each_toy
    effects = tlnp.crosscheck.activation_patching(model, p, ["head"], progress=False)
    space = find_nodes(model).restrict(["head"])
    circuit = tlnp.Circuit(space, {GateKey("head", layer): effects.normalised().of("head")[layer] > 0.05 for layer in range(3)})
    clean, corrupted = cache_of(model, p.clean), cache_of(model, p.corrupted)
    plain = metric_of(p)(run(model, p.corrupted))
    whole = torch.stack([direct_paths(model, p, clean, head)[1] - plain for head in range(4)])
    through = torch.stack([direct_paths(model, p, kept_only(circuit, clean, corrupted), head)[1] - plain for head in range(4)])
    source, target = divmod(int(whole.abs().argmax()), 4)
    assert (0, source) in circuit.nodes("head") and (1, target) in circuit.nodes("head") and whole[source, target] > 0.2
    live = circuit.live("head", 0)
    assert 0 < live.sum() < 4
    torch.testing.assert_close(through[live], whole[live], atol=1e-5, rtol=1e-5)
    assert through[~live].abs().max() < 1e-5 < whole[~live].abs().max()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_crosscheck_on_every_architecture(name: str, tmp_path: Path) -> None:
    """By default what the model has of blocks and heads; heads by TransformerLens as by our own rows; attribution for all nodes."""
    model, prompts = build(name, tmp_path), random_pairs(4)
    if model is None:
        pytest.skip(NO_HOOKED)
    space = find_nodes(model)
    exact, rows = (tlnp.crosscheck.activation_patching(model, prompts, progress=progress) for progress in (True, False))
    assert exact.granularities == tuple(name for name in ("attn", "mlp", "head") if name in space.granularities)
    torch.testing.assert_close(dict(exact), dict(rows), atol=1e-5, rtol=1e-5)
    assert max(float(effect.abs().max()) for effect in exact.values()) > 0.05
    fast = tlnp.crosscheck.attribution_patching(model, prompts)
    assert fast.granularities == space.granularities and all(effect.isfinite().all() for effect in fast.values())
    found = tlnp.crosscheck.agreement(random_circuit(space, "interchange", seed=0, keep=0.5), fast)
    assert [row.granularity for row in found.rows] == list(space.granularities)
