"""The MIB bench runs, takes up what is there, and its figures follow from the measurements."""

from __future__ import annotations

import json
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

import tl_nodeprune as tlnp

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import mib  # noqa: E402


def row(method: str, cmd: float, cpr: float, f: list[float]) -> dict[str, Any]:
    return {"task": "toy/ioi", "level": "neuron", "seed": 0, "method": method, "cmd": cmd, "cpr": cpr, "train_cmd": cmd, "train_cpr": cpr,
            "f": f, "seconds": 1.0}


def test_the_figures_follow_from_the_measurements() -> None:
    rows = [row("attribution, x", 0.4, 1.3, [0.0] * 9 + [1.0]), row("attribution, y", 0.2, 0.9, [0.5] * 9 + [1.0]),
            row("ours, KL", 0.01, 1.6, [0.25] * 9 + [1.0]), row(mib.FOR_CMD, 0.05, 0.9, [0.25] * 9 + [1.0]),
            row(mib.FOR_CPR, 0.3, 1.5, [0.5] * 8 + [2.0, 1.0]),
            row("random 0", 0.7, 0.3, [0.0] * 9 + [1.0]), row("random 1", 0.9, 0.1, [0.0] * 9 + [1.0])]
    text = mib.table(rows)
    floor = 0.199 * 0.5 + 0.3 * 0.25
    assert "CMD, ours / best attribution: 0.25 (to reach: 0.5)" in text and f": {floor:.4f}, {floor / 0.2:.2f} of the best" in text
    assert "CPR, ours and best attribution: 1.500, 1.300" in text and "| random, mean | 0.8 | 0.2 |" in text


def test_it_runs_and_runs_no_measurement_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--out", str(tmp_path), "--tasks", "toy/gendered_pronoun", "--levels", "node", "--toy-prompts", "16", "--steps", "1",
               "--trained-steps", "1", "--draws", "1"]
    mib.main(options)
    rows = json.loads((tmp_path / "results.json").read_text())
    attributions = [name for name in mib.SCORES if name.startswith("attribution")]
    assert {entry["method"] for entry in rows} == {*attributions, *mib.TRAINED, *mib.OURS, "random 0"}
    assert all(len(entry["f"]) == len(tlnp.mib.SIZES) for entry in rows)
    assert all(entry["f"][-1] == pytest.approx(1, abs=1e-5) for entry in rows)
    capsys.readouterr()
    mib.main(options)
    assert json.loads((tmp_path / "results.json").read_text()) == rows and "CMD 0" not in capsys.readouterr().out.split("##")[0]
    assert "CMD, ours / best attribution" in (tmp_path / "table.md").read_text()


def test_no_ranking_is_outside_the_bounds(toy: tuple[Any, tlnp.PromptPairs]) -> None:
    model, prompts = toy[0], toy[1][:6]
    masks = model.add_node_masks(("attn", "mlp"))
    try:
        found = mib.bounds(model, masks.space, prompts)
    finally:
        model.remove_node_masks()
    sets = [(c[i % 3], *c) for i, c in enumerate(combinations(range(6), 3))]  # each three nodes, with each node as the best of some
    assert {first for first, *_ in sets} == set(range(6))
    scores = [tlnp.NodeScores.from_flat(torch.zeros(6).index_add_(0, torch.tensor(nodes), torch.ones(4)), masks.space) for nodes in sets]
    curves = [tlnp.mib.evaluate(model, each, prompts) for each in scores]
    nearest = [min(abs(1 - curve.f[i]) for curve in curves) for i in range(10)]
    assert [abs(1 - f) for f in found["f"]] == pytest.approx(nearest, abs=1e-5) and found["nodes"] == list(curves[0].nodes)
    assert found["cmd"] <= min(curve.cmd for curve in curves) + 1e-6 and found["cpr"] >= max(curve.cpr for curve in curves) - 1e-6
