"""The command: one line on stderr and status 2 for bad input, two files for good."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import tl_nodeprune as tlnp
from tl_nodeprune.cli import main

Toy = tuple[Any, tlnp.PromptPairs]
ROW = {"clean": "So Mary is a really good friend, isn't", "corrupted": "So John is a really good friend, isn't",
       "answer": " she", "wrong": " he"}


def rows() -> list[dict[str, str]]:
    """Pairs of both genders over several names."""
    pairs = [(f, m) for f in ("Mary", "Anna", "Sarah", "Lisa") for m in ("John", "Tom", "James", "Peter")]
    text = "So {} is a really good friend, isn't"
    return ([{"clean": text.format(f), "corrupted": text.format(m), "answer": " she", "wrong": " he"} for f, m in pairs[::2]]
            + [{"clean": text.format(m), "corrupted": text.format(f), "answer": " he", "wrong": " she"} for f, m in pairs[1::2]])


@pytest.mark.parametrize(("change", "text"), [
    ({"--task": "chess"}, "'chess' is no task (ioi, gendered_pronoun, greater_than) and no file"),
    ({"--task": "missing.jsonl"}, "'missing.jsonl'"),
    ({"--max-kl": "-1"}, "--max-kl -1.0"),
    ({"--max-kl": "nan"}, "nan"),
    ({"--ablation": "noise"}, "unknown ablation 'noise'"),
    ({"--granularities": "heads"}, "unknown granularity 'heads'"),
    ({"--prompts": "0"}, "n=0"),
    ({"--device": "cuda:99"}, "--device 'cuda:99' cannot be used here"),
    ({"--out": __file__}, "test_cli.py' is a file; give a folder"),
])
def test_bad_input_is_one_line_and_2(tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, str], text: str) -> None:
    options = {"--model": "toy", "--task": "ioi", "--out": str(tmp_path / "out"), "--prompts": "8"} | change
    assert main(["prune", *(word for pair in options.items() for word in pair)]) == 2
    error = capsys.readouterr().err
    assert text in error and error.startswith("tl-nodeprune: ") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("bad", "text"), [("{", "line 2"), (json.dumps(ROW | {"answer": " Mary John"}), "2 tokens"),
                                           (json.dumps(ROW | {"corrupted": "So Mary"}), "prompt 1")])
def test_bad_task_file_is_one_line_and_2(tmp_path: Path, capsys: pytest.CaptureFixture[str], bad: str, text: str) -> None:
    path = tmp_path / "task.jsonl"
    path.write_text(json.dumps(ROW) + "\n" + bad + "\n")
    assert main(["prune", "--model", "toy", "--task", str(path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert text in error and error.count("\n") == 1


def test_usage_error_is_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["prune", "--model", "toy"])
    assert stop.value.code == 2 and "--task" in capsys.readouterr().err


def test_prune_writes_both_files(toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task, out = tmp_path / "task.jsonl", tmp_path / "new" / "out"
    task.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    assert main(["prune", "--model", "toy", "--task", str(task), "--max-kl", "0.2", "--out", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["circuit.safetensors", "report.json"]
    report, circuit = json.loads((out / "report.json").read_text()), tlnp.Circuit.load(out / "circuit.safetensors")
    circuit.check_fits(toy[0])
    assert report["live"] == circuit.count() and report["settings"]["max_kl"] == 0.2 and 0 < circuit.size < circuit.size_total
    assert report["converged"] is True and report["kl"] <= 0.2 and {"circuit", "full", "ablated"} <= set(report["held_out"])
    assert "leaf nodes" in capsys.readouterr().out
