"""What two circuits share."""

from __future__ import annotations

import html
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from tl_nodeprune.circuit import Circuit
from tl_nodeprune.nodes import GateKey, check_types, node_name
from tl_nodeprune.viz.maps import PRUNED, head_shares, live_scale, values_texts
from tl_nodeprune.viz.values import TITLES, HasCircuit, Values, check_values, circuit_of, colorbar, height, title

_NOTHING = "#AAAAAA"  # opaque, since the number on it is coloured against it
_COLOURS = (PRUNED, "#4C78A8", "#F58518", "#54A24B")  # the last three from plotly.colors.qualitative.T10


def compare(circuit_a: HasCircuit, circuit_b: HasCircuit, *, names: tuple[str, str] = ("a", "b"),
            scores: Values | None = None, effects: Values | None = None, task: str = "") -> go.Figure:
    """What two circuits over the same nodes share: a map of heads (in both, in one, in neither), and the intersection over union of
    live nodes by layer and granularity; no number where neither has a node.

    Raises: TypeError for what is not a circuit or mapping; ValueError where the two are over different nodes, or for scores or effects
    of other hooks or shapes.
    """
    check_types(compare, locals())
    if len(names) != 2:
        raise ValueError(f"names={tuple(names)!r}; give two, one for each circuit.")
    a, b = circuit_of(circuit_a, "circuit_a"), circuit_of(circuit_b, "circuit_b")
    check_values(a, scores, "scores")
    check_values(a, effects, "effects")
    names = (html.escape(names[0]), html.escape(names[1]))
    iou, both = a.iou(b), (a & b).size  # iou raises where they are over different nodes
    has_heads = head_shares(a) is not None
    titles = ["heads", "intersection over union"][not has_heads:]
    fig = make_subplots(rows=1, cols=len(titles), horizontal_spacing=0.08, subplot_titles=titles)
    common = {"y": [str(layer) for layer in a.space.layers], "xgap": 1, "ygap": 1, "hovertemplate": "%{hovertext}<extra></extra>"}
    if has_heads:
        _add_heads(fig, a, b, names, (scores, effects), common)
    cells = [[_overlap(a, b, GateKey(name, layer), names, scores, effects) for name in a.space.granularities] for layer in a.space.layers]
    fig.add_trace(go.Heatmap(
        z=np.array([[cell[0] for cell in row] for row in cells]), x=[TITLES[name] for name in a.space.granularities], name="granularities",
        hovertext=[[cell[1] for cell in row] for row in cells], coloraxis="coloraxis", textfont={"size": 10}, texttemplate="%{text}",
        text=[["" if np.isnan(cell[0]) else f"{cell[0]:.2g}" for cell in row] for row in cells], **common), row=1, col=len(titles))
    fig.update_yaxes(type="category", showgrid=False)
    fig.update_yaxes(title_text="layer", col=1)
    fig.update_xaxes(type="category", showgrid=False)
    shared = f"{a.size - both:,} only in {names[0]}, {b.size - both:,} only in {names[1]}, {both:,} in both, of {a.size_total:,} leaf nodes"
    ablations = " and ".join(dict.fromkeys((a.ablation.name, b.ablation.name)))
    facts = " · ".join(part for part in (html.escape(task), shared, f"{ablations} ablation") if part)
    return fig.update_layout(
        coloraxis={"colorscale": live_scale(_NOTHING), "cmin": 0, "cmax": 1, "colorbar": colorbar("IoU")}, height=height(len(cells)) + 60,
        margin={"t": 90, "b": 120}, legend={"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom"},
        title=title(f"{names[0]} and {names[1]}: intersection over union {iou:.2f}", facts))


def _add_heads(fig: go.Figure, a: Circuit, b: Circuit, names: tuple[str, str], values: tuple[Values | None, Values | None],
               common: dict[str, Any]) -> None:
    one, two = head_shares(a), head_shares(b)
    assert one is not None and two is not None
    which = np.where(np.isnan(one), np.nan, (one > 0) + 2.0 * (two > 0))
    words = _where(names)
    told = [["" if np.isnan(v) else f"{node_name('head', layer, i)}: {words[int(v)]}{more}"
             for i, (v, more) in enumerate(zip(row, values_texts(a, GateKey("head", layer), *values), strict=False))]
            for layer, row in zip(a.space.layers, which, strict=True)]
    steps = [[edge / 4, colour] for i, colour in enumerate(_COLOURS) for edge in (i, i + 1)]
    fig.add_trace(go.Heatmap(z=which, x=[str(i) for i in range(which.shape[1])], hovertext=told, name="heads", showscale=False, zmin=0,
                             zmax=3, colorscale=steps, **common), row=1, col=1)
    fig.update_xaxes(title_text="head", row=1, col=1)
    for word, colour in zip(words[1:], _COLOURS[1:], strict=True):  # a colour bar would say numbers, not words
        fig.add_trace(go.Scatter(x=[None], y=[None], mode="markers", marker={"symbol": "square", "size": 11, "color": colour},
                                 name=f"head {word}"), row=1, col=1)


def _where(names: tuple[str, str]) -> tuple[str, str, str, str]:
    return "in neither", f"only in {names[0]}", f"only in {names[1]}", "in both"


def _overlap(a: Circuit, b: Circuit, key: GateKey, names: tuple[str, str], scores: Values | None, effects: Values | None
             ) -> tuple[float, str]:
    """Intersection over union of one gate tensor's live nodes, and the counts in words."""
    if key not in a.space.shapes:
        return float("nan"), f"{key.granularity} {key.layer}: not gated"
    one, two = a.live(*key), b.live(*key)
    both, union = int((one & two).sum()), int((one | two).sum())
    if not one.ndim:
        told = f"{node_name(*key)}: {_where(names)[int(one) + 2 * int(two)]}{values_texts(a, key, scores, effects)[0]}"
        return (both / union if union else float("nan")), told
    words = (f"layer {key.layer}, {TITLES[key.granularity]}: {both:,} in both, {int(one.sum()) - both:,} only in {names[0]}, "
             f"{int(two.sum()) - both:,} only in {names[1]}")
    return (both / union if union else float("nan")), words
