"""Curves: how a search went, size against faithfulness, and a circuit's mask against effects of single nodes."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from plotly.colors import qualitative
from plotly.subplots import make_subplots

from tl_nodeprune.evidence import auroc
from tl_nodeprune.nodes import check_types
from tl_nodeprune.search import PruneResult, Sweep
from tl_nodeprune.viz.values import TITLES, HasCircuit, Values, check_values, circuit_of, heading, hover, nodes_frame, state, title

_COLUMNS = ("size", "kl", "method")
_KEPT, _CUT = "#4C78A8", "#F58518"  # plotly.colors.qualitative.T10
_LOWEST = 1e-4  # nats: below this a frontier, which ends at the full model, says nothing more
_SMOOTH = 15  # steps


def history(result: PruneResult, *, task: str = "") -> go.Figure:
    """A search step by step: loss (KL in nats, by default), nodes open, coefficient.

    Each prompt of a step has a size of its own, so a step's loss depends on the sizes drawn: its points are faint, and the line is their
    running median over 15 steps. The coefficient is the temperature of the soft masks; lam for PaperObjective. Dashed: the circuit that
    came out, its loss on prompts held out; its size is in leaf nodes, as the steps' is (those of PaperObjective count every gate).

    Raises: TypeError for what is no PruneResult; ValueError where its history is empty.
    """
    check_types(history, locals())
    if not isinstance(result, PruneResult):
        raise TypeError(f"history needs a PruneResult, got {type(result).__name__}; `prune` returns one.")
    if not result.history:
        raise ValueError("the history of this result is empty; there is nothing to show.")
    table = result.to_frame()
    loss, unit = html.escape(result.loss), _unit(result)
    rows = {"kl": f"{loss},{unit}".rstrip(","), "size": "nodes open", "coefficient": "coefficient"}
    fig = make_subplots(rows=3, cols=1, shared_xaxes=True, vertical_spacing=0.06)
    text = [f"step {s.step}<br>{loss} {s.kl:.4g}<br>{s.size:,} nodes open<br>coefficient {s.coefficient:.4g}" for s in result.history]
    for row, (column, label) in enumerate(rows.items(), start=1):
        each = {"mode": "markers", "opacity": 0.3, "marker": {"size": 4}} if column == "kl" else {"mode": "lines"}
        fig.add_trace(go.Scatter(x=table["step"].to_numpy(), y=table[column].to_numpy(), name=label, text=text,
                                 hovertemplate="%{text}<extra></extra>", **each), row=row, col=1)
        fig.update_yaxes(title_text=label, row=row, col=1)
    median = table["kl"].rolling(_SMOOTH, center=True, min_periods=1).median()
    fig.add_trace(go.Scatter(x=table["step"].to_numpy(), y=median.to_numpy(), mode="lines", name="running median", hoverinfo="skip",
                             line={"color": qualitative.Plotly[0]}), row=1, col=1)
    fig.update_yaxes(**_scale(table["kl"]), row=1, col=1)
    fig.add_hline(y=result.kl, line_dash="dash", line_width=1, row=1, col=1)
    fig.add_hline(y=result.circuit.size, line_dash="dash", line_width=1, row=2, col=1)
    fig.update_xaxes(title_text="step", row=3, col=1)
    what = f"The search: {loss} {result.kl:.4g}{unit} held out, in {result.seconds:.0f} s"
    what += "" if result.converged else f", {state(result)}"
    return fig.update_layout(height=620, showlegend=False, margin={"t": 70}, title=heading(what, result.circuit, task))


def frontier(*sources: PruneResult | Sweep | pd.DataFrame, names: Sequence[str] | None = None, task: str = "") -> go.Figure:
    """Size against KL, a line per method; lower and further left is better.

    A PruneResult gives every size of its run: KL on prompts held out with its 90 % interval as a band, KL on the prompts searched as a
    fainter dotted line, and the circuit as a diamond. A Sweep gives its runs as faint points, KL on held-out prompts, and their medians
    over seeds as a line; a DataFrame has the columns size (leaf nodes), kl (nats) and method, a row per point.

    names: of the PruneResults and Sweeps, in their order; by default what they gate and under which ablation.
    Raises: TypeError for another type; ValueError where there is no source, a column is missing, there is no point, a PruneResult has no
    frontier or another loss than the other sources, or names are not as many as PruneResults and Sweeps, all different.
    """
    check_types(frontier, {"names": names, "task": task})
    if not sources:
        raise ValueError("frontier needs a PruneResult, a Sweep, or a DataFrame with the columns size, kl and method.")
    ours = [source for source in sources if isinstance(source, PruneResult | Sweep)]
    if names is not None and (len(names) != len(ours) or len(set(names)) != len(names)):
        raise ValueError(f"names={list(names)!r}; give {len(ours)}, one for each PruneResult and Sweep, all different.")
    called = iter(names if names is not None else _names(ours))
    points = pd.concat([_points(source, i, called) for i, source in enumerate(sources)], ignore_index=True)
    if points.empty:
        raise ValueError("there is no run and no point to show.")
    loss = _loss_of(sources)
    fig = go.Figure()
    for i, (method, rows) in enumerate(points.groupby("method", sort=False)):
        for kind, some in rows.groupby("kind", sort=False):
            for trace in _curve(some.sort_values("size"), html.escape(str(method)), qualitative.Plotly[i % 10], str(kind)):
                fig.add_trace(trace)
    fig.update_xaxes(title_text="leaf nodes kept", **_scale(points["size"]))
    fig.update_yaxes(title_text="KL(full || circuit), nats" if loss == "KL" else html.escape(loss),
                     **_scale(points["kl"], lowest=_LOWEST if any(isinstance(source, PruneResult) for source in sources) else None))
    held_out = f"{html.escape(loss)} on held-out prompts" if len(ours) == len(sources) else ""
    facts = " · ".join(part for part in (html.escape(task), held_out, "lower and further left is better") if part)
    return fig.update_layout(height=480, margin={"t": 70}, title=title("Size against faithfulness", facts))


def agreement(circuit: HasCircuit, effects: Values, *, scores: Values | None = None, task: str = "") -> go.Figure:
    """A circuit's mask against effects of single nodes: for each granularity that has effects, its nodes from the largest absolute
    effect to the smallest, coloured by whether the circuit keeps them. Where the two agree all kept nodes stand at the left.

    AUROC: the chance that a kept node has a larger absolute effect than a pruned one, ties half; 0.5 by chance.
    Raises: TypeError for what is not a circuit or mapping; ValueError for effects or scores of other hooks or shapes.
    """
    check_types(agreement, locals())
    circuit = circuit_of(circuit)
    if effects is None:
        raise TypeError("agreement needs effects, a mapping from hook name to tensor; see crosscheck.activation_patching.")
    check_values(circuit, effects, "effects")
    check_values(circuit, scores, "scores")
    tables = {name: nodes.dropna(subset="effect") for name in circuit.space.granularities
              for nodes in [nodes_frame(circuit, name, scores=scores, effects=effects)] if nodes["effect"].notna().any()}
    if not tables:
        raise ValueError(f"effects has no {', '.join(circuit.space.granularities)} nodes to compare with the circuit's.")
    fig = make_subplots(rows=len(tables), cols=1, vertical_spacing=min(0.16, 0.3 / len(tables)),
                        subplot_titles=[f"{TITLES[name]}: AUROC {_auroc(nodes)}" for name, nodes in tables.items()])
    for row, (name, nodes) in enumerate(tables.items(), start=1):
        nodes, many = nodes.sort_values("effect", key=lambda column: -column.abs(), kind="stable"), len(nodes) > 200
        fig.add_trace(go.Scattergl(  # kept and pruned in one trace, by rank: of two, the second would hide the first
            x=np.arange(1, len(nodes) + 1, dtype=np.int32), y=nodes["effect"].to_numpy(dtype=np.float32), mode="markers", name=TITLES[name],
            marker={"color": nodes["live"].to_numpy(dtype=np.uint8), "cmin": 0, "cmax": 1, "colorscale": [[0, _CUT], [1, _KEPT]],
                    "size": 4 if many else 7}, showlegend=False, **hover(name, nodes)), row=row, col=1)
        fig.update_xaxes(type="log" if many else "linear", dtick=1 if len(nodes) <= 12 else None, row=row, col=1)
        fig.update_yaxes(title_text="effect", row=row, col=1)
    for label, colour in (("kept", _KEPT), ("pruned", _CUT)):
        fig.add_trace(go.Scatter(x=[None], y=[None], mode="markers", name=label, marker={"color": colour, "size": 8}), row=1, col=1)
    fig.update_xaxes(title_text="rank by absolute effect", row=len(tables), col=1)
    return fig.update_layout(height=180 + 210 * len(tables), margin={"t": 90},
                             title=heading("Mask against effects of single nodes", circuit, task))


def _scale(values: pd.Series[float], lowest: float | None = None) -> dict[str, Any]:
    """A logarithmic axis where it can be, with ticks at 1, 2 and 5 or, within a power of ten, where plotly sets them. lowest: the axis
    ends there, and values of 0 need not be on it."""
    some = values if lowest is None else values[values > 0]
    if some.empty or not (some > 0).all():
        return {"type": "linear"}
    low, high = some.min(), some.max()
    if lowest is None or low >= lowest or high <= lowest:
        return {"type": "log", "tickformat": ",~g", "dtick": "D2" if high > 10 * low else None}
    return {"type": "log", "tickformat": ",~g", "dtick": 1, "range": [math.log10(lowest), math.log10(high) + 0.1]}


def _unit(result: PruneResult) -> str:
    return " nats" if result.loss == "KL" else ""


def _loss_of(sources: Sequence[object]) -> str:
    """What all sources measure. Raises ValueError where they measure different things."""
    losses = list(dict.fromkeys(source.loss if isinstance(source, PruneResult) else "KL" for source in sources))
    if len(losses) > 1:
        raise ValueError(f"these sources measure different losses, {' and '.join(losses)}; draw each in a figure of its own.")
    return losses[0]


def _curve(points: pd.DataFrame, method: str, colour: str, kind: str) -> list[go.Scatter]:
    """The traces of one kind of points, all of one method: "line", "run" (a sweep's), "searched", "circuit"."""
    called = {"searched": f"{method}, prompts searched", "circuit": f"{method}, the circuit"}.get(kind, method)
    looks: dict[str, dict[str, Any]] = {
        "line": {"mode": "lines+markers", "marker": {"size": 8}},
        "run": {"mode": "markers", "opacity": 0.45, "marker": {"size": 6}, "showlegend": False},
        "searched": {"mode": "lines", "opacity": 0.5, "line": {"width": 1.5, "dash": "dot"}},
        "circuit": {"mode": "markers", "marker": {"size": 13, "symbol": "diamond", "line": {"width": 1, "color": "white"}}},
    }
    drawn = go.Scatter(x=points["size"].to_numpy(), y=points["kl"].to_numpy(), text=points["note"], name=called, legendgroup=method,
                       hovertemplate="%{text}<extra></extra>", **looks[kind])
    drawn.update(line_color=colour, marker_color=colour)
    known = points[(points["low"] > 0) & (points["high"] > 0)] if kind == "line" else points[:0]
    return [*_band(known, method, colour), drawn]


def _band(points: pd.DataFrame, method: str, colour: str) -> list[go.Scatter]:
    """The interval from low to high as one filled shape."""
    if points.empty:
        return []
    x, y = [np.concatenate([points[a], points[b][::-1]]) for a, b in (("size", "size"), ("high", "low"))]
    return [go.Scatter(x=x, y=y, mode="lines", fill="toself", line={"width": 0, "color": colour}, opacity=0.25, legendgroup=method,
                       name=f"{method}, 90 % interval", showlegend=False, hoverinfo="skip")]


def _points(source: object, index: int, called: Iterator[str]) -> pd.DataFrame:
    """Columns size, kl, low, high, method, kind (see `_curve`), note (what hovering says)."""
    if isinstance(source, PruneResult):
        return _result_points(source, next(called))
    if isinstance(source, Sweep):
        return _sweep_points(source, next(called))
    if not isinstance(source, pd.DataFrame):
        raise TypeError(f"frontier takes a PruneResult, a Sweep or a DataFrame, got {type(source).__name__} as source {index}.")
    missing = [name for name in _COLUMNS if name not in source]
    if missing:
        raise ValueError(f"source {index} has no column {', '.join(missing)}; a DataFrame needs {', '.join(_COLUMNS)}.")
    if not all(pd.api.types.is_numeric_dtype(source[name]) for name in ("size", "kl")):
        raise TypeError(f"the columns size and kl of source {index} must hold numbers.")
    return _noted(source[list(_COLUMNS)].assign(kind="line", about=""))


def _noted(points: pd.DataFrame, loss: str = "KL") -> pd.DataFrame:
    """With a note for each point from what it is `about`, its size and its loss; low and high where there are none."""
    unit = " nats" if loss == "KL" else ""
    note = [f"{html.escape(f'{method}{about}')}<br>{size:,.0f} leaf nodes<br>{html.escape(loss)} {kl:.4g}{unit}"
            for method, about, size, kl in zip(points["method"], points["about"], points["size"], points["kl"], strict=True)]
    bare = points.assign(note=note)
    return bare if "low" in bare else bare.assign(low=math.nan, high=math.nan)


def _result_points(result: PruneResult, method: str) -> pd.DataFrame:
    if result.frontier.empty:
        raise ValueError("this result has no frontier: it is an objective's or one within limits by granularity. Search with max_kl.")
    table = result.frontier.rename(columns={"nodes": "size"}).assign(method=method)
    circuit = pd.DataFrame([{"size": result.circuit.size, "share": 1 - result.circuit.sparsity, "kl": result.kl, "low": result.interval[0],
                             "high": result.interval[1], "accuracy": result.accuracy, "search_kl": result.search_kl, "method": method}])
    parts = []
    for kind, some in (("line", table), ("circuit", circuit)):
        noted = _noted(some.assign(kind=kind, about=", the circuit" if kind == "circuit" else ""), result.loss)
        told = zip(*(noted[name] for name in ("note", "low", "high", "search_kl", "share", "accuracy")), strict=True)
        noted["note"] = [f"{note} held out (90 %: {low:.3g} to {high:.3g})<br>{searched:.4g} on the prompts searched<br>{share:.2%} of the "
                         f"nodes, {right:.0%} answered right" for note, low, high, searched, share, right in told]
        parts.append(noted)
    parts.insert(1, _noted(table.assign(kl=table["search_kl"], kind="searched", about=", prompts searched"), result.loss))
    return pd.concat(parts, ignore_index=True)


def _names(sources: Sequence[PruneResult | Sweep]) -> list[str]:
    """What tells each from the others: what it gates, and a number where that is not enough."""
    circuits = [[source.circuit] if isinstance(source, PruneResult) else [run.result.circuit for run in source.runs] for source in sources]
    spaces = [some[0].space if some else None for some in circuits]
    gated = ["" if space is None else "all nodes" if space.shapes == space.present else ", ".join(space.granularities) for space in spaces]
    ablated = [", ".join(dict.fromkeys(circuit.ablation.name for circuit in some)) for some in circuits]
    names = [f"tl_nodeprune, {b}" if len(set(gated)) == 1 else f"tl_nodeprune, {a}; {b}" for a, b in zip(gated, ablated, strict=True)]
    return [name if names.count(name) == 1 else f"{name} ({i})" for i, name in enumerate(names, start=1)]


def _sweep_points(sweep: Sweep, method: str) -> pd.DataFrame:
    runs, medians = (table.rename(columns={"nodes": "size"}) for table in (sweep.to_frame(), sweep.frontier()))
    runs = runs.assign(kind="run", about=[f", seed {seed}, max_kl {kl:g}" for seed, kl in zip(runs["seed"], runs["max_kl"], strict=True)])
    medians = medians.assign(kind="line", about=[f", medians at max_kl {kl:g}" for kl in medians["max_kl"]])
    both = pd.concat([medians, runs], ignore_index=True)
    return _noted(both.assign(kl=both["held_out_kl"], method=method)[[*_COLUMNS, "kind", "about"]])


def _auroc(nodes: pd.DataFrame) -> str:
    kept = int(nodes["live"].sum())
    if kept in (0, len(nodes)):
        return f"undefined, since {'all' if kept else 'none'} of them are kept"
    area = auroc(torch.tensor(nodes["effect"].to_numpy()).abs(), torch.tensor(nodes["live"].to_numpy()))
    return f"{np.round(area, 3):g} ({kept:,} kept, {len(nodes) - kept:,} pruned)"
