"""A run's state in a folder: written in one piece, and taken up only by the same run."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from tl_nodeprune.circuit import files
from tl_nodeprune.masks import NodeMasks
from tl_nodeprune.prompts import PromptPairs
from tl_nodeprune.search.nested import Nested

NAME, EVERY = "search.safetensors", 30.0  # seconds


class Checkpoint:
    """Where a run is saved. asked: what makes it this run and no other, by name; a file of another one is refused.

    Raises: OSError where the folder cannot be written; ValueError for a file that is damaged or of another run.
    """

    def __init__(self, folder: str | Path, asked: Mapping[str, object]) -> None:
        self.path, self.asked, self._last = Path(folder) / NAME, {name: str(value) for name, value in asked.items()}, time.monotonic()
        files.make_folder(self.path.parent)  # raises now, not after the search
        files.check_target(self.path)
        files.remove_leftovers(self.path.parent)
        self._found = self._read() if self.path.exists() else None

    def restore(self, nested: Nested, generator: torch.Generator) -> bool:
        """Bring a training to where the file has it. Whether there was one. Raises ValueError for a file that lacks part of it."""
        if self._found is None:
            return False
        try:
            nested.load({name: value.clone() for name, value in self._found.items() if name != "generator"})
        except KeyError as error:
            raise ValueError(f"{self.path} is damaged: it lacks {error}; remove it to start again.") from error
        generator.set_state(self._found["generator"].clone())
        return True

    def save(self, nested: Nested, generator: torch.Generator, *, now: bool = False) -> None:
        """Write the training's state, at most every 30 seconds unless it is to be `now`."""
        if not now and time.monotonic() - self._last < EVERY:
            return
        tensors = {**nested.saved(), "generator": generator.get_state()}
        content = {name: value.contiguous().cpu() for name, value in tensors.items()}
        files.write(self.path, safetensors.torch.save(content, {"run": json.dumps(self.asked)}))
        self._last = time.monotonic()

    def _read(self) -> dict[str, Tensor]:
        try:
            with safetensors.safe_open(str(self.path), framework="pt") as file:
                run = json.loads((file.metadata() or {})["run"])
                found = {name: file.get_tensor(name).clone() for name in file.keys()}
        except (safetensors.SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{self.path} is damaged or not a checkpoint of this library; remove it to start again: {error}") from error
        other = [name for name in self.asked if run.get(name) != self.asked[name]]
        if other or "generator" not in found:
            raise ValueError(f"the checkpoint {self.path} is of another run: {', '.join(other)} differ. Give another folder, or remove it.")
        return found


def asked(masks: NodeMasks, prompts: PromptPairs, held_out: PromptPairs | None, **settings: object) -> dict[str, object]:
    """What makes a run this one: model, nodes, ablation, prompts, and the settings given."""
    space = masks.space
    return {"model": space.model_name, "nodes": sorted(space.shapes.items()), "ablation": masks.asked_ablation.name,
            "prompts": digest(prompts), "held_out": held_out and digest(held_out), **settings}


def digest(prompts: PromptPairs) -> str:
    """A fingerprint of prompts."""
    tensors = (prompts.clean, prompts.corrupted, prompts.answers, prompts.wrong_answers, prompts.attention_mask, prompts.answer_positions)
    return hashlib.sha256(b"".join(_bytes(value) for value in tensors)).hexdigest()[:16]


def _bytes(value: Any) -> bytes:
    return str(tuple(value.shape)).encode() + bytes(value.cpu().contiguous().numpy().tobytes())
