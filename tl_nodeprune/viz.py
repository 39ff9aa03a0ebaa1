"""Pictures of a circuit: plotly figures and circuitsvis views, each returned for you to restyle or save."""

from __future__ import annotations

import html
from typing import Any

import circuitsvis as cv
import numpy as np
import plotly.graph_objects as go
import torch
from circuitsvis.utils.render import RenderedHTML
from einops import reduce
from plotly.subplots import make_subplots

from tl_nodeprune.circuit import Circuit
from tl_nodeprune.hooks import capture
from tl_nodeprune.masks import masks_off
from tl_nodeprune.nodes import GRANULARITIES
from tl_nodeprune.prompts import PromptPairs

_TITLES = {"layer": "layers", "attn": "attention blocks", "mlp": "MLP blocks", "head": "heads", "attn_neuron": "attention neurons",
           "mlp_neuron": "MLP neurons", "mlp_out": "MLP output dims"}


def mask_map(circuit: Circuit) -> go.Figure:
    """What is live, layer by layer: a heatmap of heads, and one of the live share of every granularity."""
    space, layers = circuit.space, [str(layer) for layer in circuit.space.layers]
    names = [name for name in GRANULARITIES if name in space.granularities]
    shares = np.array([[_share(circuit, name, layer) for name in names] for layer in space.layers], dtype=float)
    heads = _heads(circuit)
    fig = make_subplots(rows=1, cols=2 if heads is not None else 1, horizontal_spacing=0.12,
                        subplot_titles=[*(["live share of each head"] if heads is not None else []), "live share by granularity"])
    common = {"zmin": 0, "zmax": 1, "colorscale": "Blues", "xgap": 1, "ygap": 1, "coloraxis": "coloraxis"}
    if heads is not None:
        fig.add_trace(go.Heatmap(z=heads, y=layers, x=[str(i) for i in range(heads.shape[1])], **common,
                                 hovertemplate="layer %{y}, head %{x}: %{z:.0%} of its dims live<extra></extra>"), row=1, col=1)
        fig.update_xaxes(title_text="head", row=1, col=1)
    fig.add_trace(go.Heatmap(z=shares, y=layers, x=[_TITLES[name] for name in names], **common,
                             hovertemplate="layer %{y}, %{x}: %{z:.1%} live<extra></extra>"), row=1, col=2 if heads is not None else 1)
    fig.update_yaxes(title_text="layer", type="category")
    fig.update_xaxes(type="category")
    fig.update_layout(coloraxis={"colorscale": "Blues", "cmin": 0, "cmax": 1, "colorbar": {"title": "live", "tickformat": ".0%"}},
                      title=f"{circuit.size:,} of {circuit.size_total:,} leaf nodes live ({circuit.ablation.name} ablation)")
    return fig


def kept_neurons(model: Any, circuit: Circuit, prompts: PromptPairs, *, prompt: int = 0, most: int = 50) -> RenderedHTML:
    """circuitsvis view of the live MLP neurons' activations on one clean prompt, each labelled layer.neuron.

    prompt: which of the prompts. most: neurons shown per layer at most, the lowest indices first.
    Raises: ValueError where the circuit has no live MLP neuron, or the circuit or the prompt does not fit the model; IndexError
    where there is no such prompt; RuntimeError where a circuit is applied.
    """
    if "mlp_neuron" not in circuit.space.granularities or not circuit.nodes("mlp_neuron"):
        raise ValueError("this circuit has no live MLP neuron to show.")
    one = prompts[prompt]
    layers = sorted({layer for layer, _ in circuit.nodes("mlp_neuron")})
    with masks_off(model):
        circuit.check_fits(model)
        one.check_fits(model)
        seen = capture(model, one.clean, [f"blocks.{layer}.mlp.hook_post" for layer in layers])
    assert one.attention_mask is not None
    real = one.attention_mask[0]
    picked = [(layer, int(i)) for layer in layers for i in circuit.live("mlp_neuron", layer).nonzero()[:most, 0]]
    columns = [seen[f"blocks.{layer}.mlp.hook_post"][0, real, i].float().cpu() for layer, i in picked]
    return cv.activations.text_neuron_activations(
        tokens=[html.escape(token) for token in model.to_str_tokens(one.clean[0][real])],
        activations=torch.stack(columns, dim=1).unsqueeze(1), first_dimension_name="Nodes", first_dimension_labels=["live MLP neurons"],
        second_dimension_name="Layer.neuron", second_dimension_labels=[f"{layer}.{i}" for layer, i in picked])


def _share(circuit: Circuit, granularity: str, layer: int) -> float:
    if (granularity, layer) not in circuit.space.shapes:
        return float("nan")
    return float(circuit.live(granularity, layer).float().mean())


def _heads(circuit: Circuit) -> np.ndarray | None:
    rows = [reduce(circuit[hook], "head d_head -> head", "mean").numpy() for hook in circuit if hook.endswith("hook_z")]
    if not rows or len({len(row) for row in rows}) != 1 or len(rows) != len(circuit.space.layers):
        return None
    return np.stack(rows)
