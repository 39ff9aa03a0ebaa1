"""Maps, layer by layer: what a circuit keeps, which neurons, and what two circuits share."""

from __future__ import annotations

import html
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
from tl_nodeprune.nodes import GateKey
from tl_nodeprune.pruning import PruneResult
from tl_nodeprune.viz.values import (
    DIVERGING,
    NEURONS,
    TITLES,
    Values,
    check_values,
    circuit_of,
    effect_of,
    heading,
    height,
    hover,
    name_of,
    nodes_frame,
    score_of,
    title,
)

_PRUNED = "rgba(128,128,128,0.15)"  # on a light and on a dark background
_ONLY_A, _ONLY_B, _BOTH = "#4C78A8", "#F58518", "#54A24B"  # plotly.colors.qualitative.T10


def mask_map(circuit: Circuit | PruneResult, *, scores: Values | None = None, effects: Values | None = None, task: str = "") -> go.Figure:
    """What is live, layer by layer: a heatmap of heads (share of each head's dims), and one of the live share of every granularity:
    blocks are there or not, of heads and neurons it is the share of the layer's.

    Raises: TypeError for what is no circuit or no mapping; ValueError for scores or effects of other hooks or shapes.
    """
    circuit = _checked(circuit, scores, effects)
    space, layers = circuit.space, [str(layer) for layer in circuit.space.layers]
    heads, last = _heads(circuit), 1
    titles = ["share of each head's dims", "share of the layer's nodes"][heads is None:]
    fig = make_subplots(rows=1, cols=len(titles), horizontal_spacing=0.08, subplot_titles=titles)
    common = {"y": layers, "xgap": 1, "ygap": 1, "coloraxis": "coloraxis", "hovertemplate": "%{text}<extra></extra>"}
    if heads is not None:
        last = 2
        text = [_head_texts(circuit, layer, heads.shape[1], scores, effects) for layer in space.layers]
        fig.add_trace(go.Heatmap(z=heads, x=[str(i) for i in range(heads.shape[1])], text=text, name="heads", **common), row=1, col=1)
        fig.update_xaxes(title_text="head", row=1, col=1)
    names = space.granularities
    shares = np.array([[_share(circuit, GateKey(name, layer)) for name in names] for layer in space.layers], dtype=float)
    text = [[_share_text(circuit, GateKey(name, layer), scores, effects) for name in names] for layer in space.layers]
    fig.add_trace(go.Heatmap(z=shares, x=[TITLES[name] for name in names], text=text, name="granularities", **common), row=1, col=last)
    fig.update_yaxes(title_text="layer", type="category", showgrid=False, col=1)
    fig.update_yaxes(type="category", showgrid=False, col=2)
    fig.update_xaxes(type="category", showgrid=False)
    bar = {"title": "live", "tickformat": ".0%"}
    return fig.update_layout(coloraxis={"colorscale": _live_scale(), "cmin": 0, "cmax": 1, "colorbar": bar},
                             height=height(len(layers)), margin={"t": 110}, title=heading("Live nodes", circuit, task))


def neuron_map(circuit: Circuit | PruneResult, granularity: str | None = None, *, scores: Values | None = None,
               effects: Values | None = None, task: str = "") -> go.Figure:
    """Every live neuron as a tick at its index, layer by layer (zoom in to tell them apart), beside the live share of each layer.
    Colour: the effect where effects are given, else the score where scores are.

    granularity: "mlp_neuron", "attn_neuron" (index = head * d_head + dim) or "mlp_out"; None: the first of these that is gated.
    Raises: ValueError where the circuit has no such nodes, or none of them is live; and as `mask_map`.
    """
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
    fig.add_trace(go.Bar(x=(per_layer["sum"] / per_layer["count"]).to_numpy(), y=per_layer.index.to_numpy(), orientation="h", name="live share",
                         customdata=per_layer.to_numpy(), marker={"color": sequential.Tealgrn[-1]},
                         hovertemplate="layer %{y}: %{customdata[0]:,d} of %{customdata[1]:,d} live (%{x:.2%})<extra></extra>"), row=1, col=2)
    fig.update_xaxes(title_text=f"{TITLES[name]}, index", range=[-0.5, nodes["flat"].max() + 0.5], row=1, col=1)
    fig.update_xaxes(title_text="live share", tickformat=".1~%", nticks=3, rangemode="tozero", row=1, col=2)
    fig.update_yaxes(range=[min(layers) - 0.7, max(layers) + 0.7], showgrid=False, zeroline=False)
    fig.update_yaxes(title_text="layer", row=1, col=1)
    what = f"Live {TITLES[name]}: {len(live):,} of {len(nodes):,}"
    return fig.update_layout(height=height(len(layers)), showlegend=False, margin={"t": 100}, title=heading(what, circuit, task))


def compare(circuit_a: Circuit | PruneResult, circuit_b: Circuit | PruneResult, *, names: tuple[str, str] = ("a", "b"),
            task: str = "") -> go.Figure:
    """What two circuits over the same nodes share: a map of heads (in both, in one, in neither), and the intersection over union of
    live nodes by layer and granularity; blank where neither has a node.

    Raises: TypeError for what is no circuit; ValueError where the two are over different nodes.
    """
    a, b = circuit_of(circuit_a, "circuit_a"), circuit_of(circuit_b, "circuit_b")
    names = (html.escape(names[0]), html.escape(names[1]))
    iou, both = a.iou(b), (a & b).size  # iou raises where they are over different nodes
    layers, granularities = [str(layer) for layer in a.space.layers], a.space.granularities
    heads = None if (one := _heads(a)) is None else _two_of(one, _heads(b))
    titles = ["heads", "intersection over union"][heads is None:]
    fig = make_subplots(rows=1, cols=len(titles), horizontal_spacing=0.08, subplot_titles=titles)
    words = np.array(["in neither", f"only in {names[0]}", f"only in {names[1]}", "in both"])
    common = {"y": layers, "xgap": 1, "ygap": 1, "hovertemplate": "%{text}<extra></extra>"}
    if heads is not None:
        text = [[f"{name_of('head', layer, i)}: {words[int(v)]}" if v == v else "" for i, v in enumerate(row)]
                for layer, row in zip(a.space.layers, heads, strict=True)]
        fig.add_trace(go.Heatmap(z=heads, x=[str(i) for i in range(heads.shape[1])], text=text, showscale=False, zmin=0, zmax=3, name="heads",
                                 colorscale=_steps([_PRUNED, _ONLY_A, _ONLY_B, _BOTH]), **common), row=1, col=1)
        fig.update_xaxes(title_text="head", row=1, col=1)
        for word, colour in zip(words[1:], (_ONLY_A, _ONLY_B, _BOTH), strict=True):  # the heatmap's own scale has no words
            fig.add_trace(go.Scatter(x=[None], y=[None], mode="markers", marker={"symbol": "square", "size": 11, "color": colour},
                                     name=f"head {word}"), row=1, col=1)
    cells = [[_overlap(a, b, GateKey(name, layer), names) for name in granularities] for layer in a.space.layers]
    fig.add_trace(go.Heatmap(z=np.array([[cell[0] for cell in row] for row in cells]), x=[TITLES[name] for name in granularities],
                             text=[[cell[1] for cell in row] for row in cells], coloraxis="coloraxis", name="granularities", **common),
                  row=1, col=len(titles))
    fig.update_yaxes(type="category", showgrid=False)
    fig.update_yaxes(title_text="layer", col=1)
    fig.update_xaxes(type="category", showgrid=False)
    facts = f"{a.size - both:,} only in {names[0]}, {b.size - both:,} only in {names[1]}, {both:,} in both, of {a.size_total:,} leaf nodes"
    ablations = " and ".join(dict.fromkeys((a.ablation.name, b.ablation.name)))
    facts = " · ".join(part for part in (html.escape(task), facts, f"{ablations} ablation") if part)
    return fig.update_layout(
        coloraxis={"colorscale": _live_scale(), "cmin": 0, "cmax": 1, "colorbar": {"title": "IoU"}}, height=height(len(layers)),
        margin={"t": 110, "b": 110}, legend={"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom"},
        title=title(f"{names[0]} and {names[1]}: intersection over union {iou:.2f}", facts))


def _checked(circuit: Circuit | PruneResult, scores: Values | None, effects: Values | None) -> Circuit:
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
            bar = {"title": name, "thickness": 12}
            scale = {"colorscale": DIVERGING, "cmid": 0} if name == "effect" else {"colorscale": "Viridis"}
            return {"color": nodes[name].to_numpy(), "colorbar": bar, "showscale": True} | scale
    return {"color": sequential.Tealgrn[-1]}


def _live_scale() -> list[list[Any]]:
    """Grey at 0, then plotly's Tealgrn."""
    colours = sequential.Tealgrn
    return [[0, _PRUNED], [1e-6, _PRUNED], *([max(i / (len(colours) - 1), 1e-6), colour] for i, colour in enumerate(colours))]


def _steps(colours: list[str]) -> list[list[Any]]:
    n = len(colours)
    return [[edge / n, colour] for i, colour in enumerate(colours) for edge in (i, i + 1)]


def _share(circuit: Circuit, key: GateKey) -> float:
    return float(circuit.live(*key).float().mean()) if key in circuit.space.shapes else float("nan")


def _share_text(circuit: Circuit, key: GateKey, scores: Values | None, effects: Values | None) -> str:
    if key not in circuit.space.shapes:
        return f"{key.granularity} {key.layer}: not gated"
    live = circuit.live(*key)
    if not live.ndim:
        return f"{name_of(*key)}: {'live' if live else 'pruned'}{_values_texts(circuit, key, scores, effects)[0]}"
    return f"layer {key.layer}: {int(live.sum()):,} of {live.numel():,} {TITLES[key.granularity]} live ({float(live.float().mean()):.1%})"


def _head_texts(circuit: Circuit, layer: int, n: int, scores: Values | None, effects: Values | None) -> list[str]:
    hook, key = f"blocks.{layer}.attn.hook_z", GateKey("head", layer)
    mask = circuit[hook] if hook in circuit else torch.zeros(0, 1)
    values = _values_texts(circuit, key, scores, effects) if key in circuit.space.shapes else [""] * n
    known = [f"{name_of(*key, i)}: {int(dims.sum())} of {len(dims)} dims live{values[i]}" for i, dims in enumerate(mask)]
    return known + [f"{name_of(*key, i)}: not gated" for i in range(len(known), n)]


def _values_texts(circuit: Circuit, key: GateKey, scores: Values | None, effects: Values | None) -> list[str]:
    """Score and effect of every node of a gate tensor, where there are any, as lines to follow its name."""
    found = {"score": score_of(circuit, key, scores), "effect": effect_of(circuit, key, effects)}
    lines = [[f"<br>{name} {number:.4g}" for number in value.flatten().tolist()] for name, value in found.items() if value is not None]
    return ["".join(parts) for parts in zip(*lines, strict=True)] if lines else [""] * math.prod(circuit.space.shapes[key])


def _heads(circuit: Circuit) -> np.ndarray | None:
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


def _two_of(a: np.ndarray, b: np.ndarray | None) -> np.ndarray:
    """0 neither, 1 only a, 2 only b, 3 both; NaN where there is no head."""
    assert b is not None
    return np.where(np.isnan(a), np.nan, (a > 0) + 2.0 * (b > 0))


def _overlap(a: Circuit, b: Circuit, key: GateKey, names: tuple[str, str]) -> tuple[float, str]:
    """Intersection over union of one gate tensor's live nodes, and the counts in words."""
    if key not in a.space.shapes:
        return float("nan"), f"{key.granularity} {key.layer}: not gated"
    one, two = a.live(*key), b.live(*key)
    both, union = int((one & two).sum()), int((one | two).sum())
    words = f"layer {key.layer}, {TITLES[key.granularity]}: {both:,} in both, {int(one.sum()) - both:,} only in {names[0]}, " \
            f"{int(two.sum()) - both:,} only in {names[1]}"
    return (both / union if union else float("nan")), words
