"""What is known about a circuit: filled in by the search, kept by files, shown by print and the command."""

from __future__ import annotations

import hashlib
import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch

import tl_nodeprune as tlnp
from tl_nodeprune.cli.main import main

Toy = tuple[Any, tlnp.PromptPairs]
EVERYTHING = tlnp.About("IOI", "tried\ntwice, naïve", "toy", "max_kl=0.05", "KL", 0.04, (0.03, 0.05), 0.9, False, 50, 150, 3,
                        {"torch": "2.4", "tl_nodeprune": "0.1.0"})


def heads(toy: Toy) -> tlnp.Circuit:
    return tlnp.Circuit.from_nodes(toy[0], {"head": [(1, 2), (2, 0)]})


@pytest.mark.parametrize("about", [tlnp.About(), tlnp.About(notes="only this"), EVERYTHING, replace(EVERYTHING, converged=True, kl=None)])
def test_a_file_keeps_it(toy: Toy, tmp_path: Path, about: tlnp.About) -> None:
    path, circuit = tmp_path / "c.safetensors", heads(toy)
    circuit.with_about(about).save(path)
    back = tlnp.Circuit.load(path)
    assert back.about == about and back == circuit and circuit.about == tlnp.About()
    back.save(path, notes="another")
    assert tlnp.Circuit.load(path).about == replace(about, notes="another")


def test_a_file_of_a_circuit_of_which_nothing_is_known_is_as_before(toy: Toy, tmp_path: Path) -> None:
    """An older file is one without the field, and an older version reads the new one."""
    heads(toy).save(tmp_path / "c.safetensors")
    with safetensors.safe_open(str(tmp_path / "c.safetensors"), framework="pt") as file:
        assert set(file.metadata()) == {"format", "ablation", "space", "sha256"}


@pytest.mark.parametrize("text", ["[]", "{", '{"kl": "x"}', '{"kl": NaN}', '{"other": 1}', '{"interval": [1.0]}', '{"task": 3}', ""])
def test_a_file_with_another_account_is_damaged(toy: Toy, tmp_path: Path, text: str) -> None:
    """With a checksum that fits, so that the schema refuses it."""
    path = tmp_path / "c.safetensors"
    heads(toy).with_about(tlnp.About(task="marker")).save(path)
    old = path.read_bytes()
    length = int.from_bytes(old[:8], "little")
    header = json.loads(old[8:8 + length])
    header["__metadata__"] |= {"about": text, "sha256": "0" * 64}
    new = json.dumps(header, separators=(",", ":")).encode()
    new += b" " * (-len(new) % 8)
    whole = len(new).to_bytes(8, "little") + new + old[8 + length:]
    path.write_bytes(whole.replace(b"0" * 64, hashlib.sha256(whole).hexdigest().encode(), 1))
    with pytest.raises(ValueError, match=r"c\.safetensors is damaged or not a circuit"):
        tlnp.Circuit.load(path)


@pytest.mark.parametrize("notes", ["x" * 100_001, "\ud800"])
def test_notes_that_no_file_could_hold(toy: Toy, tmp_path: Path, notes: str) -> None:
    with pytest.raises(ValueError, match="this circuit cannot be saved"):
        heads(toy).save(tmp_path / "c.safetensors", notes=notes)
    assert not list(tmp_path.iterdir())


def test_the_search_fills_it_in(toy: Toy, tmp_path: Path, others: tlnp.PromptPairs) -> None:
    masks = toy[0].add_node_masks(("head", "mlp"))
    try:
        result = masks.prune(toy[1], max_kl=0.2, steps=5, seed=3, exact_tests=0, held_out=others, progress=False)
    finally:
        masks.remove()
    about = result.circuit.about
    assert about.budget == "max_kl=0.2" and about.seed == 3 and about.kl == result.kl and about.interval == result.interval
    assert (about.converged, about.held_out, about.searched) == (result.converged, 16, 24) and about.accuracy == result.accuracy
    assert about.model_name == toy[0].cfg.model_name and about.versions["torch"] == torch.__version__ and about.loss == "KL"
    result.circuit.save(tmp_path / "c.safetensors", task="ioi", notes="sent")
    assert tlnp.Circuit.load(tmp_path / "c.safetensors").about == replace(about, task="ioi", notes="sent")
    assert pickle.loads(pickle.dumps(result.circuit)).about == about
    smaller = result.at(max_nodes=4)
    assert smaller.circuit.about == replace(about, budget="max_nodes=4", kl=smaller.kl, interval=smaller.interval,
                                            accuracy=smaller.accuracy, converged=True)


def test_figures_do_not_go_over_to_other_circuits(toy: Toy) -> None:
    c = heads(toy).with_about(EVERYTHING)
    for other in (~c, c & c, c | c, c - ~c, c.at("head"), c.under("zero")):
        assert other.about == tlnp.About()
    assert c == heads(toy) and c.about == EVERYTHING


def test_print_and_the_command_say_it(toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    circuit = heads(toy).with_about(replace(EVERYTHING, notes="line\x1b[31m"))
    text = str(circuit)
    for part in (repr(circuit), "task: IOI", "budget: max_kl=0.05", "KL 0.04 nats (0.03 to 0.05, 90 %) on 50 prompts held out",
                 "NOT converged", "90% with the answer preferred", "seed: 3", "torch 2.4"):
        assert part in text
    assert "converged" in str(replace(EVERYTHING, converged=True)) and "untested" in str(replace(EVERYTHING, converged=None))
    assert "converged" not in str(replace(EVERYTHING, converged=True, budget="max_nodes=5")), "no KL was asked for"
    assert "\x1b" not in text and str(heads(toy)) == repr(heads(toy)) and "\n" not in repr(circuit)
    circuit.save(tmp_path / "c.safetensors")
    assert main(["show", str(tmp_path / "c.safetensors")]) == 0
    said = capsys.readouterr().out
    assert text in said and "Live nodes by layer:" in said
    assert main(["show", str(tmp_path / "c.safetensors"), "--html", str(tmp_path / "x.html"), "--model", "toy"]) == 2
    assert "--task missing: a page needs --html, --model and --task" in capsys.readouterr().err
