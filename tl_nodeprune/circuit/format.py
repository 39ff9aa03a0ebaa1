"""Circuits as files: safetensors whose every field is checked and whose every byte goes into a checksum.

Metadata: "format"; "ablation", its name; "space", the nodes as JSON (see `_Space`); "about", an About as JSON, where anything is known;
"sha256", of the file with 64 zeros in that place.
Tensors: "gate/GRANULARITY/LAYER", uint8, 1 = kept; "constant/HOOK", the ablation's, of any float type, at each hook point that is gated.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import pydantic
import safetensors.torch
import torch
from torch import Tensor

from tl_nodeprune.circuit.about import About
from tl_nodeprune.masks import ABLATIONS, FITTED, Ablation, check_constants
from tl_nodeprune.nodes import GRANULARITIES, GateKey, Gates, NodeSpace, settle

_FORMAT, _OLDER = "tl_nodeprune.circuit/2", "tl_nodeprune.circuit/1"
_BLANK = "0" * 64
_CONSTANT = "constant/"
_MOST_HEADER, _MOST_NODES, _MOST_POSITIONS = 1 << 24, 1 << 26, 1 << 20  # far above any model's: bytes; of all layers; of mean constants
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_TWINS = {"head": "attn_neuron", "attn_neuron": "head", "mlp": "mlp_out", "mlp_out": "mlp"}
_DTYPES = _FLOATS | {"U8": torch.uint8}

_Count = Annotated[int, pydantic.Field(ge=1, lt=1 << 53)]
_Whole = Annotated[int, pydantic.Field(ge=1, le=_MOST_NODES)]
_Layer = Annotated[int, pydantic.Field(ge=0, lt=10_000)]
_Rows = list[tuple[Literal[GRANULARITIES], _Layer, list[_Whole]]]  # type: ignore[valid-type]
_STRICT = pydantic.ConfigDict(strict=True, extra="forbid")


class _Space(pydantic.BaseModel):
    """The fields of a NodeSpace that are saved; shapes are rows of granularity, layer, shape."""

    model_config = _STRICT
    shapes: _Rows
    present: _Rows
    d_model: _Whole
    n_layers: Annotated[int, pydantic.Field(ge=1, le=10_000)]
    kv_heads: _Whole
    gated_mlp: bool
    model_name: str
    weights: list[tuple[Literal["attn", "mlp", "layer"], _Layer, _Count]]


class _Metadata(pydantic.BaseModel):
    model_config = _STRICT
    format: Literal["tl_nodeprune.circuit/2"]
    ablation: Literal[ABLATIONS]  # type: ignore[valid-type]
    space: str
    about: str = "{}"
    sha256: Annotated[str, pydantic.Field(pattern=r"^[0-9a-f]{64}$")]


class _Entry(pydantic.BaseModel):
    model_config = _STRICT
    dtype: str
    shape: list[_Whole]
    data_offsets: list[int]

    @property
    def size(self) -> int:
        return _DTYPES[self.dtype].itemsize * math.prod(self.shape)


class _Plan(NamedTuple):
    """What a header declares."""

    space: NodeSpace
    ablation: str
    about: About
    sha256: str
    tensors: dict[str, _Entry]


_ABOUT = pydantic.TypeAdapter(About)
_HEADER = pydantic.TypeAdapter(dict[str, dict[str, Any]])


def pack(space: NodeSpace, live: Gates, ablation: Ablation, about: About = About()) -> bytes:  # noqa: B008 (frozen)
    """A circuit as the bytes of a file. Raises ValueError for one that `unpack` would not take."""
    tensors = {f"gate/{key.granularity}/{key.layer}": gate.to(torch.uint8) for key, gate in live.items()}
    tensors |= {f"{_CONSTANT}{hook}": ablation.constants[hook].contiguous() for hook in space.hooks if hook in ablation.constants}
    rows = {name: [[*key, list(shape)] for key, shape in getattr(space, name).items()] for name in ("shapes", "present")}
    fields = {name: value for name, value in asdict(space).items() if name in _Space.model_fields}
    metadata = {"format": _FORMAT, "ablation": ablation.name, "space": json.dumps(fields | rows), "sha256": _BLANK}
    try:
        if about != About():
            metadata["about"] = _ABOUT.dump_json(about, exclude_defaults=True).decode()
        data = safetensors.torch.save(tensors, metadata)
        header = data[8:8 + int.from_bytes(data[:8], "little")]
        _read(_plan(header), tensors)
    except ValueError as error:
        raise ValueError(f"this circuit cannot be saved: {_in_words(error)}") from error
    return data.replace(_mark(_BLANK), _mark(_checksum(header, _BLANK, memoryview(data)[8 + len(header):])), 1)


def unpack(path: Path) -> tuple[NodeSpace, Gates, Ablation, About]:
    """A circuit from a file, in memory of its own. What a file declares is checked before any of it is read.

    Raises: FileNotFoundError; OSError where it cannot be read; ValueError for a file that is damaged or no circuit.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}.")
    with open(path, "rb") as file:
        size, length = os.fstat(file.fileno()).st_size, int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(_MOST_HEADER, size - 8):
            raise ValueError(f"{path} is damaged or not a safetensors file.")
        header = file.read(length)
        try:
            plan = _plan(header)
            right = 8 + length + sum(entry.size for entry in plan.tensors.values())
            if size != right:
                raise ValueError(f"it has {size} bytes, and should have {right}")
            data = bytearray(size - 8 - length)
            if file.readinto(data) != len(data) or _checksum(header, plan.sha256, data) != plan.sha256:
                raise ValueError("its checksum does not fit what is in it")
            return _read(plan, {name: _tensor(data, entry) for name, entry in plan.tensors.items()})
        except ValueError as error:
            raise ValueError(f"{path} is damaged or not a circuit of this library: {_in_words(error)}") from error


def _read(plan: _Plan, tensors: Mapping[str, Tensor]) -> tuple[NodeSpace, Gates, Ablation, About]:
    """What the tensors of a file mean. Raises ValueError for gates other than 0 and 1, or of which one is open and another keeps it closed;
    for constants that are not finite."""
    gates = {key: tensors[f"gate/{key.granularity}/{key.layer}"] for key in plan.space.shapes}
    for key, gate in gates.items():
        if int(gate.max()) > 1:
            raise ValueError(f"gate/{key.granularity}/{key.layer} holds {int(gate.max())}; gates are 0 or 1")
    for key, live in settle(plan.space, gates).items():
        if not torch.equal(live, gates[key].bool()):
            raise ValueError(f"gate/{key.granularity}/{key.layer} has nodes open that gates above or below keep closed")
    constants = {name.removeprefix(_CONSTANT): value for name, value in tensors.items() if name.startswith(_CONSTANT)}
    return plan.space, gates, Ablation(plan.ablation, constants), plan.about


def _tensor(data: bytearray, entry: _Entry) -> Tensor:
    """A tensor of a file, in the file's memory as it was read."""
    flat = torch.frombuffer(data, dtype=_DTYPES[entry.dtype], offset=entry.data_offsets[0], count=math.prod(entry.shape))
    return flat.view(entry.shape)


def _plan(header: bytes) -> _Plan:
    """Read a header. Raises ValueError for one that `pack` does not write."""
    entries = _HEADER.validate_json(header)
    fields = entries.pop("__metadata__", {})
    if fields.get("format") != _FORMAT:
        older = "; an older version wrote it, without a checksum: find the circuit again" if fields.get("format") == _OLDER else ""
        raise ValueError(f"its format is {fields.get('format')!r}, expected {_FORMAT!r}{older}")
    metadata = _Metadata.model_validate(fields)
    space = _space(_Space.model_validate_json(metadata.space))
    tensors = {name: _Entry.model_validate(entry) for name, entry in entries.items()}
    gates = {f"gate/{key.granularity}/{key.layer}": shape for key, shape in space.shapes.items()}
    constants = {f"{_CONSTANT}{hook}": hook for hook in space.hooks if metadata.ablation in FITTED}
    if missing := [name for name in gates if name not in tensors]:
        raise ValueError(f"it lacks {missing[0]}")
    for name, entry in tensors.items():
        is_gate = entry.dtype == "U8" and tuple(entry.shape) == gates.get(name)
        if not is_gate and not (entry.dtype in _FLOATS and name in constants):
            raise ValueError(f"{name} of {entry.dtype} {entry.shape} has no place in it")
    given = {constants[name]: tuple(entry.shape) for name, entry in tensors.items() if name in constants}
    check_constants(metadata.ablation, given, space)
    if any(shape[0] > _MOST_POSITIONS for shape in given.values()):
        raise ValueError(f"it has means of more than {_MOST_POSITIONS:,} positions")
    place = 0
    for entry in sorted(tensors.values(), key=lambda one: one.data_offsets):
        if entry.data_offsets != [place, place + entry.size]:
            raise ValueError(f"a tensor lies at {entry.data_offsets}, expected {[place, place + entry.size]}")
        place += entry.size
    return _Plan(space, metadata.ablation, _ABOUT.validate_json(metadata.about), metadata.sha256, tensors)


def _space(given: _Space) -> NodeSpace:
    """The nodes, where they are those of one model. Raises ValueError."""
    fields = given.model_dump()
    for name in ("shapes", "present"):
        fields[name] = {GateKey(granularity, layer): tuple(shape) for granularity, layer, shape in fields[name]}
        if len(fields[name]) != len(getattr(given, name)):
            raise ValueError(f"{name} names a gate tensor twice")
    space = NodeSpace(**fields | {"weights": tuple(fields["weights"])})
    if not space.shapes or any(space.present.get(key) != shape for key, shape in space.shapes.items()):
        raise ValueError("shapes has gate tensors that present has not, or none")
    for key, shape in space.present.items():
        if alone := [name for name in ("layer", _TWINS.get(key.granularity)) if name and GateKey(name, key.layer) not in space.present]:
            raise ValueError(f"layer {key.layer} has {key.granularity} nodes without {alone[0]} nodes, as no model has")
        heads = space.present.get(GateKey("head", key.layer), (0,))
        right = {"head": len(shape) == 1 and shape[0] % space.kv_heads == 0, "attn_neuron": len(shape) == 2 and shape[:1] == heads,
                 "mlp_neuron": len(shape) == 1, "mlp_out": shape == (space.d_model,)}
        if key.layer >= space.n_layers or not right.get(key.granularity, shape == ()):
            raise ValueError(f"{key.granularity} nodes {list(shape)} in layer {key.layer} fit no model of {space.n_layers} layers, "
                             f"d_model {space.d_model} and {space.kv_heads} key heads")
    owners = [GateKey(name, layer) for name, layer, _ in space.weights]
    if len(set(owners)) < len(owners) or any(key.layer >= space.n_layers or key.granularity != "layer" and key not in space.present
                                             for key in owners):
        raise ValueError("weights names a part twice, or one that is not there")
    if sum(math.prod(shape) for shape in space.present.values()) > _MOST_NODES:
        raise ValueError(f"it has more than {_MOST_NODES:,} nodes")
    return space


def _checksum(header: bytes, digest: str, data: bytes | bytearray | memoryview) -> str:
    """SHA-256 of a file whose checksum is `digest`, with zeros in that place."""
    found = hashlib.sha256(len(header).to_bytes(8, "little") + header.replace(_mark(digest), _mark(_BLANK), 1))
    found.update(data)
    return found.hexdigest()


def _mark(digest: str) -> bytes:
    return f'"sha256":"{digest}"'.encode()


def _in_words(error: Exception) -> str:
    if not isinstance(error, pydantic.ValidationError):
        return str(error)
    first = error.errors(include_url=False)[0]
    return f"{'.'.join(map(str, first['loc'])) or 'its header'}: {first['msg']}"
