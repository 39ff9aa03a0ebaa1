"""Curves: how a search went, size against faithfulness, and a circuit's mask against effects of single nodes."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from plotly.colors import qualitative
from plotly.subplots import make_subplots

from tl_nodeprune.agreement import auroc
from tl_nodeprune.pruning import PruneResult
from tl_nodeprune.sweep import Sweep
from tl_nodeprune.viz.values import TITLES, HasCircuit, Values, check_values, circuit_of, heading, hover, nodes_frame, title

_COLUMNS = ("size", "kl", "method")
_KEPT, _CUT = "#4C78A8", "#F58518"  # plotly.colors.qualitative.T10


def history(result: PruneResult, *, task: str = "") -> go.Figure:
    """A search step by step: loss (KL in nats, by default), nodes open, coefficient. Dashed: the circuit that came out, measured on all
    prompts of the search; its size is in leaf nodes, as the steps' is (those of PaperObjective count every gate).

    Raises: TypeError for what is no PruneResult; ValueError where its history is empty.
    """
    if not isinstance(result, PruneResult):
        raise TypeError(f"history needs a PruneResult, got {type(result).__name__}; `prune` returns one.")
    if not result.history:
        raise ValueError("the history of this result is empty; there is nothing to show.")
    table = result.to_frame()
    loss, unit = html.escape(result.loss), " nats" if result.loss == "KL" else ""
    rows = {"kl": f"{loss},{unit}".rstrip(","), "size": "nodes open", "coefficient": "coefficient"}
    fig = make_subplots(rows=3, cols=1, shared_xaxes=True, vertical_spacing=0.06)
    text = [f"step {s.step}<br>{loss} {s.kl:.4g}<br>{s.size:,} nodes open<br>coefficient {s.coefficient:.4g}" for s in result.history]
    for row, (column, label) in enumerate(rows.items(), start=1):
        fig.add_trace(go.Scatter(x=table["step"].to_numpy(), y=table[column].to_numpy(), mode="lines", name=label, text=text,
                                 hovertemplate="%{text}<extra></extra>"), row=row, col=1)
        fig.update_yaxes(title_text=label, row=row, col=1)
    fig.update_yaxes(**_scale(table["kl"]), row=1, col=1)
    fig.add_hline(y=result.kl, line_dash="dash", line_width=1, row=1, col=1)
    fig.add_hline(y=result.circuit.size, line_dash="dash", line_width=1, row=2, col=1)
    fig.update_xaxes(title_text="step", row=3, col=1)
    what = f"The search: {loss} {result.kl:.4g}{unit} in {result.seconds:.0f} s{'' if result.converged else ', not converged'}"
    return fig.update_layout(height=620, showlegend=False, margin={"t": 70}, title=heading(what, result.circuit, task))


def frontier(*sources: Sweep | pd.DataFrame, names: Sequence[str] | None = None, task: str = "") -> go.Figure:
    """Size against KL, a line per method. A Sweep gives its runs as faint points, KL on held-out prompts, and their medians over
    seeds as a line; a DataFrame has the columns size (leaf nodes), kl (nats) and method, a row per point.

    names: of the Sweeps, in their order; by default what they gate and under which ablation.
    Raises: TypeError for another type; ValueError where there is no source, a column is missing, there is no point, or names are not as
    many as Sweeps, all different.
    """
    if not sources:
        raise ValueError("frontier needs a Sweep, or a DataFrame with the columns size, kl and method.")
    sweeps = [source for source in sources if isinstance(source, Sweep)]
    if names is not None and (len(names) != len(sweeps) or len(set(names)) != len(names)):
        raise ValueError(f"names={list(names)!r}; give {len(sweeps)}, one for each Sweep, all different.")
    called = iter(names if names is not None else _sweep_names(sweeps))
    points = pd.concat([_sweep_points(source, next(called)) if isinstance(source, Sweep) else _points(source, i)
                        for i, source in enumerate(sources)], ignore_index=True)
    if points.empty:
        raise ValueError("there is no run and no point to show.")
    fig = go.Figure()
    for i, (method, rows) in enumerate(points.groupby("method", sort=False)):
        for is_run, some in rows.groupby("run"):
            fig.add_trace(_curve(some.sort_values("size"), html.escape(str(method)), qualitative.Plotly[i % 10], faint=bool(is_run)))
    fig.update_xaxes(title_text="leaf nodes kept", **_scale(points["size"]))
    fig.update_yaxes(title_text="KL(full || circuit), nats", **_scale(points["kl"]))
    held_out = "KL on held-out prompts" if all(isinstance(source, Sweep) for source in sources) else ""
    facts = " · ".join(part for part in (html.escape(task), held_out, "lower and further left is better") if part)
    return fig.update_layout(height=480, margin={"t": 70}, title=title("Size against faithfulness", facts))


def agreement(circuit: HasCircuit, effects: Values, *, scores: Values | None = None, task: str = "") -> go.Figure:
    """A circuit's mask against effects of single nodes: for each granularity that has effects, its nodes from the largest absolute
    effect to the smallest, coloured by whether the circuit keeps them. Where the two agree all kept nodes stand at the left.

    AUROC: the chance that a kept node has a larger absolute effect than a pruned one, ties half; 0.5 by chance.
    Raises: TypeError for what is no circuit or no mapping; ValueError for effects or scores of other hooks or shapes.
    """
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


def _scale(values: pd.Series[float]) -> dict[str, Any]:
    """A logarithmic axis where it can be, with ticks at 1, 2 and 5 or, within a power of ten, where plotly sets them."""
    if not (values > 0).all():
        return {"type": "linear"}
    return {"type": "log", "tickformat": ",~g", "dtick": "D2" if values.max() > 10 * values.min() else None}


def _curve(points: pd.DataFrame, method: str, colour: str, *, faint: bool) -> go.Scatter:
    return go.Scatter(
        x=points["size"].to_numpy(), y=points["kl"].to_numpy(), text=points["note"], mode="markers" if faint else "lines+markers",
        name=method, legendgroup=method, showlegend=not faint, opacity=0.45 if faint else 1, line={"color": colour},
        marker={"color": colour, "size": 6 if faint else 8},
        hovertemplate=f"{method}%{{text}}<br>%{{x:,}} leaf nodes<br>KL %{{y:.4~g}} nats<extra></extra>")


def _points(source: pd.DataFrame, index: int) -> pd.DataFrame:
    """Columns size, kl, method, run (a sweep's single run), note."""
    if not isinstance(source, pd.DataFrame):
        raise TypeError(f"frontier takes a Sweep or a DataFrame, got {type(source).__name__} as source {index}.")
    missing = [name for name in _COLUMNS if name not in source]
    if missing:
        raise ValueError(f"source {index} has no column {', '.join(missing)}; a DataFrame needs {', '.join(_COLUMNS)}.")
    return source[list(_COLUMNS)].assign(run=False, note="")


def _sweep_names(sweeps: list[Sweep]) -> list[str]:
    """What tells each Sweep from the others: what it gates, and a number where that is not enough."""
    circuits = [[run.result.circuit for run in sweep.runs] for sweep in sweeps]
    spaces = [some[0].space if some else None for some in circuits]
    gated = ["" if space is None else "all nodes" if space.shapes == space.present else ", ".join(space.granularities) for space in spaces]
    ablated = [", ".join(dict.fromkeys(circuit.ablation.name for circuit in some)) for some in circuits]
    names = [f"tl_nodeprune, {b}" if len(set(gated)) == 1 else f"tl_nodeprune, {a}; {b}" for a, b in zip(gated, ablated, strict=True)]
    return [name if names.count(name) == 1 else f"{name} ({i})" for i, name in enumerate(names, start=1)]


def _sweep_points(sweep: Sweep, method: str) -> pd.DataFrame:
    runs, medians = (table.rename(columns={"nodes": "size"}) for table in (sweep.to_frame(), sweep.frontier()))
    runs = runs.assign(run=True, note=[f", seed {seed}, max_kl {kl:g}" for seed, kl in zip(runs["seed"], runs["max_kl"], strict=True)])
    medians = medians.assign(run=False, note=[f", medians at max_kl {kl:g}" for kl in medians["max_kl"]])
    both = pd.concat([runs, medians], ignore_index=True)
    return both.assign(kl=both["held_out_kl"], method=method)[[*_COLUMNS, "run", "note"]]


def _auroc(nodes: pd.DataFrame) -> str:
    kept = int(nodes["live"].sum())
    if kept in (0, len(nodes)):
        return f"undefined, since {'all' if kept else 'none'} of them are kept"
    area = auroc(torch.tensor(nodes["effect"].to_numpy()).abs(), torch.tensor(nodes["live"].to_numpy()))
    return f"{np.round(area, 3):g} ({kept:,} kept, {len(nodes) - kept:,} pruned)"
