"""A real model and one task of it: prompts to search on, fresh ones to judge on, and results that are written at once."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import baselines
import shapes
import torch
from report import Results
from torch import Tensor

import tl_nodeprune as tlnp
from tl_nodeprune.cli.inputs import load_model
from tl_nodeprune.masks.landscape import Landscape
from tl_nodeprune.search.run import FEW_NODES, Progress, Settings

SHARES = (0.01, 0.02, 0.03, 0.04, 0.05, 0.08, 0.12, 0.15, 0.20, 0.30, 0.50)
SPARE = 1.2  # prompts made for each that is wanted: some are answered wrong


class Case:
    """One model and task, and what has been measured of it."""

    def __init__(self, results: Results, options: argparse.Namespace, task: str) -> None:
        self.results, self.options, self.which = results, options, task
        self.task, self.seed = f"{options.shape or Path(options.model).name}/{task}", options.seed

    @cached_property
    def model(self) -> Any:
        if self.options.shape:
            return shapes.build(self.options.shape, self.options.device, torch.bfloat16 if self.options.device != "cpu" else torch.float32)
        return load_model(self.options.model, self.options.device)

    @cached_property
    def sides(self) -> tuple[tlnp.PromptPairs, tlnp.PromptPairs]:
        """Prompts to search on and fresh ones, no clean prompt in both; fewer where the task has too few different ones."""
        n, fresh = self.options.prompts, self.options.fresh
        made = tlnp.tasks.make(self.which, self.model, round(SPARE * (n + fresh)), self.seed).correct(self.model)
        searched, judged = made.split(n / (n + fresh), seed=self.seed)
        return searched[:n], judged[:fresh]

    def has(self, method: str) -> bool:
        return self.results.has(self.task, self.seed, method)

    def entry(self, method: str) -> dict[str, Any] | None:
        return next((e for e in self.results.entries if (e["task"], e["seed"], e["method"]) == (self.task, self.seed, method)), None)

    def add(self, method: str, **noted: Any) -> None:
        self.results.add(self.task, self.seed, method, device=device_name(self.options.device), **noted)
        print(f"{self.task} {method}: " + ", ".join(f"{k} {v:.4g}" for k, v in noted.items() if isinstance(v, float)), flush=True)

    def file(self, name: str) -> Path:
        return self.options.out / f"{self.task.replace('/', '-')}-seed{self.seed}-{name}.pt"

    def land(self, masks: tlnp.NodeMasks, prompts: tlnp.PromptPairs) -> Landscape:
        return baselines.landscape(masks, prompts, batch_size=self.options.batch_size, cache_bytes=self.options.cache_bytes)

    def judged(self, method: str, flat: Tensor, land: Landscape, **noted: Any) -> None:
        """KL and right choices on the fresh prompts at each share of the nodes, the best by their scores."""
        start, order, rows = time.perf_counter(), flat.argsort(descending=True, stable=True).to(land.device), torch.arange(land.n_prompts)
        full = land.reference.prompts.logit_diff(land.reference.full).cpu() > 0
        kl, right = list[float](), list[float]()
        for share in SHARES:
            kept = torch.zeros(land.n, device=land.device)
            kept[order[: max(round(share * land.n), 1)]] = 1
            losses = land.losses(kept[None], rows)
            kl.append(float(losses.loss.mean()))
            right.append(float((full ^ (losses.wrong[0].cpu() > 0)).float().mean()))
        self.add(method, kind="frontier", nodes=land.n, shares=list(SHARES), kl=kl, right=right, judge_seconds=time.perf_counter() - start,
                 **noted)

    @property
    def step_prompts(self) -> int:
        return Settings(step_prompts=self.options.step_prompts).prompts_of(torch.device(self.options.device), FEW_NODES)


@contextmanager
def counted() -> Iterator[list[int]]:
    """Forwards of one prompt that searches tell of inside, STEP_COST of them for a forward with its backward: a list of one number."""
    told, count = Progress.passed, [0]

    def passed(self: Progress, units: int) -> None:
        count[0] += units
        told(self, units)

    Progress.passed = passed  # type: ignore[method-assign]
    try:
        yield count
    finally:
        Progress.passed = told  # type: ignore[method-assign]


def different(prompts: tlnp.PromptPairs) -> int:
    return int(prompts.distinct().max()) + 1


def synchronise(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device != "cpu" else f"CPU, {torch.get_num_threads()} threads"
