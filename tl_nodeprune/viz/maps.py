"""Maps, layer by layer: what a circuit keeps, and which neurons."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from einops import reduce
from plotly.colors import sequential
from plotly.subplots import make_subplots

from tl_nodeprune.circuit import Circuit
from tl_nodeprune.nodes import GateKey, check_types, node_name
from tl_nodeprune.viz.values import (
    DIVERGING,
    NEURONS,
    TITLES,
    HasCircuit,
    Values,
    check_values,
    circuit_of,
    colorbar,
    effect_of,
    heading,
    height,
    hover,
    nodes_frame,
    score_of,
)

PRUNED = "rgba(128,128,128,0.15)"  # on a light and on a dark background


def mask_map(circuit: HasCircuit, *, scores: Values | None = None, effects: Values | None = None, task: str = "") -> go.Figure:
    """What is live, layer by layer: a heatmap of heads (share of each head's dims), and one of the live share of every granularity:
    blocks are there or not, of heads and neurons it is the share of the layer's.

    Raises: TypeError for what is not a circuit or mapping; ValueError for scores or effects of other hooks or shapes.
    """
    check_types(mask_map, locals())
    circuit = _checked(circuit, scores, effects)
    space, layers = circuit.space, [str(layer) for layer in circuit.space.layers]
    heads, last = head_shares(circuit), 1
    titles = ["live share of each head's dims", "live share of the layer's nodes, %"][heads is None:]
    fig = make_subplots(rows=1, cols=len(titles), horizontal_spacing=0.08, subplot_titles=titles)
    common = {"y": layers, "xgap": 1, "ygap": 1, "coloraxis": "coloraxis", "hovertemplate": "%{hovertext}<extra></extra>"}
    if heads is not None:
        last = 2
        words = [_head_texts(circuit, layer, heads.shape[1], scores, effects) for layer in space.layers]
        fig.add_trace(go.Heatmap(z=heads, x=[str(i) for i in range(heads.shape[1])], hovertext=words, name="heads", **common), row=1, col=1)
        fig.update_xaxes(title_text="head", row=1, col=1)
    names = space.granularities
    shares = np.array([[_share(circuit, GateKey(name, layer)) for name in names] for layer in space.layers], dtype=float)
    words = [[_share_text(circuit, GateKey(name, layer), scores, effects) for name in names] for layer in space.layers]
    text = [[f"{share:.2g}" if 0 < (share := 100 * value) < 10 else f"{share:.0f}" if share > 0 else "" for value in row] for row in shares]
    fig.add_trace(go.Heatmap(z=shares, x=[TITLES[name] for name in names], hovertext=words, text=text, texttemplate="%{text}",
                             textfont={"size": 10}, name="granularities", **common), row=1, col=last)
    fig.update_yaxes(title_text="layer", type="category", showgrid=False, col=1)
    fig.update_yaxes(type="category", showgrid=False, col=2)
    fig.update_xaxes(type="category", showgrid=False)
    bar = colorbar("live") | {"tickformat": ".0%"}
    return fig.update_layout(coloraxis={"colorscale": live_scale(), "cmin": 0, "cmax": 1, "colorbar": bar},
                             height=height(len(layers)), margin={"t": 90}, title=heading("Live nodes", circuit, task))


def neuron_map(circuit: HasCircuit, granularity: str | None = None, *, scores: Values | None = None,
               effects: Values | None = None, task: str = "") -> go.Figure:
    """Every live neuron as a tick at its index, layer by layer (zoom in to tell them apart), beside the live share of each layer.
    Colour: the effect where effects are given, else the score where scores are.

    granularity: "mlp_neuron", "attn_neuron" (index = head * d_head + dim) or "mlp_out"; None: the first of these that is gated.
    Raises: ValueError where the circuit has no such nodes, or none of them is live; and as `mask_map`.
    """
    check_types(neuron_map, locals())
    circuit = _checked(circuit, scores, effects)
    name = _neurons(circuit, granularity)
    nodes = nodes_frame(circuit, name, scores=scores, effects=effects)
    live = nodes[nodes["live"]]
    if live.empty:
        raise ValueError(f"none of the {len(nodes):,} {TITLES[name]} of this circuit is live; there is nothing to show.")
    layers = list(circuit.space.layers)
    fig = make_subplots(rows=1, cols=2, shared_yaxes=True, column_widths=[0.84, 0.16], horizontal_spacing=0.02)
    marker = {"symbol": "line-ns-open", "size": 11, "line": {"width": 1.5}} | _coloured(live)
    fig.add_trace(go.Scattergl(x=live["flat"].to_numpy(), y=live["layer"].to_numpy(), mode="markers", marker=marker, name=TITLES[name],
                               **hover(name, live)), row=1, col=1)
    per_layer = nodes.groupby("layer")["live"].agg(["sum", "count"])
    told = "layer %{y}: %{customdata[0]:,d} of %{customdata[1]:,d} live (%{x:.2%})<extra></extra>"
    fig.add_trace(go.Bar(x=(per_layer["sum"] / per_layer["count"]).to_numpy(), y=per_layer.index.to_numpy(), orientation="h",
                         customdata=per_layer.to_numpy(), hovertemplate=told, marker={"color": sequential.Tealgrn[-1]}, name="live share"),
                  row=1, col=2)
    fig.update_xaxes(title_text=f"{TITLES[name]}, index", range=[-0.5, nodes["flat"].max() + 0.5], row=1, col=1)
    fig.update_xaxes(title_text="live share", tickformat=".1~%", nticks=3, rangemode="tozero", row=1, col=2)
    fig.update_yaxes(range=[min(layers) - 0.7, max(layers) + 0.7], showgrid=False, zeroline=False, tickvals=layers)
    fig.update_yaxes(title_text="layer", row=1, col=1)
    what = f"Live {TITLES[name]}: {len(live):,} of {len(nodes):,}"
    return fig.update_layout(height=height(len(layers)), showlegend=False, margin={"t": 70}, title=heading(what, circuit, task))


def _checked(circuit: HasCircuit, scores: Values | None, effects: Values | None) -> Circuit:
    circuit = circuit_of(circuit)
    check_values(circuit, scores, "scores")
    check_values(circuit, effects, "effects")
    return circuit


def _neurons(circuit: Circuit, granularity: str | None) -> str:
    have = [name for name in NEURONS if name in circuit.space.granularities]
    if granularity is not None and granularity not in NEURONS:
        raise ValueError(f"granularity={granularity!r}; neuron_map shows {', '.join(NEURONS)}.")
    if not have or granularity is not None and granularity not in have:
        raise ValueError(f"this circuit has no {granularity or 'neuron'} nodes; it has {', '.join(circuit.space.granularities)}.")
    return granularity or have[0]


def _coloured(nodes: pd.DataFrame) -> dict[str, Any]:
    """Marker settings for colour by effect, or by score; none where there is neither."""
    for name in ("effect", "score"):
        if nodes[name].notna().any():
            scale = {"colorscale": DIVERGING, "cmid": 0} if name == "effect" else {"colorscale": "Viridis"}
            return {"color": nodes[name].to_numpy(), "colorbar": colorbar(name), "showscale": True} | scale
    return {"color": sequential.Tealgrn[-1]}


def live_scale(nothing: str = PRUNED) -> list[list[Any]]:
    """Grey at 0, then plotly's Tealgrn."""
    colours = sequential.Tealgrn
    return [[0, nothing], [1e-6, nothing], *([max(i / (len(colours) - 1), 1e-6), colour] for i, colour in enumerate(colours))]


def _share(circuit: Circuit, key: GateKey) -> float:
    return float(circuit.live(*key).float().mean()) if key in circuit.space.shapes else float("nan")


def _share_text(circuit: Circuit, key: GateKey, scores: Values | None, effects: Values | None) -> str:
    if key not in circuit.space.shapes:
        return f"{key.granularity} {key.layer}: not gated"
    live = circuit.live(*key)
    if not live.ndim:
        return f"{node_name(*key)}: {'live' if live else 'pruned'}{values_texts(circuit, key, scores, effects)[0]}"
    return f"layer {key.layer}: {int(live.sum()):,} of {live.numel():,} {TITLES[key.granularity]} live ({float(live.float().mean()):.1%})"


def _head_texts(circuit: Circuit, layer: int, n: int, scores: Values | None, effects: Values | None) -> list[str]:
    hook, key = f"blocks.{layer}.attn.hook_z", GateKey("head", layer)
    mask = circuit[hook] if hook in circuit else torch.zeros(0, 1, dtype=torch.float32)
    values = values_texts(circuit, key, scores, effects) if key in circuit.space.present else [""] * n
    known = [f"{node_name(*key, i)}: {int(dims.sum())} of {len(dims)} dims live{values[i]}" for i, dims in enumerate(mask)]
    return known + [f"{node_name(*key, i)}: not gated" for i in range(len(known), n)]


def values_texts(circuit: Circuit, key: GateKey, scores: Values | None, effects: Values | None) -> list[str]:
    """Score and effect of every node of a gate tensor, where there are any, as lines to follow its name."""
    found = {"score": score_of(circuit, key, scores), "effect": effect_of(circuit, key, effects)}
    lines = [[f"<br>{name} {number:.4g}" for number in value.flatten().tolist()] for name, value in found.items() if value is not None]
    return ["".join(parts) for parts in zip(*lines, strict=True)] if lines else [""] * math.prod(circuit.space.present[key])


def head_shares(circuit: Circuit) -> np.ndarray | None:
    """The live share of each head's dims, [layer head]; NaN where a layer has no such head; None where no head is gated."""
    rows = {layer: reduce(circuit[hook], "head d_head -> head", "mean").numpy() for layer in circuit.space.layers
            if (hook := f"blocks.{layer}.attn.hook_z") in circuit}
    if not rows:
        return None
    table = np.full((len(circuit.space.layers), max(map(len, rows.values()))), np.nan)
    for i, layer in enumerate(circuit.space.layers):
        if layer in rows:
            table[i, :len(rows[layer])] = rows[layer]
    return table
