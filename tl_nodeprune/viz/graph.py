"""A circuit drawn along the residual stream."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np
import plotly.graph_objects as go

from tl_nodeprune.circuit import Circuit
from tl_nodeprune.nodes import GateKey, check_types, node_name
from tl_nodeprune.viz.values import DIVERGING, HasCircuit, Values, check_values, circuit_of, colorbar, effect_of, heading, height, score_of

_WIDTHS = 5
_SPINE = "rgba(128,128,128,0.7)"
_KINDS = (("head", "heads", "#4C78A8"), ("attn", "attention blocks", "#4C78A8"), ("mlp", "MLPs", "#F58518"), ("layer", "layers", "#54A24B"))


@dataclass(frozen=True)
class _Unit:
    """A kept head or block. share: of what is gated below it, live. x: 0 the stream, heads to the left."""

    key: GateKey
    index: tuple[int, ...]
    x: float
    share: float
    detail: str
    effect: float
    score: float

    @property
    def name(self) -> str:
        return node_name(*self.key, *self.index)


def circuit_graph(circuit: HasCircuit, *, scores: Values | None = None, effects: Values | None = None,
                  task: str = "") -> go.Figure:
    """The kept heads and blocks, each with a line to the residual stream that it adds to, layer by layer from the bottom up.

    A node circuit says which nodes are kept, not which reads which: so every line goes to the stream, none from node to node.
    With effects, size, line width and colour are the node's effect, and nodes without one are grey; without, size and width are the
    share of its dims or neurons that is live. An attention block stands for its heads where no head is gated, a layer for what is not
    gated in it.

    Raises: TypeError for what is not a circuit or mapping; ValueError for an empty circuit, or scores or effects of other hooks or shapes.
    """
    check_types(circuit_graph, locals())
    circuit = circuit_of(circuit)
    check_values(circuit, scores, "scores")
    check_values(circuit, effects, "effects")
    units = [unit for layer in circuit.space.layers for unit in _units(circuit, layer, scores, effects)]
    if not units:
        raise ValueError("the circuit is empty: no node of it is live, so there is nothing to draw.")
    by_effect = any(unit.effect == unit.effect for unit in units)
    weight = np.array([abs(np.nan_to_num(unit.effect)) if by_effect else unit.share for unit in units])
    weight = weight / (weight.max() or 1)
    layers, fig = circuit.space.layers, go.Figure()
    fig.add_trace(go.Scatter(x=[0, 0], y=[min(layers) - 0.6, max(layers) + 0.9], mode="lines", line={"color": _SPINE, "width": 4},
                             name="residual stream", hoverinfo="skip"))
    for trace in (*_lines(units, weight), *_markers(units, weight, by_effect, labels=len(units) <= 6 * len(layers))):
        fig.add_trace(trace)
    fig.update_xaxes(tickvals=[-0.55, 0, 0.3], ticktext=["attention", "stream", "MLP"], showgrid=False, zeroline=False, range=[-1.12, 0.5])
    fig.update_yaxes(title_text="layer", range=[min(layers) - 0.8, max(layers) + 1.1], tickvals=layers, zeroline=False, showgrid=False)
    fig.update_layout(height=height(len(layers), 30 if len(layers) <= 24 else 24), margin={"t": 70}, showlegend=not by_effect,
                      title=heading(f"Kept heads and blocks: {len(units):,}", circuit, task))
    if by_effect:
        fig.update_layout(coloraxis={"colorscale": DIVERGING, "cmid": 0, "colorbar": colorbar("effect")})
    return fig


def _units(circuit: Circuit, layer: int, scores: Values | None, effects: Values | None) -> Iterator[_Unit]:
    def unit(key: GateKey, index: tuple[int, ...], x: float, live: np.ndarray, what: str) -> _Unit:
        found = [value_of(circuit, key, values) if key in circuit.space.present else None
                 for value_of, values in ((effect_of, effects), (score_of, scores))]
        effect, score = (float("nan") if value is None else float(value[index]) for value in found)
        detail = f"{int(live.sum()):,} of {live.size:,} {what} live" if live.size > 1 else "live"
        return _Unit(key, index, x, float(live.mean()), detail, effect, score)

    z, attn = f"blocks.{layer}.attn.hook_z", GateKey("attn", layer)
    if z in circuit:
        mask = circuit[z].numpy()
        for head in np.flatnonzero(mask.any(1)):
            yield unit(GateKey("head", layer), (int(head),), -(0.12 + 0.95 * (head + 0.5) / len(mask)), mask[head], "dims")
    elif attn in circuit.space.shapes and circuit.live(*attn):
        yield unit(attn, (), -0.55, np.ones(1), "")
    mlp = [circuit.live(*key).numpy() for name in ("mlp_neuron", "mlp_out", "mlp")
           if (key := GateKey(name, layer)) in circuit.space.shapes]
    if any(live.any() for live in mlp):
        what = "neurons" if GateKey("mlp_neuron", layer) in circuit.space.shapes else "output dims"
        yield unit(GateKey("mlp", layer), (), 0.3, mlp[0], what)
    whole = GateKey("layer", layer)
    if whole in circuit.space.free() and circuit.live(*whole):
        yield unit(whole, (), 0.15, np.ones(1), "")


def _height(unit: _Unit) -> float:
    return unit.key.layer + (0.5 if unit.key.granularity == "mlp" else 0.0)


def _lines(units: list[_Unit], weight: np.ndarray) -> Iterator[go.Scatter]:
    """Lines to the stream; one trace per width, since a trace has one."""
    bins = np.ceil(weight * _WIDTHS).clip(1, _WIDTHS)
    for width in np.unique(bins):
        chosen = [unit for unit, b in zip(units, bins, strict=True) if b == width]
        x = [value for unit in chosen for value in (unit.x, 0, None)]
        y = [value for unit in chosen for value in (_height(unit), _height(unit) + 0.42, None)]
        yield go.Scatter(x=x, y=y, mode="lines", line={"width": float(width), "color": _SPINE}, opacity=0.6, hoverinfo="skip",
                         showlegend=False, name=f"width {int(width)} of {_WIDTHS}")


def _markers(units: list[_Unit], weight: np.ndarray, by_effect: bool, labels: bool) -> Iterator[go.Scatter]:
    effects = np.array([unit.effect for unit in units])
    for (name, label, colour), measured in product(_KINDS, (True, False)):
        some = [i for i, unit in enumerate(units) if unit.key.granularity == name and (measured or by_effect)
                and (unit.effect == unit.effect or not by_effect) == measured]
        if not some:
            continue
        marker = {"size": 7 + 11 * np.sqrt(weight[some]), "symbol": "square" if name == "mlp" else "circle", "opacity": 1.0}
        if measured:
            marker |= {"color": effects[some], "coloraxis": "coloraxis"} if by_effect else {"color": colour}
        else:
            marker |= {"color": _SPINE}
        yield go.Scatter(
            x=[units[i].x for i in some], y=[_height(units[i]) for i in some], mode="markers+text" if labels else "markers", marker=marker,
            name=label, text=[".".join(map(str, (units[i].key.layer, *units[i].index))) for i in some], textfont={"size": 9},
            textposition="middle right" if name == "mlp" else "bottom center", hovertext=[_words(units[i], by_effect) for i in some],
            hovertemplate="%{hovertext}<extra></extra>")


def _words(unit: _Unit, by_effect: bool) -> str:
    values = [f"<br>{name} {value:.4g}" for name, value in (("score", unit.score), ("effect", unit.effect)) if value == value]
    values += ["<br>effect not measured"] * (by_effect and unit.effect != unit.effect)
    return f"{unit.name}: {unit.detail}{''.join(values)}"
