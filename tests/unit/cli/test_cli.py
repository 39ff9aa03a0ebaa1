"""The command: one line on stderr and status 2 for bad input, two files for good."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import tl_nodeprune as tlnp
from tl_nodeprune.cli.main import main
from tl_nodeprune.cli.output import as_json, show

Toy = tuple[Any, tlnp.PromptPairs]
ROW = {"clean": "So Mary is a really good friend, isn't", "corrupted": "So John is a really good friend, isn't",
       "answer": " she", "wrong": " he"}


def rows() -> list[dict[str, str]]:
    """Pairs of both genders over several names and two sentences, no clean prompt twice."""
    pairs = [(f, m) for f in ("Mary", "Anna", "Sarah", "Lisa") for m in ("John", "Tom", "James", "Peter")]
    texts = ("So {} is a really good friend, isn't", "So {} is such a kind person, isn't")
    women = [{"clean": texts[i % 2].format(f), "corrupted": texts[i % 2].format(m), "answer": " she", "wrong": " he"}
             for i, (f, m) in enumerate(pairs[::2])]
    men = [{"clean": texts[i // 2 % 2].format(m), "corrupted": texts[i // 2 % 2].format(f), "answer": " he", "wrong": " she"}
           for i, (f, m) in enumerate(pairs[1::2])]
    return women + men


@pytest.mark.parametrize(("change", "text"), [
    ({"--task": "chess"}, "'chess' is neither a task (ioi, gendered_pronoun, greater_than) nor a file"),
    ({"--task": "missing.jsonl"}, "'missing.jsonl'"),
    ({"--max-kl": "-1"}, "--max-kl -1.0"),
    ({"--max-kl": "nan"}, "nan"),
    ({"--agreement": "98"}, "agreement=98.0; it is a share of the prompts"),
    ({"--ablation": "noise"}, "unknown ablation 'noise'"),
    ({"--granularities": "heads"}, "unknown granularity 'heads'"),
    ({"--prompts": "0"}, "--prompts=0; it must be a whole number, 2 or more"),
    ({"--steps": "0"}, "--steps=0; it must be a whole number, 1 or more"),
    ({"--time-limit": "0"}, "--time-limit 0.0; it must be a finite number of seconds above 0"),
    ({"--max-nodes": "0.1", "--agreement": "0.9"}, "--agreement goes with --max-kl"),
    ({"--device": "cuda:99"}, "--device 'cuda:99' cannot compute here; this machine has cpu"),
    ({"--out": __file__}, "test_cli.py' is a file; give a folder"),
    ({"--out": ""}, "--out is ''; give a name"), ({"--html": ""}, "--html is ''"), ({"--checkpoint": ""}, "--checkpoint is ''"),
    ({"--model": ""}, "--model is ''"), ({"--task": ""}, "--task is ''"), ({"--html": "/dev/null"}, "'/dev/null' is a device"),
])
def test_bad_input_is_one_line_and_2(tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, str], text: str) -> None:
    options = {"--model": "toy", "--task": "ioi", "--out": str(tmp_path / "out"), "--prompts": "8"} | change
    assert main(["prune", *(word for pair in options.items() for word in pair)]) == 2
    error = capsys.readouterr().err
    assert text in error and error.startswith("tl-nodeprune: ") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("option", "given"), [
    ("--max-nodes", "0"), ("--max-nodes", "-3"), ("--max-nodes", "1.5"), ("--max-nodes", "nan"), ("--max-nodes", "-0.1"), ("--max-kl", "0"),
    ("--max-kl", "inf"), ("--agreement", "nan"), ("--agreement", "1.01"), ("--seed", "-1"), ("--seed", "9" * 30), ("--prompts", "0"),
    ("--prompts", "1"), ("--prompts", "-5"), ("--steps", "-1"), ("--batch-size", "0"), ("--time-limit", "-1"), ("--time-limit", "nan"),
    ("--device", "meta"), ("--device", "mkldnn"), ("--device", "vulkan"), ("--device", "cuda:-1"), ("--device", "hpu"), ("--device", ""),
    ("--ablation", "x"), ("--granularities", "x"), ("--task", "rows.jsonl")])
def test_what_needs_no_model_is_refused_before_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str, given: str,
                                                            capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text(json.dumps(ROW) + "\n[]\n")
    options = {"--model": "no/such/model", "--task": "ioi", "--out": "out", option: given}
    assert main(["prune", *(f"{name}={value}" for name, value in options.items())]) == 2
    error = capsys.readouterr().err
    name = {"--granularities": "granularity", "--task": "rows.jsonl, line 2"}.get(option, option.removeprefix("--"))
    assert re.match(rf"tl-nodeprune: .*({name}|{option[2:].replace('-', '_')})", error), error
    assert "no/such/model" not in error and error.count("\n") == 1 and not Path("out").exists()


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
    options = ["--max-kl", "0.2", "--out", str(out), "--html", str(out / "page.html"), "--steps", "60", "--batch-size", "8"]
    assert main(["prune", "--model", "toy", "--task", str(task), *options]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["circuit.safetensors", "page.html", "report.json"]
    page = (out / "page.html").read_text(encoding="utf-8")
    assert "The search: KL" in page and "score %{customdata" in page and "Figures on the prompts of the search are too good" not in page
    report, circuit = json.loads((out / "report.json").read_text()), tlnp.Circuit.load(out / "circuit.safetensors")
    circuit.check_fits(toy[0])
    assert report["live"] == circuit.count() and report["settings"]["max_kl"] == 0.2 and 0 < circuit.size < circuit.size_total
    assert report["converged"] is None and report["kl"] == pytest.approx(report["held_out"]["circuit"]["kl"], abs=1e-4)
    assert report["p_value"] < 0.01 and report["search_kl"] <= 0.2 and len(report["interval"]) == 2 and report["stopped"] == ""
    assert {"nodes", "share", "search_kl", "kl", "low", "high", "accuracy"} <= set(report["frontier"][0]) and len(report["frontier"]) >= 8
    assert isinstance(report["tested"], int) and isinstance(report["ruled_out"], int)
    assert {"circuit", "full", "ablated"} <= set(report["held_out"])
    said = capsys.readouterr()
    first, verdict = said.out.split("\n\n")[1].split("\n")[:2]
    assert first.startswith(f"KL {report['kl']:.3g} nats on {report['settings']['held_out']} prompts held out")
    assert verdict.startswith("Untested: ") and "too few to tell" in verdict and "give" in verdict and "UserWarning" not in said.err
    assert "KL held out" in said.out and "leaf nodes" in said.out


SMALL = ["prune", "--model", "toy", "--task", "ioi", "--prompts", "48", "--steps", "10", "--granularities", "head", "mlp"]


def test_prune_says_what_converged_means(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--out", str(tmp_path), "--max-kl", "20"]) == 0
    out, report = capsys.readouterr().out, json.loads((tmp_path / "report.json").read_text())
    assert report["converged"] is True and "\nWithin the budget, which is of KL: within 20.0 nats there; but" in out
    table = out.split("from the same run:\n")[1].split("\n\n")[0].split("\n")
    assert table[0].split() == ["nodes", "share", "KL", "held", "out", "KL", "searched", "right"] and len(table) == 9
    assert table[-1].split()[:2] == ["15", "100.00%"]


@pytest.mark.parametrize(("given", "most"), [("0.4", 6), ("5", 5)])
def test_prune_to_a_size(tmp_path: Path, capsys: pytest.CaptureFixture[str], given: str, most: int) -> None:
    assert main([*SMALL, "--out", str(tmp_path), "--max-nodes", given]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert tlnp.Circuit.load(tmp_path / "circuit.safetensors").size <= most and report["settings"]["max_kl"] is None
    assert "no KL was asked for" in capsys.readouterr().out


def test_a_share_and_a_kl_exclude_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*SMALL, "--out", "x", "--max-nodes", "5", "--max-kl", "0.1"])
    assert stop.value.code == 2 and "not allowed with argument" in capsys.readouterr().err


def test_prune_in_half_precision_with_a_checkpoint_and_a_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--dtype", "bfloat16", "--time-limit", "0.01", "--checkpoint", str(tmp_path / "state")]
    assert main([*SMALL, "--out", str(tmp_path / "out"), *options]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["stopped"] == "time limit" and "Stopped by the time limit: this is the best so far." in capsys.readouterr().out
    assert report["settings"]["dtype"] == "bfloat16" and list((tmp_path / "state").iterdir())


def test_the_circuit_is_saved_before_anything_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                   capsys: pytest.CaptureFixture[str]) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("tl_nodeprune.cli.main.evaluate", fails)
    assert main([*SMALL, "--out", str(tmp_path), "--max-kl", "5"]) == 2
    assert tlnp.Circuit.load(tmp_path / "circuit.safetensors").size_total == 15 and "KL" not in capsys.readouterr().out


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="a folder that even root cannot write to is Linux's /proc")
def test_a_folder_that_cannot_be_written_is_found_before_the_search(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--out", "/proc/new"]) == 2
    error = capsys.readouterr().err
    assert "--out '/proc/new' cannot be written" in error and "ordering" not in error


SHORT = ["prune", "--model", "toy", "--prompts", "12", "--steps", "1", "--granularities", "mlp", "--max-kl", "20"]


@pytest.mark.parametrize(("options", "text"), [
    (["--task", "t.jsonl", "--out", "r", "--html", "r/circuit.safetensors"], "circuit.safetensors' is the same file as the circuit"),
    (["--task", "t.jsonl", "--out", "r", "--html", "./r/../r/report.json"], "is the same file as the report"),
    (["--task", "t.jsonl", "--out", "r", "--html", "t.jsonl"], "--html 't.jsonl' is the same file as --task"),
    (["--task", "t.jsonl", "--out", "r", "--html", "hard.jsonl"], "--html 'hard.jsonl' is the same file as --task"),
    (["--task", "t.jsonl", "--out", "r", "--html", "r"], "--html 'r' is the same file as --out"),
    (["--task", "report.json", "--out", "."], "the report 'report.json' is the same file as --task"),
    (["--task", "t.jsonl", "--out", "r", "--checkpoint", "c", "--html", "c/search.safetensors"], "is the same file as the checkpoint"),
    (["--task", "t.jsonl", "--out", "r", "--checkpoint", "r/circuit.safetensors"], "is the same file as the folder of --checkpoint"),
    (["--task", "t.jsonl", "--out", "r", "--model", "m", "--html", "m/config.json"], "is the same file as the model's config.json"),
    (["--task", "t.jsonl", "--out", "r", "--html", "link.html"], "'link.html' is a symbolic link"),
    (["--task", "t.jsonl", "--out", "link.html"], "--out 'link.html' cannot be written"),
    (["--task", "t.jsonl", "--out", "r", "--html", "r/report.json/page.html"], "'r/report.json' is a folder"),
    (["--task", "t.jsonl", "--out", "r", "--checkpoint", "t.jsonl"], "--checkpoint 't.jsonl' cannot be written"),
    (["--task", "t.jsonl", "--out", "linked"], "'linked/circuit.safetensors' is a symbolic link"),
])
def test_outputs_are_checked_before_the_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
                                               options: list[str], text: str) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("t.jsonl", "report.json"):
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows()))
    os.link("t.jsonl", "hard.jsonl")
    Path("link.html").symlink_to("nowhere")
    for folder, name in (("m", "config.json"), ("linked", "other")):
        Path(folder).mkdir()
        Path(folder, name).write_text("mine")
    Path("linked/circuit.safetensors").symlink_to("other")
    before = {str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert main([*SHORT, *options]) == 2
    said = capsys.readouterr()
    assert text in said.err and said.err.count("\n") == 1 and "KL" not in said.out
    assert {str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert not Path("r/circuit.safetensors").exists()


def test_show_does_not_write_over_what_it_reads(toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "c.safetensors"
    saved_circuit(toy, path)
    before = path.read_bytes()
    assert main(["show", str(path), "--model", "toy", "--task", "ioi", "--html", f"{tmp_path}/./c.safetensors"]) == 2
    assert "is the same file as the circuit; give another name" in capsys.readouterr().err and path.read_bytes() == before


def test_ctrl_c_is_130_and_one_line_and_what_was_found_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                               capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    (tmp_path / "report.json").write_text("of an earlier circuit")
    monkeypatch.setattr("tl_nodeprune.cli.main.evaluate", interrupted)
    assert main([*SHORT, "--task", "ioi", "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err.endswith("\ntl-nodeprune: stopped by Ctrl-C.\n")
    assert [path.name for path in tmp_path.iterdir()] == ["circuit.safetensors"], "an old report is not left beside a new circuit"


def test_a_disk_that_is_full_is_one_line_and_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                                 capsys: pytest.CaptureFixture[str]) -> None:
    def full(source: Any, target: Any) -> None:
        if str(target).endswith("report.json"):
            raise OSError(28, "No space left on device")
        replace(source, target)

    replace = os.replace
    monkeypatch.setattr(os, "replace", full)
    assert main([*SHORT, "--task", "ioi", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.endswith("report.json cannot be written: No space left on device\n")
    assert [path.name for path in tmp_path.iterdir()] == ["circuit.safetensors"]


def test_a_page_that_fails_keeps_the_summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tl_nodeprune.cli.main.save_html", fails)
    assert main([*SHORT, "--task", "ioi", "--out", str(tmp_path), "--html", str(tmp_path / "page.html")]) == 2
    said = capsys.readouterr()
    assert "On held-out prompts:" in said.out and "Written: " in said.out and "A page" not in said.out and "No space left" in said.err


def test_a_reader_that_is_gone_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as broken:
        monkeypatch.setattr(sys, "stdout", broken)
        assert main([*SHORT, "--task", "ioi", "--out", str(tmp_path), "--html", str(tmp_path / "page.html")]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["circuit.safetensors", "page.html", "report.json"]


def test_prune_in_some_layers(toy: Toy, tmp_path: Path) -> None:
    options = ["--max-kl", "5", "--steps", "2", "--prompts", "12", "--layers", "-1", "--granularities", "head", "--out", str(tmp_path)]
    assert main(["prune", "--model", "toy", "--task", "ioi", *options]) == 0
    assert tlnp.Circuit.load(tmp_path / "circuit.safetensors").space.layers == (toy[0].cfg.n_layers - 1,)


def test_the_report_is_json_where_a_figure_is_not_a_number(toy: Toy, tmp_path: Path) -> None:
    circuit = tlnp.Circuit.full(tlnp.nodes.probe.find_nodes(toy[0]).restrict(("mlp",)))
    result = tlnp.PruneResult(circuit, True, 0.01, 0.01, [], 1.0, 0)
    found = dataclasses.replace(tlnp.evaluate(toy[0], circuit, toy[1]), faithfulness=math.nan)
    report = json.loads(json.dumps(as_json({}, result, found), allow_nan=False))
    assert report["held_out"]["faithfulness"] is report["p_value"] is report["accuracy"] is None and report["kl"] == 0.01
    assert report["interval"] == [None, None] and report["frontier"] == []


def test_python_m_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "tl_nodeprune", "show"], capture_output=True, text=True)
    assert done.returncode == 2 and "usage: tl-nodeprune show" in done.stderr


def saved_circuit(toy: Toy, path: Path) -> tlnp.Circuit:
    circuit = tlnp.Circuit.full(tlnp.nodes.probe.find_nodes(toy[0]).restrict(("head", "mlp_neuron")))
    circuit.save(path)
    return circuit


def test_show_writes_a_page(toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    circuit, html = saved_circuit(toy, tmp_path / "c.safetensors"), tmp_path / "new" / "c.html"
    assert main(["show", str(tmp_path / "c.safetensors"), "--model", "toy", "--task", "ioi", "--html", str(html), "--prompts", "8"]) == 0
    page = html.read_text(encoding="utf-8")
    assert str(html) in capsys.readouterr().out and [path.name for path in html.parent.iterdir()] == ["c.html"]
    assert f"Leaf nodes live: {circuit.size:,}" in page and "Task: ioi" in page and "AUROC" in page and '"mlp_neuron 2.383"' in page
    assert main(["show", str(tmp_path / "c.safetensors"), "--model", "toy", "--task", "ioi", "--html", str(html), "--no-effects"]) == 0
    assert "AUROC" not in html.read_text(encoding="utf-8") and "Figures on the prompts of the search are too good" in page


@pytest.mark.parametrize(("change", "text"), [
    ({"circuit": "missing.safetensors"}, "there is no file 'missing.safetensors'"),
    ({"circuit": __file__}, "is damaged or not a safetensors file"),
    ({"--html": str(Path(__file__).parent)}, "is a folder; give the name of a file"),
    ({"--html": __file__ + "/page.html"}, "test_cli.py' is a file"),
    ({"--task": "chess"}, "'chess' is neither a task"),
    ({"--prompts": "0"}, "--prompts=0; it must be a whole number, 1 or more"),
    ({"--model": "no/model", "--seed": "-1"}, "seed=-1"),
    ({"--model": "no/model", "--device": "meta"}, "--device 'meta' cannot compute here"),
])
def test_show_refuses_in_one_line(toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, str], text: str) -> None:
    saved_circuit(toy, tmp_path / "c.safetensors")
    page = str(tmp_path / "new" / "c.html")
    options = {"circuit": str(tmp_path / "c.safetensors"), "--model": "toy", "--task": "ioi", "--html": page} | change
    words = [word for name, value in options.items() for word in ((value,) if name == "circuit" else (name, value))]
    assert main(["show", *words]) == 2
    error = capsys.readouterr().err
    assert text in error and error.startswith("tl-nodeprune: ") and error.count("\n") == 1
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("granularities", [*([name] for name in tlnp.nodes.space.GRANULARITIES), ["attn_neuron", "mlp_neuron"]])
def test_show_whatever_is_gated(toy: Toy, tmp_path: Path, granularities: list[str]) -> None:
    path, html = tmp_path / "c.safetensors", tmp_path / "c.html"
    tlnp.Circuit.full(tlnp.nodes.probe.find_nodes(toy[0]).restrict(granularities)).save(path)
    assert main(["show", str(path), "--model", "toy", "--task", "ioi", "--html", str(html), "--prompts", "2"]) == 0
    assert "Leaf nodes live" in html.read_text(encoding="utf-8")


def test_show_refuses_a_circuit_of_another_model(other_model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved_circuit((other_model, None), tmp_path / "c.safetensors")  # type: ignore[arg-type]
    assert main(["show", str(tmp_path / "c.safetensors"), "--model", "toy", "--task", "ioi", "--html", str(tmp_path / "c.html")]) == 2
    assert "this circuit was found on another model" in capsys.readouterr().err and not (tmp_path / "c.html").exists()


def test_demo_checks_the_page_before_it_searches(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--html", str(Path(__file__).parent)]) == 2
    out, error = capsys.readouterr()
    assert not out and "is a folder; give the name of a file" in error


@pytest.mark.parametrize(("same", "says"), [
    (0.18, "\nWithin the budget, which is of KL: there; but its most likely token is the full model's on only 18%"),
    (0.9, "\nConverged: there\n")])
def test_a_circuit_with_other_first_tokens_is_not_said_to_have_converged(
        toy: Any, capsys: pytest.CaptureFixture[str], same: float, says: str) -> None:
    """Within a budget of KL, yet with another most likely token on most prompts."""
    model, prompts = toy
    masks = model.add_node_masks(["head"])
    try:
        result = masks.prune(prompts, max_nodes=6, steps=1, exact_tests=0, progress=False)
    finally:
        masks.remove()
    report = tlnp.evaluate(model, result.circuit, prompts)
    show(result, dataclasses.replace(report, circuit=dataclasses.replace(report.circuit, exact_match=same)), "", "there")
    assert result.converged is True and says in capsys.readouterr().out


def test_evaluate_prints_and_saves_what_the_library_says(toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    circuit, words = saved_circuit(toy, tmp_path / "c.safetensors"), ["--model", "toy", "--task", "ioi", "--prompts", "8"]
    assert main(["evaluate", str(tmp_path / "c.safetensors"), *words, "--out", str(tmp_path / "new" / "e.json")]) == 0
    saved, said = json.loads((tmp_path / "new" / "e.json").read_text()), capsys.readouterr().out
    prompts = tlnp.tasks.ioi(toy[0], n=8, seed=1).correct(toy[0])
    want = tlnp.evaluate(toy[0], circuit, prompts)
    assert saved["circuit"] == pytest.approx(dataclasses.asdict(want.circuit), abs=1e-5) and saved["n_prompts"] == len(prompts)
    assert f"{want.full.logit_diff:.3g}" in said and "interchange ablation" in said and "Written: " in said
    assert main(["evaluate", str(tmp_path / "c.safetensors"), *words, "--ablation", "zero"]) == 0
    assert "zero ablation" in capsys.readouterr().out


def test_rank_writes_every_node_best_first(toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["rank", "--model", "toy", "--task", "ioi", "--prompts", "16", "--steps", "3", "--granularities", "head", "mlp"]
    assert main([*words, "--out", str(tmp_path / "s.csv")]) == 0 and main([*words, "--out", str(tmp_path / "s.json")]) == 0
    table, want = pd.read_csv(tmp_path / "s.csv"), tlnp.mib.read(toy[0], tmp_path / "s.json")
    assert len(table) == 15 and table["score"].is_monotonic_decreasing and len(set(table["node"])) == 15
    first = table.iloc[0]
    assert want[f"blocks.{first['layer']}." + {"head": "attn.hook_z", "mlp": "hook_mlp_out"}[first["granularity"]]].max() == 1
    out = capsys.readouterr().out
    assert out.index(first["node"]) < out.index(table.iloc[-1]["node"]) and "15 of 15 leaf nodes" in out
    assert main([*words[:-3], "--granularities", "attn", "--out", str(tmp_path / "a.json")]) == 2
    assert "the MIB board has no attn nodes; write a .csv" in capsys.readouterr().err and not (tmp_path / "a.json").exists()


def test_report_explain_and_compare(toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved_circuit(toy, tmp_path / "a.safetensors")
    circuit, other = str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")
    tlnp.Circuit.from_nodes(toy[0], {"head": [(1, 1)]}).save(other)
    words = ["--model", "toy", "--task", "ioi", "--prompts", "8", "--n-random", "2", "--max-units", "1"]
    for name, text in (("r.md", "# Evidence for a circuit"), ("r.csv", "measure,value,low,high,p_value")):
        assert main(["report", circuit, *words, "--out", str(tmp_path / name)]) == 0
        assert text in (tmp_path / name).read_text() and "faithfulness" in capsys.readouterr().out
    for name, text in (("e.txt", "cutting"), ("e.csv", "effect")):
        assert main(["explain", circuit, *words[:6], "--nodes", "2", "--out", str(tmp_path / name)]) == 0
        assert text in (tmp_path / name).read_text() and "logit difference" in capsys.readouterr().out
    assert main(["compare", f"all={circuit}", f"one={other}", "--out", str(tmp_path / "c.csv")]) == 0
    assert "in all: head 1.1" in capsys.readouterr().out and len(pd.read_csv(tmp_path / "c.csv")) == 12


@pytest.mark.parametrize(("words", "text"), [
    (["evaluate", "c.safetensors", "--out", "e.txt"], "--out 'e.txt'; give a file that ends in .json"),
    (["evaluate", "c.safetensors", "--out", "t.jsonl/e.json"], "cannot be written: "),
    (["evaluate", "c.safetensors", "--ablation", "noise"], "unknown ablation 'noise'"),
    (["report", "c.safetensors", "--n-random", "0"], "n_random=0"), (["explain", "c.safetensors", "--nodes", "0"], "nodes=0"),
    (["rank", "--steps", "0"], "steps=0"),
    (["rank", "--granularities", "heads"], "unknown granularity 'heads'"), (["rank", "--out", ""], "--out is ''; give a name"),
    (["evaluate", "c.safetensors", "--device-map", "auto", "--device", "meta"], "--device-map 'auto' goes without --device"),
    (["evaluate", "c.safetensors", "--revision", "main"], "the embedded model 'toy' has no --revision"),
    (["compare", "a=c.safetensors", "c.safetensors"], "'c.safetensors' is not a circuit with a name; give NAME=FILE"),
    (["compare", "a=c.safetensors", "a=c.safetensors"], "two of the circuits have one name"),
    (["compare", "a=c.safetensors", "b=c.safetensors", "--out", "link.csv"], "'link.csv' is a symbolic link"),
])
def test_wrong_words_are_found_before_the_model_is_loaded(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str],
                                                          text: str, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    saved_circuit(toy, tmp_path / "c.safetensors")
    (tmp_path / "t.jsonl").write_text("{}")
    (tmp_path / "link.csv").symlink_to("t.jsonl")
    words = words if words[0] == "compare" else [*words, "--model", "toy", "--task", "ioi"]
    assert main(words) == 2
    said = capsys.readouterr()
    assert text in said.err and said.err.count("\n") == 1 and not said.out
    assert len(list(tmp_path.iterdir())) == 3


def test_version_and_help_with_examples(capsys: pytest.CaptureFixture[str]) -> None:
    for word, text in (("--version", f"tl-nodeprune {tlnp.__version__}"), ("--help", "exit status: 0; 1 for")):
        with pytest.raises(SystemExit) as stop:
            main([word])
        assert stop.value.code == 0 and text in capsys.readouterr().out
