"""Node scores in the files of MIB's circuit track, for submissions at node and neuron level, and back.

The board reads two formats, and a file's name says which: `.pt`, what `torch.load` reads, and `.json`, which at neuron level grows with the
square of the heads. Both hold one graph: "input", heads "aL.hH" and MLP blocks "mL", layer by layer (nodes), and who reads them (edges)::

    .pt:   {"cfg": {"n_layers", "n_heads", "parallel_attn_mlp", "d_model"}, "src_nodes": names, "dst_nodes": names,
            "nodes_in_graph": [node], "nodes_scores": [node], "neurons_in_graph": [node d_model], "neurons_scores": [node d_model],
            "edges_in_graph": [node reader], "edges_scores": [node reader]}
    .json: {"cfg", "nodes": {name: {"in_graph", "score", "neurons", "neurons_scores"}}, "edges": {"a0.h1->m0": {"in_graph", "score"}}}

A node without a score, NaN in `.pt`, is always kept and not counted: "input", and whatever was not scored. In `.json` "neurons" and
"neurons_scores" of a head are those of all heads of its layer, [head d_model], since the board's reader puts them in the place of the
whole layer. All edges that leave a kept node are true.

What maps onto it. Scores of ("head", "mlp") are a node-level submission exactly. The board's neurons are the d_model dims of what a node
writes: an MLP's are our mlp_out nodes, so scores of ("head", "mlp_out") are a neuron-level submission in which a head comes whole, all
d_model dims with the head's score (and counts as d_model neurons there, as one node in `mib.evaluate`). Dims of a head before W_O and MLP
neurons before W_out have no place on the board: a head or MLP then has the highest score of the nodes below it, which is an approximation;
rank at the board's own granularities instead.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import warnings
from collections.abc import Mapping
from dataclasses import replace
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tl_nodeprune.circuit import NodeScores, files
from tl_nodeprune.nodes import GateKey, NodeSpace, check_types, find_nodes, reraise_memory

LEVELS: tuple[str, ...] = ("node", "neuron")
_Graph = dict[str, Any]  # as the `.pt` file has it
_Name = tuple[str, int, int | None]


def write(model: Any, scores: NodeScores, path: str | Path, *, level: str = "node", size: float | int = 1.0) -> None:
    """Write scores as the board reads them; all of it or nothing. What is exported, and what is not, is at the head of this module.

    path: a name that ends in `.pt` asks for that format, any other for JSON. level: "node", or "neuron" with a score for each dim that a
    node writes as well. size: of the circuit in the file, the best nodes, a share as a float (rounded down, as the board does), a count as
    an int; 1.0: all, the scores decide.

    Raises: TypeError for what is no NodeScores; ValueError for another level or size, scores of another model, or of whole attention blocks
    or layers, which the board lacks; OSError where the file cannot be written.
    """
    check_types(write, locals())
    if level not in LEVELS:
        raise ValueError(f"level={level!r}; allowed: {', '.join(map(repr, LEVELS))}.")
    path, space = files.as_path(path), find_nodes(model)
    scores.space.check_fits(space, "these scores are of")
    if lacking := {key.granularity for key in scores.gates} & {"attn", "layer"}:
        raise ValueError(f"the board has no {' or '.join(sorted(lacking))} nodes; rank heads and MLPs, or finer nodes.")
    graph = _graph(model, space, scores, board_count(scores, size), level)
    if path.suffix == ".pt":
        torch.save(graph, buffer := io.BytesIO())
        files.write(path, buffer.getvalue())
    else:
        files.write(path, json.dumps(_as_json(graph)))


def read(model: Any, path: str | Path) -> NodeScores:
    """Scores from such a file: of ("head", "mlp"), or where it has scores of MLPs' neurons of ("head", "mlp_out"), as far as it has them.
    A warning says where those of a head's dims are left out.

    Raises: FileNotFoundError; ValueError for a file that is damaged, of another model, or scores only some heads of a layer.
    """
    check_types(read, locals())
    path, space = files.as_path(path), find_nodes(model)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}.")
    try:
        data = path.read_bytes()
        tensors = path.suffix == ".pt"
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True) if tensors else json.loads(data)
        cfg = _cfg(model, space)
        if any(content["cfg"][name] != value for name, value in cfg.items() if name != "parallel_attn_mlp"):
            raise ValueError(f"it is of another model, {content['cfg']}; this one is {cfg}")
        nodes, neurons = (_from_tensors if tensors else _from_json)(content, space, _names(cfg))
        return _scores(space, nodes, neurons, path)
    except (LookupError, TypeError, ValueError, RuntimeError, AttributeError, EOFError, OverflowError, pickle.UnpicklingError) as error:
        reraise_memory(error)
        raise ValueError(f"{path} is not a file of node scores for this model: {type(error).__name__}: {error}.") from error


def board_count(scores: NodeScores, size: float | int) -> int:
    """How many nodes the board takes for a share: rounded down, none for a small one. A count stays. Raises as `NodeScores.count`."""
    most = scores.count(size)
    return most if isinstance(size, Integral) else int(size * scores.n)


def _graph(model: Any, space: NodeSpace, scores: NodeScores, count: int, level: str) -> _Graph:
    kept, cfg = scores.top(count), _cfg(model, space)
    live = NodeScores({key: kept.live(*key) for key in scores.gates}, scores.space)
    names, readers = _names(cfg), _readers(cfg)
    edges = torch.arange(len(names))[:, None] < torch.tensor(list(readers.values()))
    nodes, on = torch.full((len(names),), math.nan), torch.ones(len(names), dtype=torch.bool)
    neurons, neurons_on = nodes[:, None].repeat(1, space.d_model), on[:, None].repeat(1, space.d_model)
    for row, (_, layer, head) in enumerate(names[1:], start=1):
        if (found := _fields(scores, layer, head)) is not None:
            nodes[row], neurons[row] = found
            on[row], neurons_on[row] = (value.bool() for value in _fields(live, layer, head) or ())
    graph = {"cfg": cfg, "src_nodes": [name for name, *_ in names], "dst_nodes": list(readers), "nodes_in_graph": on,
             "nodes_scores": nodes, "edges_in_graph": edges & on[:, None], "edges_scores": torch.zeros(edges.shape)}
    return graph | ({"neurons_in_graph": neurons_on, "neurons_scores": neurons} if level == "neuron" else {})


def _as_json(graph: _Graph) -> dict[str, Any]:
    heads, nodes = graph["cfg"]["n_heads"], dict[str, Any]()
    for row, name in enumerate(graph["src_nodes"]):
        nodes[name] = node = dict[str, Any](in_graph=bool(graph["nodes_in_graph"][row]))
        first = row - int(name.split(".h")[1]) if ".h" in name else row
        rows = slice(first, first + heads) if ".h" in name else row
        if scored := not graph["nodes_scores"][row].isnan():
            node["score"] = float(graph["nodes_scores"][row])
        if "neurons_scores" in graph:
            node["neurons"] = graph["neurons_in_graph"][rows].tolist()
            if scored:
                node["neurons_scores"] = graph["neurons_scores"][rows].tolist()
    edges = {f"{graph['src_nodes'][row]}->{graph['dst_nodes'][column]}": {"score": 0.0, "in_graph": True}
             for row, column in graph["edges_in_graph"].nonzero().tolist()}
    return {"cfg": graph["cfg"], "nodes": nodes | {"logits": {"in_graph": True}}, "edges": edges}


def _from_json(content: Mapping[str, Any], space: NodeSpace, names: list[_Name]) -> tuple[Tensor, Tensor]:
    """Scores [node] and [node d_model] of what a JSON file scores, NaN elsewhere."""
    nodes, neurons = torch.full((len(names),), math.nan), torch.full((len(names), space.d_model), math.nan)
    for row, (name, layer, head) in enumerate(names[1:], start=1):
        if GateKey("mlp" if head is None else "head", layer) not in space.present:
            continue
        fields = content["nodes"][name]
        nodes[row] = float(fields["score"]) if "score" in fields else math.nan
        if "neurons_scores" in fields:
            given = torch.tensor(fields["neurons_scores"], dtype=torch.float32)
            neurons[row] = given[head] if head is not None and given.ndim == 2 else given
    return nodes, neurons


def _from_tensors(content: Mapping[str, Any], space: NodeSpace, names: list[_Name]) -> tuple[Tensor, Tensor]:
    """The same of a file of tensors."""
    shape = (len(names), space.d_model)
    found = content.get("nodes_scores"), content.get("neurons_scores")
    nodes, neurons = (torch.full(shape[:ndim], math.nan) if given is None else given.float() for ndim, given in enumerate(found, start=1))
    if (*nodes.shape, *neurons.shape) != (shape[0], *shape):
        raise ValueError(f"its scores are {list(nodes.shape)} and {list(neurons.shape)}, expected {[shape[0]]} and {list(shape)}")
    return nodes, neurons


def _scores(space: NodeSpace, nodes: Tensor, neurons: Tensor, path: Path) -> NodeScores:
    """The scores of heads, and of MLPs' dims where there are any, else of whole MLPs."""
    highest = neurons.nan_to_num(-math.inf).amax(1)  # for a file of neurons alone
    nodes = torch.where(nodes.isnan() & highest.isfinite(), highest, nodes)
    heads, found, lost = _heads(space), dict[GateKey, Tensor](), 0
    scored = {layer: row for layer in range(space.n_layers) if GateKey("mlp", layer) in space.present
              and not nodes[row := (layer + 1) * (heads + 1)].isnan()}
    fine = [layer for layer, row in scored.items() if not neurons[row].isnan().all()]
    if fine and len(fine) < len(scored):
        raise ValueError(f"{', '.join(f'm{layer}' for layer in scored if layer not in fine)} have no neurons_scores, but other MLPs do")
    for layer, row in scored.items():
        found[GateKey("mlp_out" if fine else "mlp", layer)] = neurons[row] if fine else nodes[row]
    for layer in range(space.n_layers):
        rows = slice(1 + layer * (heads + 1), (layer + 1) * (heads + 1))
        if GateKey("head", layer) in space.present and not nodes[rows].isnan().all():
            found[GateKey("head", layer)] = nodes[rows]
            lost += int(((neurons[rows] != nodes[rows, None]) & ~neurons[rows].isnan()).any(1).sum())
    if not found:
        raise ValueError("it scores no node")
    if lost:
        warnings.warn(f"{path}: {lost} heads have scores of their own for the dims that they write, which have no place here; "
                      "each head comes whole, with its own score.", stacklevel=3)
    return NodeScores(found, replace(space, shapes={key: shape for key, shape in space.present.items() if key in found}))


def _heads(space: NodeSpace) -> int:
    counts = {shape[0] for key, shape in space.present.items() if key.granularity == "head"}
    if len(counts) > 1:
        raise ValueError(f"the board has models with one number of heads in all layers, this one has {sorted(counts)}")
    return max(counts, default=0)


def _cfg(model: Any, space: NodeSpace) -> dict[str, Any]:
    return {"n_layers": space.n_layers, "n_heads": _heads(space), "parallel_attn_mlp": bool(getattr(model.cfg, "parallel_attn_mlp", False)),
            "d_model": space.d_model}


def _names(cfg: Mapping[str, Any]) -> list[_Name]:
    """The board's name of "input", every head and every MLP block, in its order; its layer, and which head it is."""
    found: list[_Name] = [("input", -1, None)]
    for layer in range(cfg["n_layers"]):
        found += [*((f"a{layer}.h{head}", layer, head) for head in range(cfg["n_heads"])), (f"m{layer}", layer, None)]
    return found


def _readers(cfg: Mapping[str, Any]) -> dict[str, int]:
    """The board's name of everything that reads, in its order, and how many of the nodes come before it."""
    found, heads = dict[str, int](), cfg["n_heads"]
    for layer in range(cfg["n_layers"]):
        before = 1 + layer * (heads + 1)
        found |= {f"a{layer}.h{head}<{letter}>": before for letter in "qkv" for head in range(heads)}
        found[f"m{layer}"] = before if cfg["parallel_attn_mlp"] else before + heads
    return found | {"logits": 1 + cfg["n_layers"] * (heads + 1)}


def _fields(scores: NodeScores, layer: int, head: int | None) -> tuple[Tensor, Tensor] | None:
    """A head's or MLP's score, the highest below it, and the scores of the dims that it writes: [d_model], or [] for one for all. None
    where it has none."""
    granularities = ("head", "attn_neuron") if head is not None else ("mlp", "mlp_neuron", "mlp_out")
    keys = [key for granularity in granularities if (key := GateKey(granularity, layer)) in scores.gates]
    values = [scores.gates[key] if head is None else scores.gates[key][head] for key in keys]
    if not values:
        return None
    highest = torch.cat([value.flatten() for value in values]).max()
    fine = [value for key, value in zip(keys, values, strict=True) if key.granularity == "mlp_out"]
    return highest, fine[0] if fine else highest
