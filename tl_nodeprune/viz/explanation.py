"""An explanation drawn: which of a circuit's strongest nodes feeds which, and where a head attends on several prompts."""

from __future__ import annotations

import html
from collections.abc import Iterator
from typing import Any

import circuitsvis as cv
import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from circuitsvis.utils.render import RenderedHTML

from tl_nodeprune.evidence import LOGITS, CircuitRun, Explanation
from tl_nodeprune.masks import masks_off
from tl_nodeprune.nodes import GateKey, check_counts, check_finite, check_node, check_ready, check_types, figures
from tl_nodeprune.prompts import PromptPairs, positions
from tl_nodeprune.viz.tokens import _captioned, _tokens
from tl_nodeprune.viz.values import HasCircuit, circuit_of, title

LOWERS, RAISES, GREY = "#2b7bba", "#d9711c", "rgba(128,128,128,0.9)"
_SHARE = 0.03  # of the strongest edge: what is drawn
_EDGES, _NAMED, _WIDEST = 16, 5, 11.0


def explanation(found: Explanation, *, task: str = "", edges: int = _EDGES) -> go.Figure:
    """The nodes of an explanation as a graph, layers from the bottom up, the logits on top: a line from node to node is a path.

    A line's width is the effect of cutting that path, a node's size that of cutting the node; blue: cutting it lowers the logit
    difference, orange: it raises it. The strongest lines have their effect written on them, and all say it on hover.

    edges: how many paths are drawn at most, the strongest; those below 3 % of the strongest are not.
    Raises: TypeError for what is no Explanation; ValueError for fewer than one edge.
    """
    check_types(explanation, locals())
    check_counts(edges=edges)
    places, rows = _places(found)
    drawn = found.edges[found.edges["effect"].abs() >= _SHARE * found.edges["effect"].abs().max()].head(edges)
    fig = go.Figure()
    for trace in (*_lines(drawn, places), _numbers(drawn, places), *_markers(found, places), *_legend()):
        fig.add_trace(trace)
    fig.update_xaxes(visible=False, range=[-1.5, 1.4])
    fig.update_yaxes(tickvals=list(rows), ticktext=list(rows.values()), showgrid=False, zeroline=False, range=[-0.8, len(rows) - 0.6],
                     title_text="layer", title_standoff=4)
    facts = f"{html.escape(task)} · " if task else ""
    fig.update_layout(height=150 + 75 * len(rows), margin={"t": 70, "l": 65, "r": 10, "b": 60}, hovermode="closest",
                      legend={"orientation": "h", "y": -0.02, "yanchor": "top", "x": 0},
                      title=title("What feeds what", f"{facts}cutting a path or a node changes the logit difference by …"))
    return fig


def answer_attention(model: Any, circuit: HasCircuit, prompts: PromptPairs, head: tuple[int, int], *, most: int = 6) -> RenderedHTML:
    """Where a head attends from the answer position, in the circuit: a line per clean prompt, the darker the more attention.

    head: (layer, head). most: prompts shown, the first different ones.
    Raises: ValueError for a head that the model lacks, a model without attention patterns, or prompts that do not fit; TypeError for what
    is no circuit, no PromptPairs or no head; RuntimeError where a circuit is applied.
    """
    check_types(answer_attention, locals())
    check_counts(most=most)
    circuit, node = circuit_of(circuit), check_node("head", head)
    n_heads = circuit.space.present.get(GateKey("head", node[0]), (0,))[0]
    if len(node) != 2 or not 0 <= node[1] < n_heads:
        raise ValueError(f"head={tuple(head)}: this model has no such head; give (layer, head), such as (0, 1).")
    layer, index = node
    name = f"blocks.{layer}.attn.hook_pattern"
    some = prompts.without_repeats()[:most]
    with masks_off(model), torch.no_grad():
        check_ready(model)
        circuit.check_fits(model)
        some.check_fits(model)
        seen = CircuitRun(model, circuit, some)(keep={name: lambda a: a.detach().float().cpu()} if name in model.hook_dict else {})[1]
    if name not in seen:
        raise ValueError(f"the model's forward gave no attention pattern at {name}; load it with attn_implementation=\"eager\".")
    pattern = seen[name]
    check_finite(pattern, f"the attention pattern at {name}")
    words: list[str] = []
    values: list[float] = []
    for row, at in enumerate(positions(some).tolist()):
        words += [html.escape(token) for token in _tokens(model, some.clean[row, :at + 1])] + ["\n"]
        values += [*pattern[row, index, at, :at + 1].tolist(), 0.0]
    view = cv.tokens.colored_tokens(words[:-1], values[:-1], min_value=-max(values), max_value=max(values))
    return _captioned(f"Attention of head {layer}.{index} from the answer position, the last token of each line; the bluer the more, up "
                      f"to {max(values):.0%}. Hover a token for its share.", view)


def _places(found: Explanation) -> tuple[dict[str, tuple[float, float]], dict[int, str]]:
    """x and y by name of the node, and what stands at each row. A layer's heads are a row, its MLP another, above it."""
    kinds = {node.name: (node.unit.layer, node.unit.granularity in ("mlp", "layer")) for node in found.nodes}
    order = sorted(set(kinds.values()))
    rows = {i: f"{layer} {'MLP' if late else 'heads'}" for i, (layer, late) in enumerate(order)}
    places = {}
    for i, row in enumerate(order):
        names = sorted((node.unit.index, node.name) for node in found.nodes if kinds[node.name] == row)
        if row[1]:
            places[names[0][1]] = (0.8 if i % 2 else 1.1, float(i))
            continue
        for (_, name), x in zip(names, np.linspace(-1.5, 0.6, len(names) + 2)[1:-1], strict=True):
            places[name] = (float(x) + 0.2 * (i % 2), float(i))
    places[LOGITS] = (0.0, float(len(order)))
    return places, rows | {len(order): LOGITS}


def _curve(start: tuple[float, float], end: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """A line that bends away from what lies between two nodes, the more rows it passes the more."""
    (x0, y0), (x1, y1) = start, end
    bend = 0.09 * (abs(y1 - y0) - 1) * (1 if x0 + x1 > 0.5 else -1)
    t = np.linspace(0, 1, 25)
    return x0 + (x1 - x0) * t + bend * 4 * t * (1 - t), y0 + (y1 - y0) * t


def _lines(drawn: pd.DataFrame, places: dict[str, tuple[float, float]]) -> Iterator[go.Scatter]:
    """A trace per path, since a trace has one width; the strongest on top."""
    largest = drawn["effect"].abs().max() if len(drawn) else 1.0
    for row in drawn.iloc[::-1].itertuples():
        x, y = _curve(places[row.sender], places[row.receiver])
        yield go.Scatter(x=x, y=y, mode="lines", showlegend=False, opacity=0.65, name=f"{row.sender} to {row.receiver}",
                         line={"width": max(1.0, _WIDEST * abs(row.effect) / largest), "color": _colour(row.effect)},
                         hovertemplate=f"{row.sender} to {row.receiver}<br>{_does(row.effect, 'this path')}<extra></extra>")


def _numbers(drawn: pd.DataFrame, places: dict[str, tuple[float, float]]) -> go.Scatter:
    """The effects of the strongest paths, about half way along them."""
    middles = [(_curve(places[row.sender], places[row.receiver]), row.effect) for row in drawn.head(_NAMED).itertuples()]
    spots = [(13, 17, 9, 11, 15)[i % 5] for i in range(len(middles))]  # of 25 along the line, so that neighbours do not meet
    return go.Scatter(x=[curve[0][at] for (curve, _), at in zip(middles, spots, strict=True)],
                      y=[curve[1][at] for (curve, _), at in zip(middles, spots, strict=True)], mode="text", showlegend=False,
                      text=[f"<b>{figures(effect, sign=True)}</b>" for _, effect in middles], hoverinfo="skip", name="effects")


def _markers(found: Explanation, places: dict[str, tuple[float, float]]) -> Iterator[go.Scatter]:
    largest = max(abs(node.effect) for node in found.nodes) or 1.0
    for kind, symbol, some in (("heads", "circle", [node for node in found.nodes if node.unit.granularity in ("head", "attn")]),
                               ("MLPs", "square", [node for node in found.nodes if node.unit.granularity in ("mlp", "layer")])):
        if some:
            yield go.Scatter(
                x=[places[node.name][0] for node in some], y=[places[node.name][1] for node in some], mode="markers+text", name=kind,
                marker={"symbol": symbol, "size": [12 + 22 * (abs(node.effect) / largest) ** 0.5 for node in some], "opacity": 1,
                        "color": [_colour(node.effect) for node in some]}, showlegend=False,
                text=[f"{node.name}<br>{figures(node.effect, sign=True)}" for node in some], textfont={"size": 11},
                textposition="bottom center",
                hovertext=[_hover(node) for node in some], hovertemplate="%{hovertext}<extra></extra>")
    x, y = places[LOGITS]
    yield go.Scatter(x=[x], y=[y], mode="markers", marker={"symbol": "diamond", "size": 16, "color": GREY}, name=LOGITS, showlegend=False,
                     hovertemplate="the logits: final norm and unembedding<extra></extra>")


def _hover(node: Any) -> str:
    lines = [node.name, _does(node.effect, "it")]
    lines += [f"attends to {role} {part:.0%}" for role, part, _ in node.attention()]
    lines += [f"neuron {neuron} ({figures(neuron.effect, sign=True)})" for neuron in node.neurons]
    lines += [f"promotes {', '.join(node.promotes)}"] if node.promotes else []
    return "<br>".join(map(html.escape, lines))


def _legend() -> Iterator[go.Scatter]:
    for name, colour in (("cutting it lowers the logit difference", LOWERS), ("cutting it raises it", RAISES)):
        yield go.Scatter(x=[None], y=[None], mode="lines", line={"width": 6, "color": colour}, name=name)


def _does(effect: float, what: str) -> str:
    return f"cutting {what} {'lowers' if effect < 0 else 'raises'} the logit difference by {figures(abs(effect))}"


def _colour(effect: float) -> str:
    return LOWERS if effect < 0 else RAISES
