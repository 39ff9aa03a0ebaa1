"""Pictures show the circuit's own numbers."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
import torch

import tl_nodeprune as tlnp
from tl_nodeprune.hooks import find_nodes
from tl_nodeprune.nodes import GRANULARITIES

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
    source = tlnp.viz.kept_neurons(model, circuit, prompts, prompt=0, most=5).local_src
    assert "&lt;s&gt;" in source and '"<s>"' not in source
    props = props_of(source)
    _, cache = model.run_with_cache(prompts[0].clean)
    shown = circuit.live("mlp_neuron", 1).nonzero()[:5, 0].tolist()
    columns = [props["secondDimensionLabels"].index(f"1.{neuron}") for neuron in shown]
    values = np.array(props["activations"]).reshape(15, -1)  # one prompt, padding left out
    np.testing.assert_allclose(values[:, columns], cache["blocks.1.mlp.hook_post"][0, :15][:, shown].numpy(), atol=1e-5)
    assert len(props["tokens"]) == 15


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


def test_errors(toy: Toy) -> None:
    model, prompts = toy
    with pytest.raises(ValueError, match="no live MLP neuron"):
        tlnp.viz.kept_neurons(model, some_circuit(model, ("head",)), prompts)
    with pytest.raises(ValueError, match="no live MLP neuron"):
        tlnp.viz.kept_neurons(model, tlnp.Circuit.empty(find_nodes(model)), prompts)
    with pytest.raises((ValueError, IndexError), match="prompt 99 does not exist; there are 24"):
        tlnp.viz.kept_neurons(model, some_circuit(model), prompts, prompt=99)
    bad = tlnp.PromptPairs(prompts.clean + 500, prompts.corrupted, prompts.answers, prompts.wrong_answers)
    with pytest.raises(ValueError, match="clean holds token id .* vocabulary ends at 198"):
        tlnp.viz.kept_neurons(model, some_circuit(model), bad)
