"""The budget's circuit from a run that is trained: where its order of all nodes is cut, judged on prompts held out."""

from __future__ import annotations

import math
from dataclasses import replace

import pandas as pd
from torch import Tensor

from tl_nodeprune.masks import circuits_of
from tl_nodeprune.search.exact_tests import MEASURED, ExactTests, expected_forwards
from tl_nodeprune.search.held_out import ENOUGH_HELD
from tl_nodeprune.search.run import Run

FEW = 0.5  # the budget on the prompts searched over that asked for, where those held out are too few to tell
SURE = 1.25  # times the nodes, at most, that are kept where they make sure of the budget
ROOM = 0.1  # of what the budget leaves, the share that exact tests may use
BISECTED = 0.02  # a size is settled when the next smaller one tried is nearer than this share


def smallest(run: Run, table: pd.DataFrame, start: Tensor | None, exact_tests: int) -> tuple[Tensor, ExactTests]:
    """The circuit that the run's budget asks for, and the tests that it went through. table: the run's frontier."""
    cut = _cut(run, table)
    if start is not None:
        cut = _better(run, cut, start)
    run.progress.stage("exact tests")
    run.progress.plan(expected_forwards(run.landscape))
    tests = ExactTests(run.landscape, run.budget, run.searched_rows(MEASURED), run.order, run.progress.over)
    if not run.budget.smallest:
        tests.complete = False
        return run.landscape.without_moot(cut), tests
    tested = run.landscape.without_moot(tests.minimal(cut, _room(run, tests, cut), exact_tests))
    kept = _choose(run, [cut, tested])
    tests.complete &= kept is tested
    return kept, tests


def _cut(run: Run, table: pd.DataFrame) -> Tensor:
    """The smallest size of the run's order that is within the budget, or the size asked for."""
    budget = run.budget
    if not budget.smallest:
        return run.top(budget.max_size or run.landscape.n)
    sizes = [0, *map(int, table["nodes"])]
    place = 1 + int((table["kl"] <= budget.max_loss).to_numpy().argmax())  # the full model is within any budget
    while place < len(sizes) - 1 and not _within(run, run.top(sizes[place])):
        place += 1
    low, high = sizes[place - 1], sizes[place]
    while high - low > max(BISECTED * high, 1) and not run.progress.over():
        middle = max(round(math.sqrt(max(low, 1) * high)), low + 1)
        if middle >= high:
            break
        low, high = (low, middle) if _within(run, run.top(middle)) else (middle, high)
    larger = [run.top(min(round(high * SURE ** (i / 4)), run.landscape.n)) for i in range(5)]
    sure = [kept for kept, held in zip(larger, run.judge(larger), strict=True) if held.meets(budget.max_loss)]
    return (sure or larger)[0]


def _within(run: Run, kept: Tensor) -> bool:
    """Whether a circuit is within the budget: on the prompts searched, and on those held out as far as these can tell."""
    budget, (held,) = run.budget, run.judge([kept])
    losses = run.landscape.losses(circuits_of([kept]), run.searched_rows(MEASURED))
    fine = replace(budget, max_loss=budget.max_loss * _few(run)).violation(losses) <= 1
    return bool(fine[0]) and held.kl <= budget.max_loss


def _few(run: Run) -> float:
    """Times the budget on the prompts searched: less where those held out are too few to tell."""
    return FEW if run.n_held < ENOUGH_HELD else 1.0


def _better(run: Run, cut: Tensor, start: Tensor) -> Tensor:
    """A circuit to start from, where it is within the budget and smaller, or of the size asked for and more faithful."""
    budget = run.budget
    if budget.smallest:
        return start if int(start.sum()) < int(cut.sum()) and _within(run, start) else cut
    fits = budget.limits.hold(start.cpu()) if budget.limits else int(start.sum()) <= (budget.max_size or 0)
    losses = run.landscape.losses(circuits_of([cut, start]), run.searched_rows()).loss.mean(-1)
    return start if fits and losses[1] < losses[0] else cut


def _room(run: Run, tests: ExactTests, kept: Tensor) -> float:
    """How far the loss on the prompts searched may rise: a part of the way to where that on prompts held out comes to the budget, in
    proportion. All of it would go into units that are dearer than what the order cuts next."""
    budget, (held,) = run.budget, run.judge([kept])
    loss = float(tests.measure([kept]).loss.mean())
    return loss + ROOM * max(min(budget.max_loss * _few(run), loss * budget.max_loss / max(held.kl, 1e-9)) - loss, 0)


def _choose(run: Run, chain: list[Tensor]) -> Tensor:
    """The smallest of the circuits that is within the budget on prompts held out."""
    judged = run.judge(chain)
    fits = [i for i, held in enumerate(judged) if held.kl <= run.budget.max_loss] or [0]
    sure = [i for i in fits if judged[i].meets(run.budget.max_loss) and int(chain[i].sum()) <= SURE * int(chain[fits[-1]].sum())]
    return chain[(sure or fits)[-1]]
