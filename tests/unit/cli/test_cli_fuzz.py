"""Whatever is typed and whatever is in the files: an exit status that means something, one line, and nothing of the user's is lost."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import tl_nodeprune as tlnp
from tl_nodeprune.cli.inputs import load_model
from tl_nodeprune.cli.main import main
from tl_nodeprune.nodes.probe import find_nodes

Toy = tuple[Any, tlnp.PromptPairs]
Damage = Callable[[Path], Any]
ROW = {"clean": "So Mary is a really good friend, isn't", "corrupted": "So John is a really good friend, isn't", "answer": " she",
       "wrong": " he"}


def config(**change: Any) -> Damage:
    return lambda folder: (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | change))


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n.")


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Damage:
    def damage(folder: Path) -> None:
        tensors = safetensors.torch.load((folder / "model.safetensors").read_bytes())
        change(tensors)
        (folder / "model.safetensors").write_bytes(safetensors.torch.save(tensors, {"format": "pt"}))

    return damage


DAMAGES: dict[str, Damage] = {
    "truncated": lambda folder: os.truncate(folder / "model.safetensors", 500), "pickle": pickled,
    "no weights": lambda folder: (folder / "model.safetensors").unlink(), "empty": lambda folder: [p.unlink() for p in folder.iterdir()],
    "a shape": weights(lambda tensors: tensors.update({"transformer.wte.weight": torch.ones(3, 3)})),
    "a word for a number": config(n_embd="big"), "hidden_size": config(hidden_size="big"), "minus": config(n_layer=-1),
    "no heads": config(n_head=0), "no layers": config(n_layer=0), "another type": config(model_type="nope"),
    "BERT": config(model_type="bert"),
    "no JSON": lambda folder: (folder / "config.json").write_text("{"), "a list": lambda folder: (folder / "config.json").write_text("[]"),
    "empty tokenizer": lambda folder: (folder / "tokenizer.json").write_text(""),
    "no tokenizer": lambda folder: (folder / "tokenizer.json").unlink(),
    "bytes": lambda folder: (folder / "tokenizer.json").write_bytes(b"\xff\xfe\x00"),
    "settings": lambda folder: (folder / "tokenizer_config.json").write_text("[]"),
}


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small untrained model with the embedded model's tokenizer, as a folder."""
    folder = tmp_path_factory.mktemp("model") / "small"
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, n_positions=32, vocab_size=199)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tlnp.toy.FOLDER / name, folder / name)
    return folder


def broken(folder: Path, name: str, where: Path) -> Path:
    if not where.exists():
        shutil.copytree(folder, where)
        DAMAGES[name](where)
    return where


@pytest.mark.parametrize("name", DAMAGES)
def test_a_broken_model_folder_is_one_line(small_folder: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = broken(small_folder, name, tmp_path / "model")
    assert main(["prune", "--model", str(model), "--task", "ioi", "--prompts", "8", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("tl-nodeprune: ") and error.count("\n") == 1 and not (tmp_path / "out" / "circuit.safetensors").exists()


def test_weights_that_are_missing_are_reported(small_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers makes new ones, at random, and TransformerLens silences the report."""
    monkeypatch.setattr(__import__("logging").getLogger("transformers"), "propagate", True)
    shutil.copytree(small_folder, tmp_path / "model")
    weights(lambda tensors: tensors.pop("transformer.h.0.mlp.c_fc.weight"))(tmp_path / "model")
    load_model(str(small_folder), "cpu")
    assert "MISSING" not in caplog.text
    load_model(str(tmp_path / "model"), "cpu")
    assert "c_fc.weight" in caplog.text and "MISSING" in caplog.text


def test_code_that_comes_with_a_model_runs_only_where_it_is_trusted(small_folder: Path, tmp_path: Path,
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    shutil.copytree(small_folder, tmp_path / "model")
    code = "import transformers\n\nclass GPT2LMHeadModel(transformers.GPT2LMHeadModel):\n    own = True\n"
    (tmp_path / "model" / "own.py").write_text(code)
    config(auto_map={"AutoModelForCausalLM": "own.GPT2LMHeadModel"})(tmp_path / "model")
    for trusted in (False, True):
        model = load_model(str(tmp_path / "model"), "cpu", trust_remote_code=trusted)
        assert hasattr(model.original_model, "own") is trusted


class Case:
    """A command line and the files that it names, from a seed: a share of the words is right, the others are anything."""

    def __init__(self, seed: int, right: float, folder: Path, small: Path, circuits: Path) -> None:
        self.right, self.draw, self.folder, self.small, self.circuits = right, random.Random(seed), folder, small, circuits
        self.output()  # makes the pipe and the link
        others = self.one("show", "evaluate", "report", "explain", "rank", "compare")
        command = self.mostly("prune" if seed % 3 else others, "demo", "", "--help", self.junk())
        words = [command]
        if command in ("prune", "show") and (command == "show" or self.draw.random() < 0.2):
            words += ["--html", self.output()]
        if command not in ("demo", "compare"):
            words += ["--model", self.model(), "--task", self.task(), "--prompts", self.mostly("8", "0", "-1", "1", "x")]
        if command == "prune":
            words += ["--out", self.output(), "--max-kl", self.mostly("20", self.number())]
        if command in ("prune", "rank"):
            words += ["--steps", self.mostly("1", "0", "-3", "x"), "--granularities", self.mostly("mlp", "head", "neuron", "")]
        if command in ("evaluate", "report", "explain", "rank", "compare") and self.draw.random() < 0.7:
            words += ["--out", self.output() + self.one(".json", ".md", ".csv", ".pt", "")]
        if command == "report":
            words += ["--n-random", self.mostly("2", self.number()), "--max-units", self.mostly("1", "0", "x")]
        words += [self.circuit] if command in ("show", "evaluate", "report", "explain") else []
        words = [word if isinstance(word, str) else word() for word in words]
        if command == "compare":
            words += [f"{name}={self.circuit()}" for name in ("a", self.mostly("b", "a", "", "node"))]
            words += [self.mostly("--level", self.junk()), self.mostly("mlp", "head", "x")]
        if command == "demo":
            words += ["--html", self.output(), "--task", self.one("chess", "", "ioi\0")]
        options = {"--seed": "3", "--device": "cpu", "--dtype": "float16", "--device-map": "cpu", "--revision": "main"
                   } if command not in ("demo", "compare") else {}
        options |= {"--ablation": "mean", "--batch-size": "2"} if command in ("prune", "evaluate", "rank") else {}
        options |= {"--layers": "0", "--time-limit": "9", "--agreement": "0.9", "--max-nodes": "1", "--checkpoint": self.output()
                    } if command == "prune" else {}
        for name, right in (options | {self.junk(): ""}).items():
            if self.draw.random() < 0.08:
                words += [name, self.mostly(right, self.number(), self.junk())]
        if self.draw.random() < 0.1:
            del words[self.draw.randrange(len(words))]
        self.words = words

    def one(self, *choices: str) -> str:
        return self.draw.choice(choices)

    def mostly(self, right: str, *others: str) -> str:
        return right if self.draw.random() < self.right else self.draw.choice(others)

    def junk(self) -> str:
        return "".join(self.draw.choice("a-=/\\\"' \n\t\0\u00e4\ud800\U0001f600%{}[]*0") for _ in range(self.draw.randrange(1, 9)))

    def number(self) -> str:
        return self.one("5", "0.1", "0", "-1", "nan", "inf", "1e400", "x", "", "9" * 30)

    def model(self) -> str:
        name = self.draw.choice(list(DAMAGES))
        return self.mostly(str(self.small), "toy", str(broken(self.small, name, self.small.parent / name)), str(self.folder), "")

    def task(self) -> str:
        words = {"Mary": (" she", " he"), "Tom": (" he", " she"), "Anna": (" she", " he"), "Peter": (" he", " she")}
        rows = [json.dumps(ROW | {"clean": f"So {name} is a really good friend, isn't", "answer": right, "wrong": wrong}).encode()
                for name, (right, wrong) in words.items()]
        at = self.draw.randrange(4)
        if self.draw.random() < 0.3:
            rows[at] = self.draw.choice([
                rows[at][:20], b"[]", b"null", b"3", b'{"clean": "\\ud800"}', b"\xff", b"\0", b"[" * 9999, rows[at].replace(b" she", b""),
                rows[at].replace(b"good", b"\\ud83d"), rows[at].replace(b'" he"', b"NaN"), rows[at].replace(b"good", b"good " * 99)])
        data = b"\n".join(rows)
        if self.draw.random() < 0.3:
            data = self.draw.choice([b"\xef\xbb\xbf" + data, data.decode("latin-1").encode("utf-16"), b"", b"\n\n"])
        (self.folder / "task.jsonl").write_bytes(data)
        return self.mostly(self.one("ioi", str(self.folder / "task.jsonl")), str(self.folder), "/dev/null", "missing")

    def circuit(self) -> str:
        data = bytearray(self.draw.choice(sorted(self.circuits.iterdir())).read_bytes())
        if self.draw.random() < 0.2:
            data[self.draw.randrange(len(data))] ^= 1 << self.draw.randrange(8)
        if self.draw.random() < 0.1:
            del data[self.draw.randrange(len(data)):]
        (self.folder / "c.safetensors").write_bytes(data)
        return self.mostly(str(self.folder / "c.safetensors"), str(self.folder / "task.jsonl"), "", "/dev/zero", str(self.folder))

    def output(self) -> str:
        if not (self.folder / "pipe").exists():
            os.mkfifo(self.folder / "pipe")
            (self.folder / "link").symlink_to("task.jsonl")
        others = ("a/b/c", "c.safetensors", "task.jsonl", "task.jsonl/x", "link", "pipe", "n" * 300, "p.html", "\ud800", "", "/dev/null",
                  "/proc/x", str(self.folder))
        return str(self.folder / self.mostly("new" + str(self.draw.random()), self.junk().replace("/", ""), *others))


@pytest.fixture(scope="session")
def circuits(toy: Toy, small_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Circuits of the small model and one of the embedded model."""
    folder, small = tmp_path_factory.mktemp("circuits"), load_model(str(small_folder), "cpu")
    for name, model in (("mlp", small), ("head", small), ("attn", small), ("mlp_out", toy[0])):
        tlnp.Circuit.full(find_nodes(model).restrict((name,))).save(folder / name)
    return folder


@pytest.mark.parametrize(("seeds", "right"), [(range(40), 0.65), pytest.param(range(40, 540), 0.85, marks=pytest.mark.slow)])
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_generated_commands(small_folder: Path, circuits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                            monkeypatch: pytest.MonkeyPatch, seeds: range, right: float) -> None:
    statuses = []
    for seed in seeds:
        folder = tmp_path / str(seed)
        folder.mkdir()
        monkeypatch.chdir(folder)
        words = (case := Case(seed, right, folder, small_folder, circuits)).words
        inputs = {path: path.read_bytes() for path in (*folder.iterdir(), *case.small.iterdir()) if path.is_file() and path.stat().st_size}
        try:
            status = main(words)
        except SystemExit as stop:  # argparse
            status = int(stop.code or 0)
        out, error = capsys.readouterr()
        lines = [line for line in error.splitlines() if line.startswith("tl-nodeprune")]
        assert status in (0, 2) and "Traceback" not in error + out, (seed, words, status, error)
        assert status == 0 or len(lines) == 1 and error.endswith("\n"), (seed, words, error)
        assert all(path.read_bytes() == data for path, data in inputs.items()), (seed, words)
        assert (folder / "link").is_symlink() and (folder / "pipe").is_fifo() and not list(folder.rglob("*.part")), (seed, words)
        statuses.append(status)
    assert {0, 2} <= set(statuses), "some commands are right"
