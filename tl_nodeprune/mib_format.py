"""Node scores in the JSON of MIB's circuit track, for submissions at node and neuron level, and back.

The file is that of the board's `Graph.to_json`, as far as it was known here; no copy of the board's code was at hand, so that its own
reader takes it could not be tried::

    {"cfg": {"n_layers", "n_heads", "parallel_attn_mlp", "d_model"},
     "nodes": {"input": {...}, "a0.h0": {"in_graph": bool, "score": float, "neurons": [bool], "neuron_scores": [float]}, "m0": {...},
               "logits": {"in_graph": true}},
     "edges": {}}

What maps onto it. A head is "aL.hH", an MLP block "mL": scores of ("head", "mlp") are a node-level submission exactly. The board's neurons
are the d_model dims of what a node writes: an MLP's are our mlp_out nodes, so scores of ("head", "mlp_out") are a neuron-level submission
in which a head comes whole, all d_model dims with the head's score. Dims of a head before W_O and MLP neurons before W_out
have no place on the board: a head or MLP then has the highest score of the nodes below it, which is an approximation; rank at
the board's own granularities instead. "input", and nodes that were not scored, are above all others. Edges are left out.
"""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tl_nodeprune.nodes import GateKey, NodeSpace
from tl_nodeprune.probe import find_nodes
from tl_nodeprune.scores import NodeScores

LEVELS: tuple[str, ...] = ("node", "neuron")


def write(model: Any, scores: NodeScores, path: str | Path, *, level: str = "node", size: float | int = 1.0) -> None:
    """Write scores as the board's JSON; all of it or nothing. What is exported, and what is not, is at the head of this module.

    level: "node", or "neuron" with a score for each dim that a node writes as well. size: "in_graph" and "neurons" are true for the best
    nodes, a share as a float, a count as an int; 1.0: for all, the scores decide.

    Raises: TypeError for what is no NodeScores; ValueError for another level or size, scores of another model, or of whole attention blocks
    or layers, which the board lacks; OSError where the file cannot be written.
    """
    if not isinstance(scores, NodeScores):
        raise TypeError(f"scores must be NodeScores, got {type(scores).__name__}; of effects they are NodeScores.from_effects(effects).")
    if level not in LEVELS:
        raise ValueError(f"level={level!r}; allowed: {', '.join(map(repr, LEVELS))}.")
    space = find_nodes(model)
    scores.space.check_fits(space, "these scores are of")
    if lacking := {key.granularity for key in scores.gates} & {"attn", "layer"}:
        raise ValueError(f"the board has no {' or '.join(sorted(lacking))} nodes; rank heads and MLPs, or finer nodes.")
    kept = scores.top(size)
    live = NodeScores({key: kept.live(*key) for key in scores.gates}, scores.space)
    above = float(scores.flat.max()) + 1
    nodes: dict[str, dict[str, Any]] = {"input": {"in_graph": True, "score": above}}
    for name, layer, head in _names(space):
        (score, fine), (on, fine_on) = _fields(scores, layer, head, above), _fields(live, layer, head, 1.0)
        nodes[name] = {"in_graph": bool(on), "score": score}
        if level == "neuron":
            nodes[name] |= {"neurons": fine_on.bool().expand(space.d_model).tolist(), "neuron_scores": fine.expand(space.d_model).tolist()}
    content = {"cfg": _cfg(model, space), "nodes": nodes | {"logits": {"in_graph": True}}, "edges": {}}
    part = Path(f"{path}.part")
    try:
        part.write_text(json.dumps(content), encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def read(model: Any, path: str | Path) -> NodeScores:
    """Scores from such a file: of ("head", "mlp"), or where it has neuron scores of ("head", "mlp_out"). A warning says where those of a
    head's dims are left out.

    Raises: FileNotFoundError; ValueError for a file that is damaged, of another model, or lacks a node of this one.
    """
    space = find_nodes(model)
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        cfg, nodes = content["cfg"], content["nodes"]
        if any(cfg[name] != value for name, value in _cfg(model, space).items() if name != "parallel_attn_mlp"):
            raise ValueError(f"it is of another model, {cfg}; this one is {_cfg(model, space)}")
        blocks = [name for name, _, head in _names(space) if head is None]
        lacking = [name for name in blocks if "neuron_scores" not in nodes[name]]
        if lacking and len(lacking) < len(blocks):
            raise ValueError(f"{', '.join(lacking)} have no neuron_scores, but other MLPs do")
        fine = not lacking
        some = space.restrict([name for name in ("head", "mlp_out" if fine else "mlp") if name in space.granularities])
        found, lost = {key: torch.zeros(shape, dtype=torch.float32) for key, shape in some.shapes.items()}, 0
        for name, layer, head in _names(space):
            if head is not None:
                found[GateKey("head", layer)][head] = score = float(nodes[name]["score"])
                lost += any(dim != score for dim in nodes[name].get("neuron_scores", ()))
            elif fine:
                found[GateKey("mlp_out", layer)] = torch.tensor(nodes[name]["neuron_scores"], dtype=torch.float32)
            else:
                found[GateKey("mlp", layer)].fill_(float(nodes[name]["score"]))
        if lost:
            warnings.warn(f"{path}: {lost} heads have scores of their own for the dims that they write, which have no place here; "
                          "each head comes whole, with its own score.", stacklevel=2)
        return NodeScores(found, some)
    except (KeyError, TypeError, ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no file of node scores for this model: {type(error).__name__}: {error}.") from error


def _cfg(model: Any, space: NodeSpace) -> dict[str, Any]:
    heads = next((shape[0] for key, shape in space.present.items() if key.granularity == "head"), 0)
    return {"n_layers": space.n_layers, "n_heads": heads, "parallel_attn_mlp": bool(getattr(model.cfg, "parallel_attn_mlp", False)),
            "d_model": space.d_model}


def _names(space: NodeSpace) -> list[tuple[str, int, int | None]]:
    """The board's name of every head and MLP block, its layer, and which head it is."""
    found: list[tuple[str, int, int | None]] = []
    for layer in range(space.n_layers):
        heads = space.present.get(GateKey("head", layer), (0,))[0]
        found += [(f"a{layer}.h{head}", layer, head) for head in range(heads)]
        found += [(f"m{layer}", layer, None)] if GateKey("mlp", layer) in space.present else []
    return found


def _fields(scores: NodeScores, layer: int, head: int | None, unscored: float) -> tuple[float, Tensor]:
    """A head's or MLP's score, the highest below it, and the scores of the dims that it writes: [d_model], or [] for one for all."""
    granularities = ("head", "attn_neuron") if head is not None else ("mlp", "mlp_neuron", "mlp_out")
    keys = [key for granularity in granularities if (key := GateKey(granularity, layer)) in scores.gates]
    values = [scores.gates[key] if head is None else scores.gates[key][head] for key in keys]
    if not values:
        return unscored, torch.tensor(unscored, dtype=torch.float32)
    highest = float(torch.cat([value.flatten() for value in values]).max())
    fine = [value for key, value in zip(keys, values, strict=True) if key.granularity == "mlp_out"]
    return highest, fine[0] if fine else torch.tensor(highest, dtype=torch.float32)
