"""Pictures show the circuit's own numbers."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
import torch

import tl_nodeprune as tlnp
from tl_nodeprune.nodes.probe import find_nodes
from tl_nodeprune.nodes.space import GRANULARITIES
from tl_nodeprune.viz.tokens import position_effects

Toy = tuple[Any, tlnp.PromptPairs]


def some_circuit(model: Any, granularities: Any = None, layers: Any = None) -> tlnp.Circuit:
    space, g = find_nodes(model).restrict(granularities, layers), torch.Generator().manual_seed(0)
    return tlnp.Circuit(space, {key: torch.rand(shape, generator=g) < 0.7 for key, shape in space.shapes.items()})


def test_mask_map_shows_live_shares(toy: Toy) -> None:
    circuit = some_circuit(toy[0])
    fig = tlnp.viz.mask_map(circuit)
    assert isinstance(fig, go.Figure) and len(fig.data) == 2
    want = [[float(circuit.live(name, layer).float().mean()) for name in GRANULARITIES] for layer in range(3)]
    np.testing.assert_allclose(np.array(fig.data[1].z, dtype=float), want, atol=1e-6)
    heads = [circuit[f"blocks.{layer}.attn.hook_z"].mean(1).tolist() for layer in range(3)]
    np.testing.assert_allclose(np.array(fig.data[0].z, dtype=float), heads, atol=1e-6)
    assert f"{circuit.size:,} of {circuit.size_total:,}" in fig.layout.title.text


def test_mask_map_of_few_granularities(toy: Toy) -> None:
    fig = tlnp.viz.mask_map(some_circuit(toy[0], ("mlp", "mlp_out"), [1, 2]))
    assert len(fig.data) == 1 and np.array(fig.data[0].z).shape == (2, 2) and list(fig.data[0].y) == ["1", "2"]


def props_of(source: str) -> dict[str, Any]:
    """The JSON that circuitsvis hands to its component."""
    start = source.rindex('"tokens"')
    start = source.rindex("{", 0, start)
    return json.JSONDecoder().raw_decode(source[start:])[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("layers", [None, [1]])
def test_kept_neurons(toy: Toy, layers: Any) -> None:
    model, prompts = toy
    circuit = some_circuit(model, ("mlp_neuron",), layers)
    source = tlnp.viz.kept_neurons(model, circuit, prompts, prompt=0, most=400).local_src
    assert "&lt;s&gt;" in source and '"<s>"' not in source
    props = props_of(source)
    shown = [int(label.split(".")[1]) for label in props["secondDimensionLabels"] if label.startswith("1.")]
    assert len(shown) > 100 and all(circuit.live("mlp_neuron", 1)[shown])
    columns = [props["secondDimensionLabels"].index(f"1.{neuron}") for neuron in shown]
    for run, tokens in enumerate((prompts[0].clean, prompts[0].corrupted)):  # clean first, padding left out
        _, cache = model.run_with_cache(tokens)
        values = np.array(props["activations"][run]).reshape(15, -1)
        np.testing.assert_allclose(values[:, columns], cache["blocks.1.mlp.hook_post"][0, :15][:, shown].numpy(), atol=1e-5)
    assert [len(tokens) for tokens in props["tokens"]] == [15, 15]


def test_kept_neurons_with_masks_still_attached(toy: Toy) -> None:
    """`prune` leaves the masks attached at the circuit; a look at it must not need them off."""
    model, prompts = toy
    masks = model.add_node_masks()
    try:
        circuit = some_circuit(model)
        masks.set_to(circuit)
        assert "&lt;s&gt;" in tlnp.viz.kept_neurons(model, circuit, prompts).local_src
    finally:
        model.remove_node_masks()


@pytest.mark.parametrize("live", [True, False])
def test_the_strongest_neurons_that_were_kept_or_cut_are_shown(toy: Toy, live: bool) -> None:
    model, prompts = toy
    circuit = some_circuit(model, ("mlp_neuron",))
    view = tlnp.viz.kept_neurons if live else tlnp.viz.pruned_neurons
    source = view(model, circuit, prompts, prompt=3, most=7).local_src
    shown = [tuple(map(int, label.split("."))) for label in props_of(source)["secondDimensionLabels"]]
    real = prompts.attention_mask[3]  # type: ignore[index]
    runs = [model.run_with_cache(tokens)[1] for tokens in (prompts[3].clean, prompts[3].corrupted)]
    peak = {layer: torch.stack([run[f"blocks.{layer}.mlp.hook_post"][0, real].abs().amax(0) for run in runs]).amax(0) for layer in range(3)}
    nodes = [(layer, i) for layer in range(3) for i in range(384) if bool(circuit.live("mlp_neuron", layer)[i]) == live]
    strongest = sorted(nodes, key=lambda node: -float(peak[node[0]][node[1]]))
    assert shown == strongest[:7]
    kind = "live" if live else "pruned"
    assert f"The 7 strongest of {len(nodes):,} {kind} MLP neurons; the {len(nodes) - 7:,} left out stay within" in source


@pytest.mark.parametrize("granularities", [None, ("head",), ("attn_neuron",)])
def test_kept_heads(toy: Toy, granularities: Any) -> None:
    model, prompts = toy
    circuit = some_circuit(model, granularities)
    source = tlnp.viz.kept_heads(model, circuit, prompts, most=2).local_src
    props = props_of(source)
    _, cache = model.run_with_cache(prompts[0].clean)
    gates = {(layer, head): float(circuit[f"blocks.{layer}.attn.hook_z"][head].mean()) for layer in range(3) for head in range(4)}
    largest = sorted(sorted(gates, key=lambda node: -gates[node])[:2])
    assert props["attentionHeadNames"] == [f"{layer}.{head} ({gates[layer, head]:.2f})" for layer, head in largest]
    for pattern, (layer, head) in zip(props["attention"], largest, strict=True):
        np.testing.assert_allclose(pattern, cache[f"blocks.{layer}.attn.hook_pattern"][0, head, :15, :15].numpy(), atol=1e-5)
    assert props["tokens"][0] == "<s>" and "<s>" not in source and "&lt;s&gt; Wh" in source  # drawn as text; the caption is markup


def test_token_effects_of_the_full_model_by_hand(toy: Toy) -> None:
    """All heads ablated at one position, by TransformerLens alone."""
    model, prompts = toy
    one, hooks = prompts[0], [f"blocks.{layer}.attn.hook_z" for layer in range(3)]
    _, corrupted = model.run_with_cache(one.corrupted)
    at = one.answer_positions

    def without(position: int) -> float:
        def patch(z: torch.Tensor, hook: Any, name: str) -> torch.Tensor:
            z = z.clone()
            z[:, position] = corrupted[name][:, position]
            return z
        logits = model.run_with_hooks(one.clean, fwd_hooks=[(name, partial(patch, name=name)) for name in hooks])
        return float(one.logit_diff(logits[[0], at])[0])

    with torch.no_grad():
        base = float(one.logit_diff(model(one.clean)[[0], at])[0])
        want = [base - without(position) for position in range(15)] + [0.0, 0.0]
    effects = position_effects(model, tlnp.Circuit.full(find_nodes(model).restrict(("head",))), one, batch_size=4)
    np.testing.assert_allclose(effects, want, atol=2e-5)
    assert max(map(abs, want)) > 1


def test_token_effects_are_zero_before_the_prompts_differ_and_say_what_they_are(toy: Toy) -> None:
    model, prompts = toy
    circuit = some_circuit(model)
    first = int((prompts[0].clean != prompts[0].corrupted)[0].long().argmax())
    effects = position_effects(model, circuit, prompts[0])
    assert first > 0 and (effects[:first].abs() < 1e-6).all() and effects.abs().max() > 1e-3
    props = props_of(tlnp.viz.token_effects(model, circuit, prompts).local_src)
    full = position_effects(model, tlnp.Circuit.full(circuit.space), prompts[0])
    np.testing.assert_allclose(props["values"], [0, *effects[:15], 0, 0, *full[:15]], atol=1e-6)
    assert props["tokens"][:3] == ["circuit: ", "&lt;s&gt;", " While"] and len(props["tokens"]) == len(props["values"])
    assert -props["minValue"] == props["maxValue"] == pytest.approx(float(torch.cat([effects, full]).abs().max()))


@pytest.mark.parametrize("ablation", ["zero", "mean", "optimal"])
def test_token_effects_under_the_circuits_own_ablation(toy: Toy, ablation: str) -> None:
    model, prompts = toy
    space = find_nodes(model).restrict(("mlp",))
    fitted = tlnp.Ablation(ablation).fit(model, prompts, space.hooks)
    effects = position_effects(model, tlnp.Circuit.full(space, fitted), prompts[0])
    assert effects.shape == (17,) and effects[:15].abs().min() >= 0 and effects[0] != 0  # not only where the prompts differ
    layer = position_effects(model, tlnp.Circuit.full(find_nodes(model).restrict(("layer",))), prompts[0])
    assert layer.abs().max() > 1


def test_a_model_without_a_tokenizer_shows_token_ids(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = toy
    circuit = tlnp.Circuit.full(find_nodes(model))
    monkeypatch.setattr(model, "tokenizer", None)
    for view in (tlnp.viz.kept_neurons, tlnp.viz.kept_heads, tlnp.viz.token_effects):
        shown = view(model, circuit, prompts).local_src
        assert all(f'" {token}"' in shown for token in prompts.clean[0][prompts.attention_mask[0]].tolist()), view.__name__


def test_a_report_is_shown_as_its_circuit(toy: Toy) -> None:
    model, prompts = toy
    circuit = tlnp.Circuit.full(find_nodes(model).restrict(["head", "mlp"]))
    report = tlnp.report(model, circuit, prompts, n_random=2, n_subsets=1, max_units=1, progress=False)
    assert report.circuit is circuit and tlnp.viz.mask_map(report) == tlnp.viz.mask_map(circuit)
    assert any(item == str(report) for item in tlnp.viz.overview(model, report, prompts) if isinstance(item, str))


def test_views_need_no_network(toy: Toy) -> None:
    """circuitsvis alone looks for a network, and then loads its JavaScript from there."""
    view = tlnp.viz.kept_neurons(*toy[:1], some_circuit(toy[0]), toy[1])
    assert view._repr_html_() == view.local_src == str(view) and "unpkg" not in str(view)


def test_errors(toy: Toy, other_model: Any) -> None:
    model, prompts = toy
    with pytest.raises(ValueError, match="no live MLP neuron"):
        tlnp.viz.kept_neurons(model, some_circuit(model, ("head",)), prompts)
    with pytest.raises(ValueError, match="no live MLP neuron"):
        tlnp.viz.kept_neurons(model, tlnp.Circuit.empty(find_nodes(model)), prompts)
    with pytest.raises((ValueError, IndexError), match="prompt 99 does not exist; there are 24"):
        tlnp.viz.kept_neurons(model, some_circuit(model), prompts, prompt=99)
    with pytest.raises(ValueError, match="no pruned MLP neuron"):
        tlnp.viz.pruned_neurons(model, tlnp.Circuit.full(find_nodes(model)), prompts)
    with pytest.raises(ValueError, match="keeps no head"):
        tlnp.viz.kept_heads(model, some_circuit(model, ("mlp",)), prompts)
    circuit = some_circuit(model)
    for view in (tlnp.viz.kept_neurons, tlnp.viz.pruned_neurons, tlnp.viz.kept_heads, tlnp.viz.token_effects):
        with pytest.raises(TypeError, match="circuit must be a Circuit, a PruneResult or a Report, got str; .*Circuit.load"):
            view(model, "circuit.safetensors", prompts)  # type: ignore[operator]
        with pytest.raises(TypeError, match="prompts must be PromptPairs, got list"):
            view(model, circuit, ["Mary"])  # type: ignore[operator]
        with pytest.raises(ValueError, match="found on another model"):
            view(other_model, circuit, prompts)  # type: ignore[operator]
        with circuit.applied(model, prompts), pytest.raises(RuntimeError, match="a circuit is applied"):
            view(model, circuit, prompts)  # type: ignore[operator]
    with pytest.raises(ValueError, match="most=0; it must be a whole number, 1 or more"):
        tlnp.viz.kept_heads(model, some_circuit(model), prompts, most=0)
    bad = tlnp.PromptPairs(prompts.clean + 500, prompts.corrupted, prompts.answers, prompts.wrong_answers)
    with pytest.raises(ValueError, match="clean holds token id .* vocabulary ends at 198"):
        tlnp.viz.kept_neurons(model, some_circuit(model), bad)


def test_a_long_prompt_stays_small_in_a_notebook(toy: Toy) -> None:
    """Four hundred tokens: what is drawn is capped, and the captions say so."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = GPT2Config(n_layer=4, n_head=12, n_embd=48, n_positions=400, vocab_size=199, attn_implementation="eager")
        hf = GPT2LMHeadModel(config).eval()
        model = TransformerBridge.boot_transformers("gpt2", hf_model=hf, tokenizer=toy[0].tokenizer, device="cpu").eval()
        clean, corrupted = torch.randint(3, 199, (2, 1, 400))
    prompts = tlnp.PromptPairs(clean, corrupted, torch.tensor([3]), torch.tensor([4]))
    circuit = tlnp.Circuit.full(find_nodes(model).restrict(["head", "mlp_neuron"]))
    views = {make.__name__: str(make(model, circuit, prompts)) for make in (tlnp.viz.kept_heads, tlnp.viz.kept_neurons)}
    assert {name: len(view) < 3e6 for name, view in views.items()} == dict.fromkeys(views, True), {n: len(v) for n, v in views.items()}
    assert "the largest gates of 48, on the last 100 of 400 tokens" in views["kept_heads"]
