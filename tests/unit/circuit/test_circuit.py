"""Circuits: refusals, files, reading."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import tl_nodeprune as tlnp
from tl_nodeprune.circuit import files
from tl_nodeprune.nodes.probe import find_nodes
from tl_nodeprune.nodes.space import GateKey

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
    with pytest.raises(ValueError, match="damaged or not a safetensors file"):
        tlnp.Circuit.load(path)
    for header in (None, {"format": "pt"}):
        safetensors.torch.save_file({"weight": torch.ones(3)}, path, header)
        with pytest.raises(ValueError, match=f"not a circuit of this library: its format is {(header or {}).get('format')!r}"):
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


def saved_with_constants(circuit: tlnp.Circuit, path: Path) -> tlnp.Circuit:
    """A circuit under mean ablation of three positions, in few layers and granularities so that the file is small."""
    space, generator = circuit.space.restrict(("attn", "head", "layer"), [0, 1]), torch.Generator().manual_seed(1)
    constants = {hook: torch.randn(3, *((4, 24) if hook.endswith("hook_z") else (96,)), generator=generator) for hook in space.hooks}
    small = tlnp.Circuit(space, {key: circuit.live(*key) for key in space.shapes}, tlnp.Ablation("mean", constants))
    small.save(path)
    return small


@pytest.mark.parametrize("tries", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_file_with_other_bits_is_damaged(circuit: tlnp.Circuit, tmp_path: Path, tries: int) -> None:
    """One bit, several, and bytes put in or taken out: half of them in the header, where most of the meaning is."""
    path, draw = tmp_path / "c.safetensors", random.Random(0)
    small = saved_with_constants(circuit, path)
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    for _ in range(tries):
        changed, end = bytearray(data), draw.choice((start, len(data)))
        for _ in range(draw.choice((1, 1, 2, 9))):
            changed[draw.randrange(end)] ^= 1 << draw.randrange(8)
        if draw.random() < 0.1:
            at = draw.randrange(end)
            changed[at:at + 1] = draw.choice((b"", b" ", b"00"))
        if bytes(changed) == data:
            continue
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=r"c\.safetensors is damaged"):
            tlnp.Circuit.load(path)
    path.write_bytes(data)
    assert tlnp.Circuit.load(path) == small and tlnp.Circuit.load(path).ablation == small.ablation


def crafted(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a file whose checksum is right, whatever is in it."""
    data = safetensors.torch.save(tensors, metadata | {"sha256": "0" * 64})
    path.write_bytes(data.replace(b'"sha256":"' + b"0" * 64, b'"sha256":"' + hashlib.sha256(data).hexdigest().encode(), 1))


HUGE = [["attn_neuron", 0, [4, 10**9]], ["head", 0, [4]]]
CRAFTED: dict[str, tuple[Any, str]] = {
    "huge nodes": ({"present": HUGE}, "less than or equal"),
    "many nodes": (lambda space: {"n_layers": 9, "present": space["present"] + [
        row for n in (6, 7) for row in (["layer", n, []], ["mlp_neuron", n, [1 << 25]])]}, "than 67"),
    "layers": ({"n_layers": 10**15}, "n_layers"), "no layers": ({"n_layers": 1}, "fit no model of 1 layers"),
    "fraction": ({"n_layers": 2.5}, "n_layers"), "half a layer": ({"shapes": [["head", 1.7, [4]]]}, "integer"),
    "truth": ({"d_model": True}, "d_model"), "text": ({"d_model": "96"}, "d_model"), "nothing": ({"kv_heads": None}, "kv_heads"),
    "inf": ({"d_model": float("inf")}, "d_model"), "nan": ({"kv_heads": float("nan")}, "kv_heads"), "zero": ({"kv_heads": 0}, "kv_heads"),
    "key heads": ({"kv_heads": 3}, "3 key heads"), "name": ({"model_name": 3}, "model_name"), "more": ({"other": 1}, "other"),
    "granularity": ({"shapes": [["neuron", 0, [4]]]}, "shapes"), "twice": ({"shapes": [["head", 0, [4]], ["head", 0, [4]]]}, "twice"),
    "negative": ({"shapes": [["head", -1, [4]]]}, "shapes"), "no gates": ({"shapes": []}, "or none"),
    "deep": ({"shapes": "DEEP"}, "recursion"),
    "d_model": ({"d_model": 95}, "fit no model"), "scalar": ({"present": [["head", 0, []]]}, "or none|fit no model"),
}


@pytest.mark.parametrize("name", CRAFTED)
def test_a_crafted_description(circuit: tlnp.Circuit, tmp_path: Path, name: str) -> None:
    path, started = tmp_path / "c.safetensors", time.monotonic()
    circuit.save(path)
    with safetensors.safe_open(str(path), framework="pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}
    crafted(path, tensors, metadata)
    assert tlnp.Circuit.load(path) == circuit, "what the test does to a file is no damage by itself"
    change, text = CRAFTED[name]
    space = json.loads(metadata["space"])
    space = json.dumps(space | (change(space) if callable(change) else change)).replace('"DEEP"', "[" * 10**5 + "]" * 10**5)
    crafted(path, tensors, metadata | {"space": space})
    with pytest.raises(ValueError, match=rf"c\.safetensors is damaged(.|\n)*({text})"):
        tlnp.Circuit.load(path)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(("change", "text"), [
    ({"gate/head/0": torch.full((4,), 255, dtype=torch.uint8)}, "gate/head/0 holds 255; gates are 0 or 1"),
    ({"gate/head/0": torch.ones(4)}, r"gate/head/0 of F32 \[4\] has no place"),
    ({"gate/head/0": torch.ones(4, dtype=torch.bool)}, r"of BOOL \[4\] has no place"),
    ({"gate/head/0": torch.ones(4, 1, dtype=torch.uint8)}, r"gate/head/0 of U8 \[4, 1\] has no place"),
    ({"gate/head/7": torch.ones(4, dtype=torch.uint8)}, "gate/head/7 .* has no place"),
    ({"constant/blocks.0.attn.hook_z": torch.full((3, 4, 24), torch.nan)}, "hook_z'. holds NaN or inf"),
    ({"constant/blocks.0.attn.hook_z": torch.full((3, 4, 24), torch.inf)}, "hook_z'. holds NaN or inf"),
    ({"constant/blocks.0.attn.hook_z": torch.ones(4, 24)}, r"hook_z'\] is \[4, 24\], and 'mean' ablation of these nodes needs"),
    ({"constant/blocks.1.attn.hook_z": torch.ones(2, 4, 24)}, r"hook_z'\] is \[2, 4, 24\], .* needs one per position, \[3, 4, 24\]"),
    ({"constant/blocks.1.attn.hook_z": torch.ones(3, 4, 1)}, r"hook_z'\] is \[3, 4, 1\]"),
    ({"constant/blocks.1.attn.hook_z": None}, r"'mean' ablation has no constant for 'blocks\.1\.attn\.hook_z', which is gated"),
    ({"constant/blocks.2.attn.hook_z": torch.ones(3, 4, 24)}, r"blocks\.2\.attn\.hook_z .* has no place"),
    ({"constant/blocks.0.hook_mlp_out": torch.ones(3, 96)}, "hook_mlp_out .* has no place"),
    ({"constant/blocks.1.attn.hook_z": None, "blocks.1.attn.hook_z": torch.ones(3, 4, 24)}, "hook_z .* has no place"),
    ({"constant/blocks.0.attn.hook_z": torch.ones(3, 4, 24).to(torch.float8_e4m3fn)}, "hook_z of F8_E4M3 .* has no place"),
    ({"gate/attn/1": torch.zeros((), dtype=torch.uint8)}, "gate/(attn|head)/1 has nodes open that gates above or below keep closed"),
    ({"gate/head/1": torch.zeros(4, dtype=torch.uint8)}, "gate/attn/1 has nodes open that gates above or below keep closed"),
    ({"constant/blocks.0.attn.hook_z": torch.ones(3, 4, 24, dtype=torch.int32)}, "hook_z of I32 .* has no place"),
    ({"constant/blocks.0.hook_q": torch.ones(3, 96)}, "hook_q .* has no place"), ({"weight": torch.ones(3)}, "weight .* has no place"),
])
def test_crafted_tensors(circuit: tlnp.Circuit, tmp_path: Path, change: dict[str, torch.Tensor], text: str) -> None:
    path = tmp_path / "c.safetensors"
    saved_with_constants(circuit, path)
    with safetensors.safe_open(str(path), framework="pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}
    crafted(path, {name: value for name, value in (tensors | change).items() if value is not None}, metadata)
    with pytest.raises(ValueError, match=rf"c\.safetensors is damaged.*{text}"):
        tlnp.Circuit.load(path)


def test_constants_that_do_not_fit_are_refused_where_they_are_given(toy: Toy, circuit: tlnp.Circuit, tmp_path: Path) -> None:
    """By each that takes an ablation; one of more hook points than are gated is right, and the file holds what is gated."""
    model, prompts = toy
    few = saved_with_constants(circuit, tmp_path / "c")
    whole = tlnp.Ablation("mean").fit(model, prompts, find_nodes(model).hooks)
    few.under(whole).save(tmp_path / "c")
    assert set(tlnp.Circuit.load(tmp_path / "c").ablation.constants) == set(few.space.hooks) < set(whole.constants)
    assert few.under(whole).ablation == whole
    last, scores = few.space.hooks[-1], tlnp.NodeScores.from_circuit(few)
    uses: tuple[Callable[[tlnp.Ablation], Any], ...] = (
        few.under, lambda wrong: tlnp.Circuit.full(few.space, wrong), lambda wrong: tlnp.NodeMasks(few.space, ablation=wrong),
        lambda wrong: tlnp.Circuit.from_masks(model, dict(few.under("zero")), wrong),
        lambda wrong: tlnp.Circuit.from_nodes(model, {"layer": [(1,)], "head": []}, wrong),
        lambda wrong: model.add_node_masks(("head", "layer"), ablation=wrong),
        lambda wrong: tlnp.mib.evaluate(model, scores, prompts, ablation=wrong))
    for change, text in (({}, rf"no constant for '{last}'"), ({last: torch.ones(96)}, rf"constants\['{last}'\] is \[96\]"),
                         ({last: torch.ones(17, 1)}, r"is \[17, 1\]"), ({last: torch.ones(16, 96)}, r"needs one per position, \[17, 96\]"),
                         ({last: torch.ones(0, 96)}, r"is \[0, 96\]")):
        wrong = tlnp.Ablation("mean", {hook: value for hook, value in whole.constants.items() if hook != last} | change)
        for use in uses:
            with pytest.raises(ValueError, match=text):
                use(wrong)
    with pytest.raises(ValueError, match="this circuit cannot be saved: 'mean' ablation has no constant for 'blocks.0.attn.hook_z'"):
        few.under("mean").save(tmp_path / "c")


@pytest.mark.parametrize(("space", "text"), [
    (lambda s: {"present": [row for row in s["present"] if row[:2] != ["layer", 1]], "shapes": [["head", 0, [4]]]}, "without layer nodes"),
    (lambda s: {"present": [row for row in s["present"] if row[:2] != ["attn_neuron", 1]], "shapes": [["head", 0, [4]]]},
     "head nodes without attn_neuron nodes"),
    (lambda s: {"present": [row for row in s["present"] if row[:2] != ["mlp", 1]], "shapes": [["head", 0, [4]]]}, "without mlp nodes"),
    (lambda s: {"weights": s["weights"] + s["weights"][:1]}, "weights names a part twice"),
    (lambda s: {"weights": [["attn", 9, 5]]}, "or one that is not there"), (lambda s: {"weights": [["layer", 3, 5]]}, "not there"),
    (lambda s: {"weights": [["attn", 0, 1 << 60]]}, "less than"), (lambda s: {"weights": [["attn", 0, 0]]}, "greater than"),
])
def test_fields_that_contradict_each_other(circuit: tlnp.Circuit, tmp_path: Path, space: Callable[[Any], Any], text: str) -> None:
    path = tmp_path / "c.safetensors"
    small = tlnp.Circuit.full(circuit.space.restrict("head", [0]))
    small.save(path)
    with safetensors.safe_open(str(path), framework="pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}
    given = json.loads(metadata["space"])
    crafted(path, tensors, metadata | {"space": json.dumps(given | space(given))})
    with pytest.raises(ValueError, match=rf"c\.safetensors is damaged.*{text}"):
        tlnp.Circuit.load(path)


@pytest.mark.parametrize("header", [
    b"", b"{}", b"\xff" * 8, b"[" * 10**6, b'{"a":' * 10**5, b'{"__metadata__":null}', b'{"__metadata__":{"format":NaN}}',
    b'{"__metadata__":{"format":"tl_nodeprune.circuit/2"}}'])
@pytest.mark.parametrize("length", [None, 2**63, 10**8])
def test_crafted_headers(tmp_path: Path, header: bytes, length: int | None) -> None:
    path = tmp_path / "c.safetensors"
    path.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header)
    os.truncate(path, 10**11)  # a hole, which takes no disk
    with pytest.raises(ValueError, match=r"c\.safetensors is damaged or no"):
        tlnp.Circuit.load(path)


def test_an_older_format_is_refused_in_words(circuit: tlnp.Circuit, tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    safetensors.torch.save_file({"gate/head/0": torch.ones(4)}, path, {"format": "tl_nodeprune.circuit/1"})
    with pytest.raises(ValueError, match="an older version wrote it, without a checksum: find the circuit again"):
        tlnp.Circuit.load(path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_what_is_loaded_is_saved_to_the_very_same_file(circuit: tlnp.Circuit, tmp_path: Path, dtype: torch.dtype) -> None:
    circuit = saved_with_constants(circuit, tmp_path / "c")
    constants = {hook: value.to(dtype) for hook, value in circuit.ablation.constants.items()}
    circuit.under(tlnp.Ablation("mean", constants)).save(tmp_path / "c")
    loaded = tlnp.Circuit.load(tmp_path / "c")
    assert loaded == circuit and all(torch.equal(loaded.ablation.constants[hook], value) for hook, value in constants.items())
    loaded.save(tmp_path / "again")
    assert tlnp.Circuit.load(tmp_path / "again").ablation == loaded.ablation


def test_what_is_loaded_stays_when_the_file_changes(circuit: tlnp.Circuit, tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    small = saved_with_constants(circuit, path)
    loaded = tlnp.Circuit.load(path)
    with open(path, "r+b") as file:  # in place, as `cp` does
        file.write(b"\xff" * path.stat().st_size)
    assert loaded == small and loaded.ablation == small.ablation


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked here")
def test_a_save_that_is_killed_leaves_the_circuit_before_or_the_one_after(circuit: tlnp.Circuit, tmp_path: Path) -> None:
    path, draw, seen = tmp_path / "c.safetensors", random.Random(0), set()
    other, contents = ~circuit, []
    for each in (other, circuit):
        each.save(path)
        contents.append(path.read_bytes())
    for _ in range(25):
        if not (process := os.fork()):  # in which torch may hang, so that only the writing is done there
            while True:
                for content in contents:
                    files.write(path, content)
        time.sleep(draw.uniform(0, 0.1))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        loaded = tlnp.Circuit.load(path)
        seen.add(loaded == circuit)
        assert loaded in (circuit, other)
    assert seen == {True, False}
    files.remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["n_layers", "d_model", "kv_heads"])
def test_a_model_of_the_same_nodes_and_other_numbers(toy: Toy, circuit: tlnp.Circuit, name: str) -> None:
    """Heads alone are the same in a model with more layers, a wider residual stream or grouped queries."""
    other = replace(circuit.space.restrict(("head",), [0, 1]), **{name: getattr(circuit.space, name) // 2})
    found = tlnp.Circuit.full(other)
    for use in (lambda: tlnp.evaluate(toy[0], found, toy[1]), lambda: tlnp.report(toy[0], found, toy[1]), lambda: found.check_fits(toy[0]),
                lambda: found.fwd_hooks(toy[0], toy[1])):
        with pytest.raises(ValueError, match=f"found on another model .*: {name} is {getattr(other, name)} there and "
                                             f"{getattr(circuit.space, name)} in this one"):
            use()


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


def test_circuits_of_one_s_own_nodes(toy: Toy) -> None:
    model, prompts = toy
    circuit = tlnp.Circuit.from_nodes(model, {"head": [(0, 1), (2, 3)], "mlp": [(1,)]}, "zero")
    assert circuit.nodes("head") == [(0, 1), (2, 3)] and circuit.nodes("mlp") == [(1,)] and circuit.ablation.name == "zero"
    assert circuit.space.granularities == ("mlp", "head") and circuit.size_total == 12 + 3
    others = [(layer, head) for layer in range(3) for head in range(4) if (layer, head) not in ((0, 1), (2, 3))]
    hooks = [(f"blocks.{layer}.attn.hook_z", lambda z, hook, head=head: z.index_fill(2, torch.tensor([head]), 0)) for layer, head in others]
    hooks += [(f"blocks.{layer}.hook_mlp_out", lambda out, hook: out * 0) for layer in (0, 2)]
    with circuit.applied(model, prompts):
        found = model(prompts.clean)
    assert torch.equal(found, model.run_with_hooks(prompts.clean, fwd_hooks=hooks))
    for nodes, words in (({"head": [(0, 4)]}, r"holds \(0, 4\), and the model has \[4\]"), ({"head": [(3, 0)]}, "has none in that layer"),
                         ({"mlp": [(0, 0)]}, "holds"), ({}, "empty"), ({"head": [(-1, 0)]}, "has none in that layer"),
                         ({"heads": [(0, 0)]}, "unknown granularity")):
        with pytest.raises(ValueError, match=words):
            tlnp.Circuit.from_nodes(model, nodes)
    with pytest.raises(TypeError, match="whole numbers"):
        tlnp.Circuit.from_nodes(model, {"head": [0.5]})  # type: ignore[list-item]


@pytest.mark.parametrize("granularities", [None, ("head", "mlp"), ("layer",), ("mlp_neuron", "attn")])
def test_masks_and_back(toy: Toy, granularities: tuple[str, ...] | None) -> None:
    model = toy[0]
    space, generator = find_nodes(model).restrict(granularities), torch.Generator().manual_seed(0)
    circuit = tlnp.Circuit(space, {key: torch.rand(shape, generator=generator) < 0.7 for key, shape in space.shapes.items()})
    again = tlnp.Circuit.from_masks(model, dict(circuit))
    assert list(again) == list(circuit) and all(torch.equal(again[hook], circuit[hook]) for hook in circuit)
    with pytest.raises(ValueError, match="this model has a mask"):
        tlnp.Circuit.from_masks(model, {hook: torch.ones(*mask.shape, 2) for hook, mask in circuit.items()})
    with pytest.raises(ValueError, match="no node there"):
        tlnp.Circuit.from_masks(model, {"blocks.0.hook_resid_mid": torch.ones(())})
    with pytest.raises(ValueError, match="other values than 0"):
        tlnp.Circuit.from_masks(model, {hook: mask + 0.5 for hook, mask in circuit.items()})


def test_a_coarser_view_by_hand(toy: Toy, circuit: tlnp.Circuit) -> None:
    """Against the masks themselves: a head is live where any dim of its mask is, an MLP where any output dim is."""
    fine = tlnp.Circuit.from_masks(toy[0], {hook: mask * (torch.rand(mask.shape, generator=torch.Generator().manual_seed(1)) < 0.03)
                                            for hook, mask in circuit.items() if hook.endswith(("hook_z", "hook_mlp_out"))})
    seen = fine.at(("head", "mlp"))
    assert seen.space.granularities == ("mlp", "head") and 0 < seen.count()["head"] < 12
    for layer in range(3):
        assert torch.equal(seen.live("head", layer), fine[f"blocks.{layer}.attn.hook_z"].any(-1))
        assert bool(seen.live("mlp", layer)) == bool(fine[f"blocks.{layer}.hook_mlp_out"].any())
    kept = seen.at("attn_neuron")
    assert all(torch.equal(kept.live("attn_neuron", i), seen.live("head", i)[:, None].expand(4, 24)) for i in range(3))
    assert fine.at("mlp_neuron").live("mlp_neuron", 0).all() == bool(seen.live("mlp", 0)), "neurons of an MLP without outputs are dead"
    assert fine.at("layer") == tlnp.Circuit.full(fine.at("layer").space) or not all(seen.count().values())


def test_views_over_other_layers_and_what_is_not_gated(toy: Toy) -> None:
    heads = tlnp.Circuit.from_nodes(toy[0], {"head": [(1, 2)]})
    assert heads.at("mlp").count() == {"mlp": 3} and heads.at("layer").count() == {"layer": 3}, "what is not gated runs"
    middle = tlnp.Circuit.from_masks(toy[0], {"blocks.1.attn.hook_z": torch.tensor([0.0, 1, 0, 0])})
    assert middle.at("head").space.layers == (1,)
    assert middle.at("head", layers=[0, 1]).nodes("head") == [(0, i) for i in range(4)] + [(1, 1)]
    with pytest.raises(ValueError, match="unknown granularity 'heads'"):
        heads.at("heads")
    with pytest.raises(ValueError, match="layer 3 does not exist"):
        heads.at("head", layers=3)
    with pytest.raises(ValueError, match="granularities is empty"):
        heads.at(())


def test_views_take_the_constants_along_or_say_what_is_missing(toy: Toy) -> None:
    model, prompts = toy
    space = find_nodes(model).restrict(("attn_neuron", "mlp_neuron"))
    fitted = tlnp.Ablation("mean").fit(model, prompts, space.hooks)
    fine = tlnp.Circuit(space, {key: torch.zeros(shape) for key, shape in space.shapes.items()}, fitted)
    heads = fine.at("head")
    assert set(heads.ablation.constants) == {f"blocks.{i}.attn.hook_z" for i in range(3)}
    assert tlnp.evaluate(model, heads, prompts).n_prompts == 24
    with pytest.raises(ValueError, match=r"'mean' ablation has no constants for blocks\.0\.hook_mlp_out, where mlp nodes are cut.*under"):
        fine.at("mlp")
    assert fine.under("zero").at("mlp").size == 0 and (~fine).at("mlp").size == 3, "nothing is cut, nothing is missing"


def test_circuits_of_other_granularities_say_how_they_are_compared(toy: Toy, circuit: tlnp.Circuit) -> None:
    heads = tlnp.Circuit.from_nodes(toy[0], {"head": [(1, 2)]})
    both = tlnp.Circuit.from_nodes(toy[0], {"head": [(1, 2)], "mlp": [(0,)]})
    for compare in (lambda a, b: a.iou(b), lambda a, b: a - b, lambda a, b: a <= b, lambda a, b: a < b, lambda a, b: a & b,
                    lambda a, b: a | b, lambda a, b: a >= b, lambda a, b: tlnp.viz.compare(a, b)):
        with pytest.raises(ValueError, match=r"over different nodes: .*at the same ones first, a\.at\('head'\) and b\.at\('head'\)"):
            compare(circuit, heads)
    with pytest.raises(ValueError, match=r"a\.at\(\('mlp', 'head'\)\)"):
        both.iou(circuit)
    kept = circuit.at("head").nodes("head")
    assert circuit.at("head").iou(heads) == ((1, 2) in kept) / len({*kept, (1, 2)})
    with pytest.raises(ValueError, match=r"a\.at\('head', layers=\[0, 1, 2\]\)"):
        heads.iou(tlnp.Circuit.from_masks(toy[0], {"blocks.1.attn.hook_z": torch.ones(4)}))
    with pytest.raises(ValueError, match="neither tells apart"):
        heads.iou(tlnp.Circuit.from_nodes(toy[0], {"mlp": [(0,)]}))
    for other in ("circuit", None, 3):
        with pytest.raises(TypeError):
            _ = circuit - other  # type: ignore[operator]
        with pytest.raises(TypeError):
            _ = circuit <= other  # type: ignore[operator]


@pytest.mark.parametrize("nodes", [{"head": [(0, 1)], "attn": []}, {"head": [(0, 1)], "attn": [(1,)]},
                                   {"head": [(0, 1)], "attn_neuron": []},
                                   {"mlp": [(0,)], "mlp_neuron": [(1, 0)]}, {"layer": [(0,)], "head": [(1, 0)], "mlp": []}])
def test_nodes_that_would_be_dropped_are_refused(toy: Toy, nodes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"nodes: .* can't be kept, since all above it, or all below, is cut"):
        tlnp.Circuit.from_nodes(toy[0], nodes)
    assert tlnp.Circuit.from_nodes(toy[0], {"layer": [(0,)], "head": []}).count() == {"layer": 1, "head": 0}, "its MLP is not gated"
