"""Nodes, masks and ablations on tiny random models of many architectures, against hooks written by hand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import bridge_of, hf_family
from integration_support import (
    ARCHITECTURES,
    D_HEAD,
    D_MLP,
    D_MODEL,
    HF_CONFIGS,
    N_HEADS,
    N_LAYERS,
    NO_HOOKED,
    bridge,
    build,
    cache_of,
    hf_model,
    n_hooks,
    random_circuit,
    random_pairs,
    run,
)
from landscapes import circuit_of
from torch import Tensor

import tl_nodeprune as tlnp
from tl_nodeprune.masks.landscape import Landscape, circuits_of
from tl_nodeprune.masks.reference import Reference
from tl_nodeprune.nodes.attachment import find_attachment
from tl_nodeprune.nodes.hooks import answer_logits
from tl_nodeprune.nodes.probe import can_slice, find_nodes
from tl_nodeprune.nodes.space import GateKey

SHAPES = {"layer": (), "attn": (), "mlp": (), "head": (N_HEADS,), "attn_neuron": (N_HEADS, D_HEAD), "mlp_neuron": (D_MLP,),
          "mlp_out": (D_MODEL,)}
LACKING = {"mixtral": {"mlp_neuron"}} | {f"{kind}-attn_only": {"mlp", "mlp_neuron", "mlp_out"} for kind in ("native", "hooked")}
PLACES = {"attn": "hook_attn_out", "mlp": "hook_mlp_out", "head": "attn.hook_z", "attn_neuron": "attn.hook_z",
          "mlp_neuron": "mlp.hook_post", "mlp_out": "hook_mlp_out"}
NODE_INDEX = {"layer": (), "attn": (), "mlp": (), "head": (2,), "attn_neuron": (1, 3), "mlp_neuron": (5,), "mlp_out": (7,)}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def named(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    model = build(request.param, tmp_path_factory.mktemp(request.param))
    if model is None:
        pytest.skip(NO_HOOKED)
    return request.param, model


@pytest.fixture
def model(named: tuple[str, Any]) -> Iterator[Any]:
    """The model; no hook may be left on it after the test."""
    before = n_hooks(named[1])
    yield named[1]
    try:
        assert n_hooks(named[1]) == before
        assert find_attachment(named[1]) is None
    finally:
        if (left := find_attachment(named[1])) is not None:
            left.remove()


def expected(name: str) -> dict[str, tuple[int, ...]]:
    return {granularity: shape for granularity, shape in SHAPES.items() if granularity not in LACKING.get(name, set())}


def test_find_nodes_lists_what_the_architecture_has(named: tuple[str, Any], model: Any) -> None:
    space = find_nodes(model)
    want = expected(named[0])
    assert space.shapes == {GateKey(name, layer): shape for layer in range(N_LAYERS) for name, shape in want.items()}
    assert space.granularities == tuple(want)
    assert (space.d_model, space.n_layers) == (D_MODEL, N_LAYERS)
    assert space.kv_heads == (2 if named[0] in ("llama", "gemma2", "mixtral") else N_HEADS)
    assert space.gated_mlp == (named[0] in ("llama", "gemma2", "mixtral") or named[0].endswith("gated_mlp"))


def test_a_granularity_that_is_lacking_is_an_error_by_name_only(named: tuple[str, Any], model: Any) -> None:
    lacking = LACKING.get(named[0], set())
    for granularity in lacking:
        with pytest.raises(ValueError, match=f"no '{granularity}' nodes"):
            tlnp.add_node_masks(model, ["head", granularity])
    masks = model.add_node_masks()
    try:
        assert not lacking & set(masks.space.granularities)
    finally:
        model.remove_node_masks()


def test_all_open_is_the_model_to_the_bit_and_removal_leaves_nothing(model: Any) -> None:
    prompts, hooks, slots = random_pairs(), n_hooks(model), {id(p): dict(p.ctx) for p in model.hook_dict.values()}
    plain, trainable = run(model, prompts.clean), [p.requires_grad for p in model.parameters()]
    masks = model.add_node_masks()
    assert n_hooks(model) > hooks and torch.equal(run(model, prompts.clean), plain)
    with masks.paired(prompts):
        assert torch.equal(run(model, prompts.clean), plain)
    model.remove_node_masks()
    assert n_hooks(model) == hooks and {id(p): dict(p.ctx) for p in model.hook_dict.values()} == slots
    assert torch.equal(run(model, prompts.clean), plain)
    assert [p.requires_grad for p in model.parameters()] == trainable


def test_all_closed_is_the_corrupted_run_where_the_tokens_agree(model: Any) -> None:
    prompts = random_pairs()
    clean, corrupted = run(model, prompts.clean), run(model, prompts.corrupted)
    agree = (prompts.clean == prompts.corrupted)[0]
    assert agree.tolist() == [True, False, True, True, True, True]
    assert (clean - corrupted)[:, 2:].abs().max() > 1e-2, "the corruption must reach later positions for this test to mean anything"
    masks = model.add_node_masks()
    try:
        masks.set_to(tlnp.Circuit.empty(masks.space))
        with masks.paired(prompts):
            closed = run(model, prompts.clean)
    finally:
        masks.remove()
    torch.testing.assert_close(closed[:, agree], corrupted[:, agree], rtol=1e-5, atol=1e-5)
    assert (closed[:, 1] - corrupted[:, 1]).abs().max() > 1e-2, "the embedding itself is no node"
    with tlnp.Circuit.empty(find_nodes(model)).applied(model, prompts):
        assert torch.equal(run(model, prompts.clean), closed)


def patched(model: Any, prompts: tlnp.PromptPairs, granularity: str, layer: int) -> Tensor:
    """The clean run with one node put to its activation in the corrupted run, by TransformerLens' own tools only."""
    cache = cache_of(model, prompts.corrupted)
    if granularity == "layer":
        stream: list[Tensor] = []
        added = cache[f"blocks.{layer}.hook_resid_post"] - cache[f"blocks.{layer}.hook_resid_pre"]
        hooks = [(f"blocks.{layer}.hook_resid_pre", lambda x, hook: stream.append(x)),
                 (f"blocks.{layer}.hook_resid_post", lambda x, hook: stream[-1] + added)]
    else:
        place, index = f"blocks.{layer}.{PLACES[granularity]}", NODE_INDEX[granularity]

        def patch(activation: Tensor, hook: Any) -> Tensor:
            activation = activation.clone()
            activation[(slice(None), slice(None), *index)] = cache[place][(slice(None), slice(None), *index)]
            return activation

        hooks = [(place, patch)]
    with torch.no_grad():
        return model.run_with_hooks(prompts.clean, fwd_hooks=hooks)  # type: ignore[no-any-return]


@pytest.mark.parametrize("granularity", tlnp.GRANULARITIES)
@pytest.mark.parametrize("layer", range(N_LAYERS))
def test_one_closed_node_is_a_patch_by_hand(named: tuple[str, Any], model: Any, granularity: str, layer: int) -> None:
    if granularity in LACKING.get(named[0], set()):
        pytest.skip(f"{named[0]} has no {granularity} nodes")
    prompts = random_pairs(seed=layer + 1)
    plain, want = run(model, prompts.clean), patched(model, prompts, granularity, layer)
    masks = model.add_node_masks()
    try:
        with torch.no_grad():
            masks.score(GateKey(granularity, layer))[NODE_INDEX[granularity]] = masks.gate.closed_score
        with masks.paired(prompts):
            got = run(model, prompts.clean)
    finally:
        masks.remove()
    assert (want - plain).abs().max() > 1e-4, "the patch must do something for this test to mean anything"
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_a_closed_layer_keeps_the_stream_and_replaces_what_the_block_adds(model: Any) -> None:
    prompts = random_pairs()
    clean, corrupted = cache_of(model, prompts.clean), cache_of(model, prompts.corrupted)
    space = find_nodes(model).restrict(["layer"])
    circuit = tlnp.Circuit(space, {GateKey("layer", 0): torch.tensor(1), GateKey("layer", 1): torch.tensor(0)})
    with circuit.applied(model, prompts):
        cache = cache_of(model, prompts.clean)
    pre, post = "blocks.1.hook_resid_pre", "blocks.1.hook_resid_post"
    assert torch.equal(cache[pre], clean[pre])
    torch.testing.assert_close(cache[post] - cache[pre], corrupted[post] - corrupted[pre], rtol=1e-5, atol=1e-5)
    assert (cache[post] - corrupted[post])[:, 1].abs().max() > 1e-2, "the stream was wiped"


@pytest.mark.parametrize("ablation", ["interchange", "mean", "zero", "optimal"])
def test_every_ablation_gives_finite_logits_in_training_and_as_a_circuit(model: Any, ablation: str) -> None:
    prompts = random_pairs()
    plain, masks = run(model, prompts.clean), model.add_node_masks(ablation=ablation)
    try:
        masks.set_to(random_circuit(masks.space, ablation, seed=0))
        with masks.paired(prompts):
            attached, circuit = run(model, prompts.clean), masks.to_circuit()
    finally:
        masks.remove()
    assert attached.isfinite().all() and (attached - plain).abs().max() > 1e-3
    assert circuit.ablation.name == ablation
    with circuit.applied(model, prompts):
        torch.testing.assert_close(run(model, prompts.clean), attached, rtol=1e-6, atol=1e-6)
    assert torch.equal(run(model, prompts.clean), plain)


def test_all_zero_ablated_is_the_embedding_alone(model: Any) -> None:
    prompts = random_pairs()
    first = cache_of(model, prompts.clean)["blocks.0.hook_resid_pre"]
    with tlnp.Circuit.empty(find_nodes(model), tlnp.Ablation("zero")).applied(model, prompts):
        cache = cache_of(model, prompts.clean)
    assert torch.equal(cache[f"blocks.{N_LAYERS - 1}.hook_resid_post"], first)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "gptj", "neox"])
def test_parameters_total_is_the_sum_of_attention_and_mlp_weight_matrices(name: str, tmp_path: Path) -> None:
    hf = hf_model(name)  # counted before the bridge wraps it: a bridge adds split copies of fused projections
    parts = (".attn.", ".self_attn.", ".attention.", ".mlp.")
    blocks = [p for n, p in hf.named_parameters() if p.ndim == 2 and any(part in n for part in parts)]
    circuit = tlnp.Circuit.full(find_nodes(bridge(hf, tmp_path)))
    assert len(blocks) >= 4 * N_LAYERS
    assert circuit.parameters_total == circuit.parameters == sum(p.numel() for p in blocks)
    assert tlnp.Circuit.empty(circuit.space).parameters == 0


def test_slicing_before_the_unembedding_changes_no_logit(named: tuple[str, Any], model: Any) -> None:
    prompts = random_pairs()
    positions = torch.tensor([5, 3, 4])
    if not can_slice(model, prompts.clean, positions):
        assert named[0] == "gpt2", f"{named[0]} could be sliced"
        pytest.xfail("transformers' GPT2Model.forward views the final residual back to [batch pos d_model], so the cut cannot pass")
    full = run(model, prompts.clean)[torch.arange(3), positions]
    assert torch.equal(answer_logits(model, prompts.clean, positions, sliced=False), full)
    with torch.no_grad():
        sliced = answer_logits(model, prompts.clean, positions)
    assert sliced.dtype == torch.float32 and sliced.shape == full.shape
    torch.testing.assert_close(sliced, full, rtol=1e-6, atol=1e-6)


def test_a_short_search_gives_a_consistent_circuit(model: Any) -> None:
    prompts, masks = random_pairs(8), model.add_node_masks()
    try:
        result = masks.prune(prompts, max_nodes=0.5, steps=5, progress=False)
        with masks.paired(prompts):
            attached = run(model, prompts.clean)
    finally:
        masks.remove()
    assert result.circuit.size <= round(0.5 * result.circuit.size_total)
    with result.circuit.applied(model, prompts):
        torch.testing.assert_close(run(model, prompts.clean), attached, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("ablation", ["mean", "zero"])
def test_a_search_measures_the_circuit_that_comes_of_it_where_a_block_is_closed(model: Any, ablation: str) -> None:
    """Where a norm follows the block (Gemma-2), the block's mean is not what that makes of the means in the block."""
    prompts, space = random_pairs(8), find_nodes(model)
    hooks = tuple(dict.fromkeys(key.hook for key in space.free()))
    fitted = tlnp.Ablation(ablation).fit(model, prompts, space.hooks)
    landscape = Landscape(space, Reference(model, prompts, fitted, hooks))
    for closed in ("attn", "mlp", "layer"):
        flat = torch.ones(landscape.n, dtype=torch.bool)
        for key, gate in landscape.gates(flat).items():
            if key.layer == 1 and (closed == "layer" or key.hook.startswith(f"blocks.1.{closed}") or key.granularity == f"{closed}_out"):
                gate.zero_()
        measured = float(landscape.losses(circuits_of([flat]), torch.arange(len(prompts))).loss.mean())
        circuit = circuit_of(landscape, flat)
        assert tlnp.evaluate(model, circuit, prompts).kl == pytest.approx(measured, rel=1e-4, abs=1e-7), closed
        assert measured > 1e-5 or not any(key.granularity == closed for key in space.shapes)


_UNSUPPORTED = {
    "bert": (transformers.AutoModelForMaskedLM, lambda: transformers.BertConfig(
        vocab_size=50, num_hidden_layers=2, hidden_size=32, num_attention_heads=4, intermediate_size=48), "a post-norm model"),
    "t5": (transformers.AutoModelForSeq2SeqLM, lambda: transformers.T5Config(
        vocab_size=50, num_layers=2, d_model=32, num_heads=4, d_kv=8, d_ff=48, pad_token_id=1), "one stack of `blocks`"),
}


@pytest.mark.parametrize("name", _UNSUPPORTED)
def test_models_without_additive_blocks_are_refused_clearly(name: str, tmp_path: Path) -> None:
    auto, config, message = _UNSUPPORTED[name]
    try:
        model = bridge(auto.from_config(config()).eval(), tmp_path)
    except Exception as error:  # whether TransformerLens loads it offline is not this library's business
        pytest.skip(f"this TransformerLens does not boot a local {name}: {error}")
    before = n_hooks(model)
    with pytest.raises(ValueError, match=message):
        tlnp.add_node_masks(model)
    assert n_hooks(model) == before


@pytest.mark.parametrize(("kind", "granularity", "message"), [
    ("deepseek_v2", "head", "blocks.0.attn.hook_z is cut into 8 parts of 4, and the attention has 4 heads"),
    ("deepseek_v2", "attn_neuron", "blocks.0.attn.hook_z is cut into 8 parts of 4, and the attention has 4 heads"),
    ("granitemoe", "mlp_neuron", "blocks.0.mlp.hook_post is not what one weight matrix reads, as in a mixture of experts"),
    ("mamba", "attn", "TransformerLens has no blocks.0.hook_attn_out there"),
])
def test_what_an_architecture_lacks_is_refused_with_the_reason(kind: str, granularity: str, message: str) -> None:
    model = bridge_of(hf_family(kind))
    before = n_hooks(model)
    with pytest.raises(ValueError, match=f"this model has no '{granularity}' nodes .{message}"):
        tlnp.add_node_masks(model, [granularity])
    assert n_hooks(model) == before
    masks = tlnp.add_node_masks(model, ["layer"])
    assert masks.space.granularities == ("layer",)
    masks.remove()


def test_layers_of_a_hybrid_have_the_nodes_of_their_kind() -> None:
    model = bridge_of(hf_family("lfm2"))
    space = find_nodes(model)
    assert {key.layer for key in space.shapes if key.granularity in ("attn", "head", "attn_neuron")} == {1}
    assert {key.layer for key in space.shapes if key.granularity in ("layer", "mlp", "mlp_neuron", "mlp_out")} == {0, 1, 2}
    assert not space.covered(GateKey("layer", 0)) and space.covered(GateKey("layer", 1)), "a convolution lives on without its MLP"
    with pytest.raises(ValueError, match=r"layers=\[0\] have no node of granularity .*hook_z"):
        tlnp.add_node_masks(model, ["head"], layers=[0])
    circuit = tlnp.Circuit.full(space)
    parameters = {name: sum(n for kind, _, n in space.weights if kind == name) for name in ("attn", "mlp", "layer")}
    assert circuit.parameters == sum(parameters.values()) and parameters["layer"] > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "granitemoe", "gemma4_text"])
def test_half_precision_has_the_same_nodes(kind: str, dtype: torch.dtype) -> None:
    assert find_nodes(bridge_of(hf_family(kind)).to(dtype)).shapes == find_nodes(bridge_of(hf_family(kind))).shapes


def test_a_probe_that_fails_says_so(tmp_path: Path) -> None:
    model = bridge(hf_model("gpt2"), tmp_path)
    point = model.hook_dict["blocks.0.hook_resid_pre"]

    def beyond(activation: Tensor, hook: Any) -> Tensor:
        activation[:, 5] += 1
        return activation

    point.add_hook(beyond)
    with pytest.raises(ValueError, match="forward fails on 3 tokens.*IndexError.*hooks of your own on it"):
        tlnp.add_node_masks(model)
    assert n_hooks(model) == 1
    model.reset_hooks()


def test_every_hugging_face_architecture_is_covered() -> None:
    assert set(HF_CONFIGS) < set(ARCHITECTURES)
