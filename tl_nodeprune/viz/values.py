"""What figures say of a node: its name, whether it is live, its score and its effect."""

from __future__ import annotations

import html
from collections.abc import Mapping
from functools import reduce
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from tl_nodeprune.circuit import Circuit, Effects
from tl_nodeprune.evidence import Report
from tl_nodeprune.nodes import GateKey, check_types, spread
from tl_nodeprune.search import PruneResult

Values = Mapping[str, Tensor]
HasCircuit: TypeAlias = Circuit | PruneResult | Report
TITLES = {"layer": "layers", "attn": "attention blocks", "mlp": "MLP blocks", "head": "heads", "attn_neuron": "attention neurons",
          "mlp_neuron": "MLP neurons", "mlp_out": "MLP output dims"}
NEURONS = ("mlp_neuron", "attn_neuron", "mlp_out")
DIVERGING = "Portland"  # visible at 0 on a light and on a dark background, unlike scales with a white middle


def circuit_of(given: Any, name: str = "circuit") -> Circuit:
    """A circuit, also from the result of a search or a report. Raises TypeError for anything else."""
    circuit = given.circuit if isinstance(given, PruneResult | Report) else given
    if not isinstance(circuit, Circuit):
        raise TypeError(f"{name} must be a Circuit, a PruneResult or a Report, got {type(given).__name__}; "
                        "Circuit.load(path) reads a saved one.")
    return circuit


def state(result: PruneResult) -> str:
    """Whether a search converged, in words."""
    return {True: "converged", False: "not converged", None: "untested"}[result.converged]


def heading(what: str, circuit: Circuit, task: str) -> dict[str, Any]:
    """A figure's title: what it shows, and of what."""
    facts = [html.escape(task), html.escape(circuit.space.model_name), f"{circuit.size:,} of {circuit.size_total:,} leaf nodes live",
             f"{circuit.ablation.name} ablation"]
    return title(what, " · ".join(fact for fact in facts if fact))


def title(what: str, facts: str) -> dict[str, Any]:
    """A title of two lines, at a distance from the figure's top edge that does not grow with its height."""
    return {"text": f"{what}<br><sup>{facts}</sup>" if facts else what, "yref": "container", "yanchor": "top", "y": 1, "pad": {"t": 16}}


def height(rows: int, row: int = 17) -> int:
    """A figure's height in pixels for so many layers."""
    return max(420, 190 + row * rows)


def colorbar(what: str) -> dict[str, Any]:
    """A colour bar of one size, however tall the figure."""
    return {"title": what, "thickness": 12, "lenmode": "pixels", "len": 230, "y": 1, "yanchor": "top"}


def check_values(circuit: Circuit, given: Values | None, name: str) -> None:
    """Raises TypeError where `given` is no mapping, ValueError where it has no hook of the circuit, or one in the shape neither of the
    hook nor of nodes there (a head-level score is one per head)."""
    if given is None:
        return
    if not isinstance(given, Mapping):
        raise TypeError(f"{name} must be a mapping from hook name to tensor, got {type(given).__name__}; "
                        "see crosscheck.activation_patching.")
    shared = [hook for hook in circuit if hook in given]
    if not shared:
        raise ValueError(f"{name} has none of this circuit's hooks: it has {', '.join(map(str, list(given)[:4])) or 'nothing'}, "
                         f"the circuit {', '.join(list(circuit)[:4])}.")
    for hook in shared:
        try:
            have, want = tuple(torch.as_tensor(given[hook]).shape), circuit.space.width(hook)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"{name}[{hook!r}] must be a tensor, got {type(given[hook]).__name__}: {error}") from error
        if have != want and have not in [shape for key, shape in circuit.space.present.items() if key.hook == hook]:
            raise ValueError(f"{name}[{hook!r}] is {list(have)}, the circuit's mask there is {list(want)}; is it of another model?")


def effect_of(circuit: Circuit, key: GateKey, effects: Values | None) -> Float[Tensor, "..."] | None:
    """The effects of one gate tensor's nodes, shaped as it is; None where they were not measured.

    Effects has every granularity's own, also of nodes that are not gated. In another mapping, values that are all the same within a
    coarser node at that hook point are that node's effect; where they differ a coarser node's effect is their sum, as first-order
    effects add up.
    """
    if effects is None:
        return None
    if isinstance(effects, Effects):
        return effects.gates[key].float() if key in effects.gates else None
    if key.hook not in effects:
        return None
    value = torch.as_tensor(effects[key.hook]).detach().float().cpu()
    coarsest = min((len(shape) for k, shape in circuit.space.present.items() if k.hook == key.hook), default=value.ndim)
    ndim = len(circuit.space.present[key])
    if ndim > value.ndim:
        return None
    if ndim == value.ndim:
        same = coarsest < ndim and _is_flat(value, coarsest)
        return None if same else value
    return value.flatten(ndim)[..., 0] if _is_flat(value, ndim) else value.flatten(ndim).sum(-1)


def score_of(circuit: Circuit, key: GateKey, scores: Values | None) -> Float[Tensor, "..."] | None:
    """The scores of one gate tensor's nodes, shaped as it is; a coarse node has the largest score below it."""
    if scores is None or key.hook not in scores:
        return None
    value, ndim = torch.as_tensor(scores[key.hook]).detach().float().cpu(), len(circuit.space.present[key])
    if ndim > value.ndim:
        return None
    return value if ndim == value.ndim else value.flatten(ndim).amax(-1)


def _is_flat(value: Tensor, ndim: int) -> bool:
    return torch.equal(spread(value.flatten(ndim)[..., :1].squeeze(-1), value.ndim).expand_as(value), value)


def nodes_frame(circuit: Circuit, granularity: str, *, scores: Values | None, effects: Values | None) -> pd.DataFrame:
    """All nodes of one granularity: layer, flat (index within the layer), i0, i1 … (the index by dim), live, score, effect."""
    parts = [_part(circuit, key, scores, effects) for key in sorted(circuit.space.shapes, key=lambda k: k.layer)
             if key.granularity == granularity]
    return pd.concat(parts, ignore_index=True)


def _part(circuit: Circuit, key: GateKey, scores: Values | None, effects: Values | None) -> pd.DataFrame:
    shape = circuit.space.shapes[key]
    n = int(np.prod(shape))
    columns: dict[str, Any] = {"layer": np.full(n, key.layer), "flat": np.arange(n)}
    columns |= {f"i{dim}": index.reshape(-1) for dim, index in enumerate(np.indices(shape))}
    columns["live"] = circuit.live(*key).flatten().numpy()
    for name, value in (("score", score_of(circuit, key, scores)), ("effect", effect_of(circuit, key, effects))):
        columns[name] = np.full(n, np.nan) if value is None else value.flatten().double().numpy()
    return pd.DataFrame(columns)


def hover(granularity: str, nodes: pd.DataFrame) -> dict[str, Any]:
    """customdata and hovertemplate that say each node's name, and its score and effect where there is one in `nodes`."""
    index = ["layer", *(name for name in nodes if name.startswith("i"))]
    shown = [name for name in ("score", "effect") if nodes[name].notna().any()]
    name = ".".join(f"%{{customdata[{i}]:d}}" for i in range(len(index)))
    rest = "".join(f"<br>{what} %{{customdata[{len(index) + i}]:.4~g}}" for i, what in enumerate(shown))
    return {"customdata": nodes[[*index, *shown]].to_numpy(dtype=np.float32), "hovertemplate": f"{granularity} {name}{rest}<extra></extra>"}


def node_table(circuit: HasCircuit, *, scores: Values | None = None, effects: Values | None = None,
               live: bool = True) -> pd.DataFrame:
    """A row per node, coarse to fine: node (as "head 9.6"), granularity, layer, index (within the layer), score and effect where given.

    live: only what the circuit keeps; False: all nodes, with a column "live".
    Raises: TypeError for what is not a circuit or mapping; ValueError for scores or effects of other hooks or shapes.
    """
    check_types(node_table, locals())
    circuit = circuit_of(circuit)
    check_values(circuit, scores, "scores")
    check_values(circuit, effects, "effects")
    parts = [_named(name, nodes[nodes["live"]] if live else nodes) for name in circuit.space.granularities
             for nodes in [nodes_frame(circuit, name, scores=scores, effects=effects)]]
    optional = [("live", not live), ("score", scores is not None), ("effect", effects is not None)]
    columns = ["node", "granularity", "layer", "index", *(name for name, wanted in optional if wanted)]
    return pd.concat(parts, ignore_index=True)[columns]


def _named(granularity: str, nodes: pd.DataFrame) -> pd.DataFrame:
    dims = [nodes[name].astype(str) for name in nodes if name.startswith("i")]
    index = reduce(lambda left, right: left + "." + right, dims) if dims else pd.Series("", index=nodes.index, dtype=str)
    node = granularity + " " + nodes["layer"].astype(str) + (("." + index) if dims else "")
    return nodes.assign(node=node, granularity=granularity, index=index)
