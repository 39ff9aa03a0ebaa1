"""One run: an order of all nodes, trained on some prompts, and its frontier of size against KL, measured on others too."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from tl_nodeprune.circuit import NodeScores, ranks
from tl_nodeprune.masks import STEP_COST, Landscape, NodeMasks, Reference, circuits_of, kl_divergence
from tl_nodeprune.nodes import check_counts, check_number, check_ready, find_attachment
from tl_nodeprune.prompts import Preference, PromptPairs, Sample, check_pairs, preference
from tl_nodeprune.search.budget import Budget
from tl_nodeprune.search.checkpoint import Checkpoint
from tl_nodeprune.search.exact_tests import expected_forwards
from tl_nodeprune.search.held_out import HeldOut
from tl_nodeprune.search.nested import PATH, PATH_PROMPTS, Nested

SMALLEST_SHARE, N_SIZES = 0.001, 36  # of the frontier
SEARCHED, JUDGED = 48, 256  # prompts that the frontier is measured on, at most: of those searched on, and of those held out
STEP_PROMPTS, CUDA_STEP_PROMPTS, FEW_STEP_PROMPTS = 32, 64, 16  # the last: for few nodes
STEPS_AT_1000, STEPS_POWER, FEWEST_STEPS, FEW_NODES = 150, 0.33, 48, 1000  # 260 for 5,000 nodes, 640 for 80,000
TRAINED_AT = 0.7  # of the budget, since fresh prompts have more loss than those trained on
PARTS, TRAINING, FRONTIER = 4, 0.6, 0.75  # of a time limit: by when the training ends, and the frontier is measured


@dataclass(frozen=True)
class Settings:
    """How a run goes, not what it seeks. steps: None: as many nodes need; step_prompts: None: as the device has it."""

    steps: int | None = None
    batch_size: int = 64
    step_prompts: int | None = None
    cache_bytes: int = 2 << 30
    seed: int = 0
    time_limit: float | None = None
    checkpoint: str | Path | None = None

    def __post_init__(self) -> None:
        counts = {"steps": self.steps, "batch_size": self.batch_size, "step_prompts": self.step_prompts}
        check_counts(**{name: value for name, value in counts.items() if value is not None})
        check_counts(0, cache_bytes=self.cache_bytes)
        check_number("seed", self.seed, Integral)
        if self.time_limit is not None:
            check_number("time_limit", self.time_limit)
            if not 0 < self.time_limit < math.inf:
                raise ValueError(f"time_limit={self.time_limit}; it must be a finite number of seconds above 0, or None.")
        if self.checkpoint is not None and not isinstance(self.checkpoint, str | Path):
            raise TypeError(f"checkpoint={self.checkpoint!r}; give a folder's name, or None.")

    def steps_of(self, n_nodes: int) -> int:
        return self.steps or max(round(STEPS_AT_1000 * (n_nodes / 1000) ** STEPS_POWER), FEWEST_STEPS)

    def prompts_of(self, device: torch.device, n_nodes: int) -> int:
        few = FEW_STEP_PROMPTS if n_nodes < FEW_NODES else STEP_PROMPTS
        return self.step_prompts or (CUDA_STEP_PROMPTS if device.type == "cuda" else few)


class Progress:
    """A bar over a whole run, in forwards of one prompt, that names the stage; and the time limit, seconds."""

    def __init__(self, title: str, *, show: bool, time_limit: float | None) -> None:
        self.began, self.limit, self.title = time.perf_counter(), time_limit or math.inf, title
        self.bar = tqdm(desc=title, total=1, disable=not show, bar_format="{l_bar}{bar}| {elapsed}, {remaining} left{postfix}")

    def plan(self, units: int) -> None:
        """So many forwards are still to come."""
        self.bar.total = max(self.bar.n + units, 1)
        self.bar.refresh()

    def stage(self, name: str) -> None:
        """What comes now."""
        self.bar.set_description(f"{self.title}: {name}")

    def passed(self, units: int) -> None:
        """So many forwards are done."""
        self.bar.total = max(self.bar.total, self.bar.n + units)
        self.bar.update(units)

    @property
    def seconds(self) -> float:
        """Since the run began."""
        return time.perf_counter() - self.began

    def over(self, share: float = 1.0) -> bool:
        """Whether this share of the time limit has gone."""
        return self.seconds >= share * self.limit

    def close(self) -> None:
        self.bar.total = self.bar.n
        self.bar.close()


@contextmanager
def going(masks: NodeMasks, title: str, settings: Settings, show: bool) -> Iterator[Progress]:
    """A search under way: its bar, and scores, gate and ablation as they were if anything goes wrong inside."""
    before = ({name: p.detach().clone() for name, p in masks.scores.items()}, masks.gate, masks.ablation)
    bar = Progress(title, show=show, time_limit=settings.time_limit)
    try:
        try:
            yield bar
        finally:
            bar.close()
    except BaseException:
        masks.gate, masks.ablation = before[1:]
        with torch.no_grad():
            for name, score in before[0].items():
                masks.scores[name].copy_(score)
        raise


def searchable(masks: NodeMasks, prompts: PromptPairs, *, stacklevel: int) -> Any:
    """The model of masks that a search can use. Raises what `prune` says it raises for masks and prompts. stacklevel: of a warning."""
    model = masks.model
    check_pairs(prompts)
    attachment = find_attachment(model)
    if attachment is None or attachment.owner is not masks:
        raise RuntimeError("a circuit is applied to this model; leave its `with` block before pruning.")
    if not attachment.active:
        raise RuntimeError("the masks are switched off here; leave `with masks.inactive()` before pruning.")
    check_ready(model, gradient=True)
    prompts.check_fits(model)
    prompts.check_corrupted(masks.asked_ablation.name)
    if prompts.n_same and masks.asked_ablation.name == "interchange":
        warnings.warn(f"{prompts.n_same} of the {len(prompts)} corrupted prompts are the same as the clean ones: nothing is ablated there, "
                      "and any circuit is right on them.", stacklevel=stacklevel)
    return model


class Run:
    """The full model on all prompts, and over them a landscape to search on and one to judge on. Call it with the masks inactive.

    searched, held: None: nothing is held out. both_ways: pairs that are prompts of the task in either direction are searched on in both.
    """

    def __init__(self, masks: NodeMasks, searched: PromptPairs, held: PromptPairs | None, budget: Budget, settings: Settings,
                 progress: Progress, *, both_ways: bool) -> None:
        self.masks, self.budget, self.settings, self.progress = masks, budget, settings, progress
        model, space = masks.model, masks.space
        self.generator = torch.Generator().manual_seed(int(settings.seed))
        progress.stage("the full model")
        sides = [preference(model, part, settings.batch_size) for part in ([searched] if held is None else [searched, held])]
        self.preference: Preference = sides[0]
        turn = both_ways and self.preference.both_ways
        self.samples = [side.sample(turn and side is sides[0]) for side in sides]  # what is judged on is as given
        self.given = searched
        everything = searched if held is None or held.clean.shape != searched.clean.shape else _joined(searched, held)
        self.ablation = masks.asked_ablation.fit(model, everything, space.hooks, batch_size=settings.batch_size)
        hooks = tuple(dict.fromkeys(key.hook for key in space.free()))
        self.landscapes = [Landscape(space, Reference(model, sample.prompts, self.ablation, hooks, full=sample.full,
                                                      batch_size=settings.batch_size, cache_bytes=settings.cache_bytes), budget.loss)
                           for sample in self.samples]
        for landscape in self.landscapes:
            landscape.passed = progress.passed
            landscape.constants = self.landscapes[0].constants  # those learned on the prompts searched
        self.order = torch.zeros(self.landscape.n, device=self.landscape.device, dtype=torch.float32)
        self.trace, self.cut_short = torch.zeros(0, 3, dtype=torch.float32), False
        self.by_kl = budget.loss is kl_divergence
        self.n_held = sides[1].n_different if held is not None else 0

    @property
    def landscape(self) -> Landscape:
        """Over the prompts searched on."""
        return self.landscapes[0]

    @property
    def searched(self) -> Sample:
        return self.samples[0]

    @property
    def held(self) -> Sample | None:
        return self.samples[1] if len(self.samples) > 1 else None

    @property
    def near(self) -> float | int | None:
        """What the sizes trained on are near: a loss, a number of nodes, or nothing where all are asked for."""
        if self.held is None:
            return None
        return TRAINED_AT * self.budget.max_loss if self.budget.smallest else self.budget.max_size

    def train(self, checkpoint: Checkpoint | None = None) -> None:
        """Leaves the order of all nodes in `order`."""
        settings, progress = self.settings, self.progress
        steps = settings.steps_of(self.landscape.n)
        nested = Nested(self.landscape, steps=steps, step_prompts=settings.prompts_of(self.landscape.device, self.landscape.n),
                        generator=self.generator, near=self.near, limits=self.budget.limits)
        sizes = len(self.sizes())
        measured = sizes * sum(min(len(sample.prompts), most) for sample, most in zip(self.samples, (SEARCHED, JUDGED), strict=False))
        to_come = 2 * measured + expected_forwards(self.landscape) if self.held is not None else 0
        progress.plan(STEP_COST * (steps * nested.batch + len(PATH) * min(PATH_PROMPTS, self.landscape.n_prompts)) + to_come)
        progress.stage("ordering all nodes")
        self.landscape.try_half()
        if checkpoint is None or not checkpoint.restore(nested, self.generator):
            nested.begin()
        while nested.done < steps and not (progress.over(TRAINING) and nested.done):
            nested.step(max(nested.done / steps, min(progress.seconds / (TRAINING * progress.limit), 1.0)))
            if checkpoint:
                checkpoint.save(nested, self.generator)
        if checkpoint:
            checkpoint.save(nested, self.generator, now=True)
        self.cut_short = nested.done < steps
        self.order, self.trace = nested.scores, nested.state["trace"][: nested.done].cpu()

    def top(self, size: int) -> Tensor:
        """The nodes of highest score, or within limits the best: kept [node] bool."""
        if self.budget.limits is not None:
            return self.budget.limits.best(self.order.cpu()).to(self.order.device)
        kept = torch.zeros(self.landscape.n, dtype=torch.bool, device=self.order.device)
        kept[self.order.argsort(descending=True, stable=True)[:size]] = True
        return kept

    def scores(self) -> NodeScores:
        """The order as scores."""
        return NodeScores.from_flat(ranks(self.order.cpu()), self.masks.space, self.landscape.ablation_now())

    def sizes(self) -> list[int]:
        """Those of the frontier: from a thousandth of the nodes to all, evenly in their logarithm; of few nodes every one."""
        n = self.landscape.n
        if n <= N_SIZES:
            return list(range(1, n + 1))
        low = max(SMALLEST_SHARE * n, 1)
        return sorted({round(low * (n / low) ** (i / (N_SIZES - 1))) for i in range(N_SIZES)})

    def searched_rows(self, most: int = SEARCHED) -> Tensor:
        return self.searched.some(most)

    def judge(self, kept: Sequence[Tensor], most: int | None = JUDGED) -> list[HeldOut]:
        """Circuits on the prompts held out, `most` of them at most."""
        assert self.held is not None
        rows = self.held.some(most or len(self.held.prompts))
        losses, prompts = self.landscapes[1].losses(circuits_of(kept), rows), self.held.prompts[rows]
        full = prompts.logit_diff(self.held.full[rows.to(self.held.full.device)]).cpu()
        right = [(full > 0) ^ (wrong.cpu() > 0) for wrong in losses.wrong]
        return [HeldOut.of(loss, ok, self.held.pairs[rows]) for loss, ok in zip(losses.loss.cpu(), right, strict=True)]

    def frontier(self) -> pd.DataFrame:
        """Size against KL: a row per size that no smaller one does better than."""
        self.progress.stage("the frontier")
        sizes, rows = self.sizes(), self.searched_rows()
        parts = [part for i in range(PARTS) if (part := sizes[::-1][i::PARTS])]  # each from all of the nodes down; cut short by time alone
        table = pd.concat([self._measured(some, rows) for some in parts if not self.progress.over(FRONTIER) or some is parts[0]])
        table = table.sort_values("nodes", ignore_index=True)
        return table[table["kl"] < table["kl"].cummin().shift(fill_value=math.inf)].reset_index(drop=True)

    def _measured(self, sizes: list[int], rows: Tensor) -> pd.DataFrame:
        kept = [self.top(size) for size in sizes]
        table = pd.DataFrame({"nodes": sizes, "share": [size / self.landscape.n for size in sizes],
                              "search_kl": self.landscape.losses(circuits_of(kept), rows).loss.mean(-1).tolist()})
        held = self.judge(kept)
        return table.assign(**{name: [getattr(one, name) for one in held] for name in ("kl", "low", "high", "accuracy")})


def _joined(a: PromptPairs, b: PromptPairs) -> PromptPairs:
    """Prompts of one width, together; what is read of them are the prompts, not the answers."""
    names = ("clean", "corrupted", "attention_mask", "answer_positions")
    both = {name: torch.cat([getattr(a, name), getattr(b, name)]) for name in names}
    first = torch.cat([side.answers.view(len(side), -1)[:, :1] for side in (a, b)])[:, 0]
    return PromptPairs(answers=first, wrong_answers=first + 1, **both)
