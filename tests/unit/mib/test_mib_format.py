"""The board's files: what stands where, how its reader takes them, there and back, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tl_nodeprune as tlnp
from tl_nodeprune.circuit.scores import NodeScores
from tl_nodeprune.nodes.probe import find_nodes
from tl_nodeprune.nodes.space import GateKey

Toy = tuple[Any, tlnp.PromptPairs]


def lot(model: Any, *granularities: str) -> NodeScores:
    space = find_nodes(model).restrict(granularities or None)
    return NodeScores.from_flat(torch.rand(space.free_total(), generator=torch.Generator().manual_seed(0)), space)


@pytest.mark.parametrize("kind", ["json", "pt"])
@pytest.mark.parametrize(("level", "chosen"), [
    ("node", ("head", "mlp")), ("neuron", ("head", "mlp_out")), ("node", ("head",)), ("node", ("mlp",)), ("neuron", ("mlp_out",))])
def test_there_and_back(toy: Toy, tmp_path: Path, level: str, chosen: tuple[str, ...], kind: str) -> None:
    scores, path = lot(toy[0], *chosen), tmp_path / f"scores.{kind}"
    tlnp.mib.write(toy[0], scores, path, level=level)
    again = tlnp.mib.read(toy[0], path)
    assert again.space == scores.space and torch.equal(again.flat, scores.flat)
    assert list(tmp_path.iterdir()) == [path]


def as_the_board_reads(path: Path) -> dict[str, torch.Tensor]:
    """A file as the board's Graph takes it: one row per node, NaN where it has no score. Of a head in JSON, `neurons` and `neurons_scores`
    go into the rows of all heads of its layer."""
    if path.suffix == ".pt":
        content = torch.load(path)
        assert len(content["src_nodes"]) == len(content["nodes_in_graph"]) and len(content["dst_nodes"]) == content["edges_scores"].shape[1]
        return content
    content = json.loads(path.read_text())
    heads, layers, width = (content["cfg"][name] for name in ("n_heads", "n_layers", "d_model"))
    order = ["input"]
    for layer in range(layers):
        order += [*(f"a{layer}.h{head}" for head in range(heads)), f"m{layer}"]
    graph = {"nodes_in_graph": torch.zeros(len(order)).bool(), "nodes_scores": torch.full((len(order),), torch.nan),
             "neurons": torch.zeros(len(order), width).bool(), "neurons_scores": torch.full((len(order), width), torch.nan)}
    for name, node in content["nodes"].items():
        if name == "logits":
            continue
        row = order.index(name)
        first = row - int(name.split("h")[1]) if "h" in name else row
        graph["nodes_in_graph"][row] = node["in_graph"]
        graph["nodes_scores"][row] = node.get("score", torch.nan)
        for key in {"neurons", "neurons_scores"} & set(node):
            graph[key][slice(first, first + heads) if "h" in name else row] = torch.tensor(node[key])
    graph["neurons_in_graph"] = graph.pop("neurons")
    return graph | {"edges": content["edges"]}


@pytest.mark.parametrize("kind", ["json", "pt"])
@pytest.mark.parametrize("size", [0.5, 1.0, 0])
def test_the_boards_reader_has_our_scores_and_our_circuit(toy: Toy, tmp_path: Path, kind: str, size: float) -> None:
    model, path = toy[0], tmp_path / f"scores.{kind}"
    scores = lot(model, "head", "mlp_out")
    tlnp.mib.write(model, scores, path, level="neuron", size=size)
    graph, kept = as_the_board_reads(path), scores.top(int(size * scores.n))
    assert graph["nodes_scores"][0].isnan() and graph["neurons_scores"][0].isnan().all(), "input is not counted"
    assert graph["nodes_in_graph"][0] and graph["neurons_in_graph"][0].all(), "and always kept"
    for layer in range(3):
        rows, mlp = slice(1 + 5 * layer, 5 + 5 * layer), 5 + 5 * layer
        heads, outs = scores.gates[GateKey("head", layer)], scores.gates[GateKey("mlp_out", layer)]
        assert torch.equal(graph["nodes_scores"][rows], heads) and torch.equal(graph["neurons_scores"][rows], heads[:, None].expand(4, 96))
        assert graph["nodes_scores"][mlp] == outs.max() and torch.equal(graph["neurons_scores"][mlp], outs)
        assert torch.equal(graph["nodes_in_graph"][rows], kept.live("head", layer))
        assert torch.equal(graph["neurons_in_graph"][rows], kept.live("head", layer)[:, None].expand(4, 96))
        assert torch.equal(graph["neurons_in_graph"][mlp], kept.live("mlp_out", layer))
        assert graph["nodes_in_graph"][mlp] == kept.live("mlp_out", layer).any()


@pytest.mark.parametrize("parallel", [False, True])
def test_edges_leave_every_kept_node_and_no_other(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parallel: bool) -> None:
    """By hand: a head is read by what comes after it, and by the MLP of its layer unless both run side by side."""
    model = toy[0]
    monkeypatch.setattr(model.cfg, "parallel_attn_mlp", parallel, raising=False)
    scores = lot(model, "head", "mlp")
    for kind in ("json", "pt"):
        tlnp.mib.write(model, scores, tmp_path / f"all.{kind}")
        tlnp.mib.write(model, scores, tmp_path / f"some.{kind}", size=3)
    every, some = (json.loads((tmp_path / f"{name}.json").read_text())["edges"] for name in ("all", "some"))
    assert len(every) == (1 + 6 + 11) * (3 * 4 + 1) + (0 if parallel else 3 * 4) + 16, "4 heads read three times, an MLP once, then logits"
    assert {"input->a0.h0<q>", "m1->a2.h3<v>", "a1.h2->logits", "input->m0"} <= set(every) and "m1->a1.h0<q>" not in every
    assert ("a1.h2->m1" in every) is not parallel and all(edge["in_graph"] for edge in every.values())
    kept = {name for name, node in json.loads((tmp_path / "some.json").read_text())["nodes"].items() if node["in_graph"]} - {"logits"}
    assert len(kept) == 4 and some == {name: edge for name, edge in every.items() if name.split("->")[0] in kept}
    for name, edges in (("all", every), ("some", some)):
        graph = torch.load(tmp_path / f"{name}.pt")
        pairs = {f"{graph['src_nodes'][row]}->{graph['dst_nodes'][column]}" for row, column in graph["edges_in_graph"].nonzero().tolist()}
        assert pairs == set(edges)


def test_the_boards_own_files(toy: Toy, tmp_path: Path) -> None:
    """The board's attributions: scores of neurons alone, edges' scores, NaN for input."""
    neurons = torch.rand(16, 96, generator=torch.Generator().manual_seed(0)) - 0.5
    neurons[0] = torch.nan
    cfg = {"n_layers": 3, "n_heads": 4, "parallel_attn_mlp": False, "d_model": 96}
    common = {"cfg": cfg, "src_nodes": [], "dst_nodes": [], "edges_scores": torch.rand(16, 40),
              "edges_in_graph": torch.zeros(16, 40).bool(), "nodes_in_graph": torch.zeros(16).bool()}
    torch.save(common | {"neurons_scores": neurons, "neurons_in_graph": neurons > 0}, tmp_path / "neurons.pt")
    with pytest.warns(UserWarning, match="12 heads have scores of their own for the dims"):
        found = tlnp.mib.read(toy[0], tmp_path / "neurons.pt")
    assert torch.equal(found["blocks.1.hook_mlp_out"], neurons[10]) and torch.equal(found["blocks.2.attn.hook_z"], neurons[11:15].amax(1))
    nodes = neurons[:, 0].clone()
    torch.save(common | {"nodes_scores": nodes}, tmp_path / "nodes.pt")
    found = tlnp.mib.read(toy[0], tmp_path / "nodes.pt")
    assert found["blocks.0.hook_mlp_out"] == nodes[5] and torch.equal(found["blocks.0.attn.hook_z"], nodes[1:5])
    assert found.n == 15 and tlnp.mib.evaluate(toy[0], found, toy[1]).nodes[-1] == 15
    for bad, text in ((common, "it scores no node"), (common | {"nodes_scores": nodes[:9]}, r"its scores are \[9\]"),
                      (common | {"cfg": cfg | {"n_heads": 3}}, "another model"), ({"cfg": cfg | {"n_layers": 10**9}}, "another model"),
                      (common | {"nodes_scores": nodes.masked_fill(torch.arange(16) == 2, torch.nan)}, "NaN or inf"), ([1], "TypeError"),
                      (common | {"nodes_scores": nodes.masked_fill(torch.arange(16) == 2, torch.inf)}, "NaN or inf")):
        torch.save(bad, tmp_path / "bad.pt")
        with pytest.raises(ValueError, match=f"bad.pt is not a file of node scores for this model: .*{text}"):
            tlnp.mib.read(toy[0], tmp_path / "bad.pt")
    for data in (b"", b"PK", b"\x80\x02cos\nsystem\n.", (tmp_path / "nodes.pt").read_bytes()[:-99]):
        (tmp_path / "bad.pt").write_bytes(data)
        with pytest.raises(ValueError, match="bad.pt is not a file of node scores for this model"):
            tlnp.mib.read(toy[0], tmp_path / "bad.pt")


def test_there_and_back_beside_masks_that_cut(toy: Toy, tmp_path: Path) -> None:
    scores = lot(toy[0], "head", "mlp")
    masks = toy[0].add_node_masks(("head", "mlp"))
    try:
        masks.set_to(scores.top(3))
        tlnp.mib.write(toy[0], scores, tmp_path / "scores.json")
        assert tlnp.mib.read(toy[0], tmp_path / "scores.json") == scores
        scores.top(3).check_fits(toy[0])
    finally:
        toy[0].remove_node_masks()


def test_finer_nodes_give_the_highest_score_below_and_unscored_ones_none(toy: Toy, tmp_path: Path) -> None:
    model, path = toy[0], tmp_path / "scores.json"
    scores = lot(model, "attn_neuron", "mlp_neuron")
    tlnp.mib.write(model, scores, path)
    nodes = json.loads(path.read_text())["nodes"]
    assert nodes["a1.h2"]["score"] == float(scores.gates[GateKey("attn_neuron", 1)][2].max()) and "neurons" not in nodes["a1.h2"]
    assert nodes["m2"]["score"] == float(scores.gates[GateKey("mlp_neuron", 2)].max())
    tlnp.mib.write(model, lot(model, "head"), path)
    nodes = json.loads(path.read_text())["nodes"]
    assert nodes["m0"] == nodes["input"] == {"in_graph": True} and "score" in nodes["a0.h0"]


def test_what_cannot_be_written_is_named_and_nothing_is_written(toy: Toy, other_model: Any, tmp_path: Path) -> None:
    model, path = toy[0], tmp_path / "scores.json"
    for scores, options, text in (
        (lot(model, "head", "mlp"), {"level": "edge"}, "level='edge'; allowed: 'node', 'neuron'"),
        (lot(model, "attn", "mlp"), {}, "the board has no attn nodes"), (lot(other_model, "head"), {}, "of another model"),
        (lot(model, "head"), {"size": 2.0}, "size=2.0"), (lot(model, "head"), {"path": ""}, "path=''"),
    ):
        with pytest.raises(ValueError, match=text):
            tlnp.mib.write(model, scores, **{"path": path} | options)
    with pytest.raises(FileNotFoundError):
        tlnp.mib.write(model, lot(model, "head"), tmp_path / "none" / "scores.json")
    assert not list(tmp_path.iterdir())


def test_what_has_no_place_is_said(toy: Toy, tmp_path: Path) -> None:
    model, path = toy[0], tmp_path / "scores.json"
    tlnp.mib.write(model, lot(model, "head", "mlp_out"), path, level="neuron")
    content = json.loads(path.read_text())
    content["nodes"]["a1.h2"]["neurons_scores"][2][3] += 1
    path.write_text(json.dumps(content))
    with pytest.warns(UserWarning, match="1 heads have scores of their own for the dims that they write"):
        tlnp.mib.read(model, path)
    effects = tlnp.crosscheck.attribution_patching(model, toy[1], ["head", "mlp"])
    with pytest.raises(TypeError, match="scores must be NodeScores, got Effects; .*NodeScores.from_effects"):
        tlnp.mib.write(model, effects, path)  # type: ignore[arg-type]


def test_what_cannot_be_read_is_named(toy: Toy, other_model: Any, tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    with pytest.raises(FileNotFoundError):
        tlnp.mib.read(toy[0], path)
    tlnp.mib.write(toy[0], lot(toy[0], "head", "mlp"), path)
    with pytest.raises(ValueError, match="it is of another model"):
        tlnp.mib.read(other_model, path)
    content = json.loads(path.read_text())
    content["nodes"]["m0"]["neurons_scores"] = [0.0] * 96
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="m1, m2 have no neurons_scores, but other MLPs do"):
        tlnp.mib.read(toy[0], path)
    del content["nodes"]["m0"]["neurons_scores"]
    del content["nodes"]["a1.h2"]
    for text in (json.dumps(content), "{", "[]", "[" * 10**5, "3", path.read_text()[:200]):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"{path.name} is not a file of node scores for this model"):
            tlnp.mib.read(toy[0], path)
