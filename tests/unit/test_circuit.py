"""Circuits: refusals, files, reading."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import tl_nodeprune as tlnp
from tl_nodeprune.nodes import GateKey
from tl_nodeprune.probe import find_nodes

Toy = tuple[Any, tlnp.PromptPairs]


@pytest.fixture()
def circuit(toy: Toy) -> tlnp.Circuit:
    space = find_nodes(toy[0])
    generator = torch.Generator().manual_seed(0)
    return tlnp.Circuit(space, {key: torch.rand(shape, generator=generator) < 0.7 for key, shape in space.shapes.items()})


def test_a_model_of_other_shape(toy: Toy, circuit: tlnp.Circuit, other_model: Any, tmp_path: Path) -> None:
    _, prompts = toy
    circuit.save(tmp_path / "c.safetensors")
    loaded = tlnp.Circuit.load(tmp_path / "c.safetensors")
    for use in (lambda: loaded.fwd_hooks(other_model, prompts), lambda: tlnp.evaluate(other_model, loaded, prompts),
                lambda: loaded.check_fits(other_model), lambda: tlnp.viz.kept_neurons(other_model, loaded, prompts)):
        with pytest.raises(ValueError, match=r"found on another model.*hook_z with head nodes \[4\], this model has \[2\]"):
            use()
    other = tlnp.Circuit.full(find_nodes(other_model))
    with pytest.raises(ValueError, match="over different nodes"):
        _ = circuit & other
    with pytest.raises(ValueError, match="over different nodes"):
        circuit.iou(other)
    assert circuit != other and circuit != "circuit"


def test_a_model_of_the_same_shapes_and_another_name(toy: Toy, circuit: tlnp.Circuit, monkeypatch: pytest.MonkeyPatch,
                                                     recwarn: pytest.WarningsRecorder) -> None:
    model, prompts = toy
    found = tlnp.evaluate(model, circuit, prompts)
    monkeypatch.setattr(model.cfg, "model_name", f"some/folder/{tlnp.toy.NAME}")
    assert tlnp.evaluate(model, circuit, prompts) == found and not recwarn.list
    monkeypatch.setattr(model.cfg, "model_name", "another")
    said = rf"was found on a model called '{tlnp.toy.NAME}', this one is called 'another'"
    with pytest.warns(UserWarning, match=said):
        assert tlnp.evaluate(model, circuit, prompts) == found
    with pytest.warns(UserWarning, match=said):
        notes = tlnp.report(model, circuit, prompts, n_random=2, n_subsets=1, max_units=1, progress=False).notes
    assert sum("this one is called 'another'" in note for note in notes) == 1


@pytest.mark.parametrize("keep", [0, 5, 100, -10, -1])
def test_a_truncated_file(circuit: tlnp.Circuit, tmp_path: Path, keep: int) -> None:
    path = tmp_path / "c.safetensors"
    circuit.save(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"c\.safetensors is damaged"):
        tlnp.Circuit.load(path)


def test_files_that_are_no_circuit(circuit: tlnp.Circuit, tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    with pytest.raises(FileNotFoundError, match=r"no file '.*c\.safetensors'"):
        tlnp.Circuit.load(path)
    with pytest.raises(FileNotFoundError):
        tlnp.Circuit.load(tmp_path)  # a folder
    path.write_text("plain text, and long enough to be taken for a header\n" * 5)
    with pytest.raises(ValueError, match="damaged or no safetensors file"):
        tlnp.Circuit.load(path)
    for header in (None, {"format": "pt"}):
        safetensors.torch.save_file({"weight": torch.ones(3)}, path, header)
        with pytest.raises(ValueError, match=f"no circuit of this library: its format is {(header or {}).get('format')!r}"):
            tlnp.Circuit.load(path)


@pytest.mark.parametrize("damage", ["gate", "space", "json", "ablation", "shape", "list"])
def test_files_damaged_inside(circuit: tlnp.Circuit, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "c.safetensors"
    circuit.save(path)
    with safetensors.safe_open(str(path), framework="pt") as file:
        header, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    if damage in ("gate", "shape"):
        gate = tensors.pop("gate/head/0")
        tensors |= {"gate/head/0": gate[:2].clone()} if damage == "shape" else {}
    elif damage == "space":
        del header["space"]
    else:
        header |= {"json": {"space": "{"}, "ablation": {"ablation": "noise"}, "list": {"space": "[]"}}[damage]
    safetensors.torch.save_file(tensors, path, header)
    with pytest.raises(ValueError, match=r"c\.safetensors is damaged"):
        tlnp.Circuit.load(path)


def test_a_save_that_fails_leaves_nothing_and_is_an_os_error(circuit: tlnp.Circuit, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="missing"):
        circuit.save(tmp_path / "missing" / "c.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="a folder that even root cannot write to is Linux's /proc")
def test_an_unwritable_folder_is_an_os_error(circuit: tlnp.Circuit) -> None:
    with pytest.raises(OSError, match="/proc/c.safetensors cannot be written"):
        circuit.save("/proc/c.safetensors")


def test_unknown_keys(circuit: tlnp.Circuit, toy: Toy) -> None:
    with pytest.raises(KeyError, match="hook_q"):
        circuit["blocks.0.hook_q"]
    with pytest.raises(KeyError, match="'neuron'"):
        circuit.nodes("neuron")
    with pytest.raises(KeyError, match="'head' is not gated in layer 7"):
        circuit.live("head", 7)
    with pytest.raises(ValueError, match="gates are given for 0 tensors"):
        tlnp.Circuit(circuit.space, {})
    space = circuit.space.restrict(("head",), [0])
    with pytest.raises(ValueError, match=r"gates: head of layer 0 is \(2,\), expected \(4,\)"):
        tlnp.Circuit(space, {GateKey("head", 0): torch.ones(2)})


def test_the_same_nodes_under_another_ablation(toy: Toy, circuit: tlnp.Circuit) -> None:
    model, prompts = toy
    zero = circuit.under("zero")
    assert zero == circuit and zero.ablation.name == "zero" and circuit.ablation.name == "interchange"
    wanted = tlnp.Circuit(circuit.space, {key: circuit.live(*key) for key in circuit.space.shapes}, tlnp.Ablation("zero"))
    assert tlnp.evaluate(model, zero, prompts) == tlnp.evaluate(model, wanted, prompts) != tlnp.evaluate(model, circuit, prompts)
    with pytest.raises(ValueError, match="unknown ablation 'nothing'"):
        circuit.under("nothing")
    with pytest.raises(ValueError, match="fit it on this model's prompts first"):
        tlnp.evaluate(model, circuit.under("mean"), prompts)


def test_a_mapping_with_hook_shapes(circuit: tlnp.Circuit) -> None:
    assert dict(circuit).keys() == set(circuit.space.hooks) and len(circuit) == 15
    assert circuit["blocks.1.attn.hook_z"].shape == (4, 24) and circuit["blocks.1.hook_attn_out"].shape == ()
    assert circuit["blocks.1.mlp.hook_post"].shape == (384,) and circuit["blocks.1.hook_mlp_out"].shape == (96,)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # pandas 3 warns of strings in a column of integers, pandas 4 refuses them
        table = circuit.summary()
    assert table.loc["live"].to_dict() == circuit.count() and table.loc["of"].to_dict() == circuit.space.totals()
    assert "ablation='interchange'" in repr(circuit)


def test_a_batch_of_other_prompts_is_refused(toy: Toy, circuit: tlnp.Circuit) -> None:
    model, prompts = toy
    with circuit.applied(model, prompts[:4]), pytest.raises(ValueError, match=r"\(4, 17\).*\(24, 17\)"):
        model(prompts.clean)


def test_other_prompts_of_the_same_shape_are_refused(toy: Toy, circuit: tlnp.Circuit, no_hooks_left: Callable[[Any], None]) -> None:
    """Their stand-ins would be other prompts'; constants are anybody's."""
    model, prompts = toy
    other = prompts.clean.clone()
    other[3:5] = other[5:7]
    with circuit.applied(model, prompts):
        model(prompts.clean)
        with pytest.raises(ValueError, match=r"other prompts than the stand-ins are of \(the first is prompt 3\)"):
            model(other)
    model(other)
    no_hooks_left(model)
    with tlnp.Circuit.empty(circuit.space, tlnp.Ablation("zero")).applied(model, prompts):
        model(other)
