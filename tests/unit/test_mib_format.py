"""The board's JSON: what stands where, there and back, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tl_nodeprune as tlnp
from tl_nodeprune.nodes import GateKey
from tl_nodeprune.probe import find_nodes
from tl_nodeprune.scores import NodeScores

Toy = tuple[Any, tlnp.PromptPairs]


def lot(model: Any, *granularities: str) -> NodeScores:
    space = find_nodes(model).restrict(granularities or None)
    return NodeScores.from_flat(torch.rand(space.free_total(), generator=torch.Generator().manual_seed(0)), space)


@pytest.mark.parametrize(("level", "fine"), [("node", "mlp"), ("neuron", "mlp_out")])
def test_there_and_back(toy: Toy, tmp_path: Path, level: str, fine: str) -> None:
    scores = lot(toy[0], "head", fine)
    tlnp.mib.write(toy[0], scores, tmp_path / "scores.json", level=level)
    again = tlnp.mib.read(toy[0], tmp_path / "scores.json")
    assert again.space == scores.space and torch.equal(again.flat, scores.flat)
    assert list(tmp_path.iterdir()) == [tmp_path / "scores.json"]


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


def test_the_file_as_the_board_has_it(toy: Toy, tmp_path: Path) -> None:
    model, path = toy[0], tmp_path / "scores.json"
    scores = lot(model, "head", "mlp_out")
    tlnp.mib.write(model, scores, path, level="neuron", size=0.5)
    content, kept = json.loads(path.read_text()), scores.top(0.5)
    layers, heads, width = model.cfg.n_layers, model.cfg.n_heads, model.cfg.d_model
    assert content["cfg"] == {"n_layers": layers, "n_heads": heads, "parallel_attn_mlp": False, "d_model": width}
    names = {f"a{layer}.h{head}" for layer in range(layers) for head in range(heads)} | {f"m{layer}" for layer in range(layers)}
    assert set(content["nodes"]) == names | {"input", "logits"} and content["edges"] == {}
    for layer in range(layers):
        mlp, live = content["nodes"][f"m{layer}"], kept.live("mlp_out", layer)
        assert mlp["neurons"] == live.tolist() and mlp["in_graph"] == bool(live.any())
        assert mlp["score"] == max(mlp["neuron_scores"]) == float(scores.gates[GateKey("mlp_out", layer)].max())
        for head in range(heads):
            node = content["nodes"][f"a{layer}.h{head}"]
            assert node["neurons"] == [bool(kept.live("head", layer)[head])] * width == [node["in_graph"]] * width
            assert node["neuron_scores"] == [node["score"]] * width == [float(scores.gates[GateKey("head", layer)][head])] * width
    assert content["nodes"]["input"]["in_graph"] and content["nodes"]["input"]["score"] > float(scores.flat.max())


def test_finer_nodes_give_the_highest_score_below_and_unscored_ones_stand_above_all(toy: Toy, tmp_path: Path) -> None:
    model, path = toy[0], tmp_path / "scores.json"
    scores = lot(model, "attn_neuron", "mlp_neuron")
    tlnp.mib.write(model, scores, path)
    nodes = json.loads(path.read_text())["nodes"]
    assert nodes["a1.h2"]["score"] == float(scores.gates[GateKey("attn_neuron", 1)][2].max()) and "neurons" not in nodes["a1.h2"]
    assert nodes["m2"]["score"] == float(scores.gates[GateKey("mlp_neuron", 2)].max())
    tlnp.mib.write(model, lot(model, "head"), path)
    nodes = json.loads(path.read_text())["nodes"]
    assert nodes["m0"] == nodes["input"] and nodes["m0"]["score"] > max(nodes[f"a0.h{head}"]["score"] for head in range(4))


def test_what_cannot_be_written_is_named_and_nothing_is_written(toy: Toy, other_model: Any, tmp_path: Path) -> None:
    model, path = toy[0], tmp_path / "scores.json"
    for scores, options, text in (
        (lot(model, "head", "mlp"), {"level": "edge"}, "level='edge'; allowed: 'node', 'neuron'"),
        (lot(model, "attn", "mlp"), {}, "the board has no attn nodes"), (lot(other_model, "head"), {}, "of another model"),
        (lot(model, "head"), {"size": 2.0}, "size=2.0"),
    ):
        with pytest.raises(ValueError, match=text):
            tlnp.mib.write(model, scores, path, **options)
    with pytest.raises(FileNotFoundError):
        tlnp.mib.write(model, lot(model, "head"), tmp_path / "none" / "scores.json")
    assert not list(tmp_path.iterdir())


def test_what_has_no_place_is_said(toy: Toy, tmp_path: Path) -> None:
    model, path = toy[0], tmp_path / "scores.json"
    tlnp.mib.write(model, lot(model, "head", "mlp_out"), path, level="neuron")
    content = json.loads(path.read_text())
    content["nodes"]["a1.h2"]["neuron_scores"][3] += 1
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
    content["nodes"]["m0"]["neuron_scores"] = [0.0] * 96
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="m1, m2 have no neuron_scores, but other MLPs do"):
        tlnp.mib.read(toy[0], path)
    del content["nodes"]["m0"]["neuron_scores"]
    del content["nodes"]["a1.h2"]
    for text in (json.dumps(content), "{", "[]", path.read_text()[:200]):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"{path.name} is no file of node scores for this model"):
            tlnp.mib.read(toy[0], path)
