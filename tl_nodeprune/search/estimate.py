"""What a search will take, before it is begun: bytes, and seconds from a few timed steps."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from tl_nodeprune.masks import Ablation, Landscape, NodeMasks, make_node_masks
from tl_nodeprune.nodes import check_types, device_of, find_attachment, peak_memory
from tl_nodeprune.prompts import PromptPairs
from tl_nodeprune.search.budget import Budget
from tl_nodeprune.search.exact_tests import TOGETHER, expected_forwards
from tl_nodeprune.search.held_out import set_aside
from tl_nodeprune.search.nested import PATH, PATH_PROMPTS
from tl_nodeprune.search.run import JUDGED, SEARCHED, Progress, Run, Settings, searchable

_SIZES = ("weights", "stand_ins", "saved_for_backward", "search_state", "peak")
_TIMES = ("set_up", "training", "frontier", "finish", "seconds")
TIMED = 3  # steps


@dataclass(frozen=True)
class Estimate:
    """What `prune` with the same arguments will take.

    Bytes: weights, of the model; stand_ins, kept for closed nodes; saved_for_backward, by one step; search_state, scores, gates and
    logits; peak, of the process (on CUDA of the allocator). Seconds: set_up, training, frontier, finish, and all.
    """

    weights: int
    stand_ins: int
    saved_for_backward: int
    search_state: int
    peak: int
    set_up: float
    training: float
    frontier: float
    finish: float

    @property
    def seconds(self) -> float:
        """Of all of it."""
        return self.set_up + self.training + self.frontier + self.finish

    def to_frame(self) -> pd.DataFrame:
        """A row per quantity: what, amount, unit."""
        sizes = [(name, getattr(self, name) / 2**20, "MiB") for name in _SIZES]
        return pd.DataFrame([*sizes, *((name, getattr(self, name), "s") for name in _TIMES)], columns=["what", "amount", "unit"])

    def __repr__(self) -> str:
        return f"about {self.seconds:.0f} s and {self.peak / 2**30:.2f} GiB\n{self.to_frame().round(1).to_string(index=False)}"


def estimate(model: Any, prompts: PromptPairs, *, held_out: PromptPairs | None = None, granularities: str | Iterable[str] | None = None,
             layers: int | Iterable[int] | None = None, ablation: str | Ablation = "interchange", steps: int | None = None,
             batch_size: int = 64, step_prompts: int | None = None, cache_bytes: int = 2 << 30) -> Estimate:
    """Time a few steps on some of the prompts, and say what `prune(max_kl=...)` will take on all of them. The model is left as it was.

    model: a model, or one with masks attached: then these are used, and granularities, layers and ablation are theirs.
    prompts: the pairs that `prune` will get.
    held_out: pairs held out, as in `prune`.
    granularities: which nodes to gate, as in `add_node_masks`. None: all that the model has.
    layers: which layers, as in `add_node_masks`. None: all.
    ablation: as in `add_node_masks`.
    steps: of the training, as in `prune`.
    batch_size: prompts per forward.
    step_prompts: prompts per step, as in `prune`.
    cache_bytes: bytes of stand-ins to keep, 2 GiB by default.

    Raises: what `add_node_masks` and `prune` raise.
    """
    check_types(estimate, locals())
    settings = Settings(steps, batch_size, step_prompts, cache_bytes)
    attached = find_attachment(model)
    masks = attached.owner if attached is not None and isinstance(attached.owner, NodeMasks) else make_node_masks(
        model, granularities, layers, ablation)
    with nullcontext() if masks.attached else masks.on(model):
        searchable(masks, prompts, stacklevel=3)
        if held_out is not None:
            held_out.check_fits(model, "held_out")
        searched, held = set_aside(prompts, held_out, 0)
        with masks.inactive():
            return _measured(masks, searched, held, settings)


def _measured(masks: NodeMasks, searched: PromptPairs, held: PromptPairs, settings: Settings) -> Estimate:
    model, bar = masks.model, Progress("estimate", show=False, time_limit=None)
    few = min(len(searched), settings.prompts_of(device_of(model), masks.space.free_total()))
    began, before = time.perf_counter(), peak_memory(model)
    run = Run(masks, searched[:few], None, Budget(), settings, bar, both_ways=True)
    turned = len(run.searched.prompts) / few
    set_up = (time.perf_counter() - began) / few * (len(searched) * turned + len(held))
    land, rows = run.landscape, torch.arange(min(few, run.landscape.n_prompts))
    land.try_half()
    step, saved = _step(land, rows)
    forward = _timed(lambda: land.losses(torch.ones(1, land.n, dtype=torch.float32) * 0.5, rows)) / len(rows)
    n_prompts, sizes = round(len(searched) * turned), len(run.sizes())
    judged = min(len(held), JUDGED)
    path = len(PATH) * min(PATH_PROMPTS, n_prompts) * step / len(rows)
    finish = forward * (expected_forwards(land) + 8 * (min(n_prompts, SEARCHED) + judged))
    each = land.reference.bytes_per_prompt
    stand_ins = each * sum(min(n, settings.cache_bytes // max(each, 1)) for n in (n_prompts, len(held)))
    logits = (n_prompts + len(held)) * land.reference.full[0].numel() * 4
    state = logits + 4 * land.n * (8 + max(4 * len(rows), 2 * TOGETHER))
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    peak = max(before, peak_memory(model)) + stand_ins + state
    return Estimate(weights, stand_ins, saved, state, peak, set_up, settings.steps_of(land.n) * step + path,
                    sizes * forward * (min(n_prompts, SEARCHED) + judged), finish)


def _step(land: Landscape, rows: Tensor) -> tuple[float, int]:
    """Seconds of one step, and bytes that it saves for its backward pass beside the weights."""
    gates = torch.full((len(rows), land.n), 0.5, dtype=torch.float32)
    weights = {p.untyped_storage().data_ptr() for p in land.reference.model.parameters()}
    seen: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        land.gradient(gates, rows, 0)
    return _timed(lambda: land.gradient(gates, rows, 0)), sum(seen.values())


def _timed(call: Any) -> float:
    """The median time of a few calls, seconds."""
    times = []
    for _ in range(TIMED):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return sorted(times)[TIMED // 2]

