"""Exact tests of what is left: each head, block, layer and node is closed in turn, and stays closed where that does no harm."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_nodeprune.masks import Landscape, Losses, circuits_of
from tl_nodeprune.search.budget import Budget

MEASURED, GLANCE = 48, 8  # prompts that a test is run on, at most; of these, those that every candidate is run on first
TOGETHER = 32  # circuits that are put to the model in one call
WIDE, CHEAPEST = 3.0, 8  # a rise on the first prompts, over the room left, that rules a unit out; so many are tested all the same
CANDIDATES = 4  # nodes that are looked at, the lowest by the search's scores, for each that may be tested
TAKEN = (1.0, 0.6, 0.3, 0.12)  # of units that can go one by one, the shares tried together
SWEEPS, SETTLED = 2, 0.02  # over all units, at most; a sweep that closes less than this share of the nodes is the last
USUAL = 48  # tests of a circuit, about


@dataclass
class ExactTests:
    """Closes what a circuit does not need, as measured on the prompts searched.

    rows: those prompts; scores: the search's order. over: whether time is up, so that what is best so far is returned. Of the units and
    nodes looked at, `tested` were run on all of the rows, `ruled_out` on the first of them only, where the loss rose by far more than there
    was room for; complete: whether none that could go is untested.
    """

    landscape: Landscape
    budget: Budget
    rows: Int[Tensor, "row"]
    scores: Float[Tensor, "node"]
    over: Callable[[], bool] = lambda: False
    tested: int = 0
    ruled_out: int = 0
    complete: bool = True

    def measure(self, kept: Sequence[Bool[Tensor, "node"]]) -> Losses:
        """Circuits on the prompts, [circuit row]."""
        return self.landscape.losses(circuits_of(kept), self.rows)

    def minimal(self, kept: Bool[Tensor, "node"], limit: float, tests: int) -> Bool[Tensor, "node"]:
        """Without each head, block and layer, then each single node (`tests` of them at most, the lowest by score first), whose removal
        measures within the limit, until none is left that could go. Choices get less sure (`choice_hinge`) by no more than the loss may
        rise."""
        losses, left = self.measure([kept]), tests
        allowed = replace(self.budget, max_loss=limit), float(losses.hinge.mean()) + max(limit - float(losses.loss.mean()), 0)
        for _ in range(SWEEPS):
            before = kept
            kept, _ = self._test(kept, self._units(kept), allowed, None)
            nodes = kept.nonzero()[self.scores[kept].argsort()]
            looked_at = nodes[: CANDIDATES * max(left, 0)]
            self.complete &= len(looked_at) == len(nodes)
            kept, used = self._test(kept, list(looked_at), allowed, left)
            left -= used
            if int(kept.sum()) >= (1 - SETTLED) * int(before.sum()):
                break
        return kept

    def _units(self, kept: Tensor) -> list[Tensor]:
        """What is kept of each unit; once where that is the same for several."""
        inside = [unit[kept[unit]] for unit in self.landscape.units()]
        return list({tuple(unit.tolist()): unit for unit in inside if len(unit)}.values())

    def _test(self, kept: Tensor, groups: list[Tensor], allowed: tuple[Budget, float], most: int | None) -> tuple[Tensor, int]:
        """Try to close each group, the cheapest first; `most` tests at most. The circuit, and how many tests that took."""
        if not groups or self.over() or most is not None and most < 1:
            self.complete &= not groups
            return kept, 0
        room = max(allowed[0].max_loss - float(self.measure([kept]).loss.mean()), 0.0)
        rises = self._rises(kept, groups)
        self.complete &= len(rises) == len(groups)
        order = rises.argsort().tolist()
        likely = [i for place, i in enumerate(order) if place < CHEAPEST or float(rises[i]) <= WIDE * room]
        waiting, used = likely if most is None else likely[:most], 0
        self.ruled_out += len(rises) - len(likely)
        self.complete &= len(waiting) == len(likely)
        while waiting and not self.over() and (most is None or used < most):
            now = waiting[: TOGETHER if most is None else min(TOGETHER, most - used)]
            waiting = waiting[len(now):]
            used += len(now)
            losses = self.measure([_without(kept, groups[i]) for i in now])
            fine, cheapest = self._fine(losses, allowed), losses.loss.mean(-1).argsort().tolist()
            passed = [now[j] for j in cheapest if fine[j]]
            taken = self._together(kept, [groups[i] for i in passed], allowed)
            for i in passed[:taken]:
                kept = _without(kept, groups[i])
            if taken:
                waiting = passed[taken:] + waiting  # what could go alone may still
        self.tested += used
        self.complete &= not waiting
        return kept, used

    def _rises(self, kept: Tensor, groups: list[Tensor]) -> Tensor:
        """By how much the loss rises on the first prompts where each group is closed; of the first groups only when time is up."""
        few = self.rows[torch.linspace(0, len(self.rows) - 1, min(GLANCE, len(self.rows)), dtype=torch.float32).long()]
        before = self.landscape.losses(circuits_of([kept]), few).loss.mean()
        found = []
        for some in _blocks(groups):
            if self.over():
                break
            found.append(self.landscape.losses(circuits_of([_without(kept, group) for group in some]), few).loss.mean(-1) - before)
        return torch.cat(found).cpu() if found else torch.zeros(0, dtype=torch.float32)

    def _together(self, kept: Tensor, groups: list[Tensor], allowed: tuple[Budget, float]) -> int:
        """How many of groups that can go one by one can go together, in order."""
        counts = sorted({1, *(round(len(groups) * share) for share in TAKEN)} - {0}) if groups else []
        if not counts:
            return 0
        fine = self._fine(self.measure([_without(kept, torch.cat(groups[:count])) for count in counts]), allowed).tolist()
        return max((count for count, fits in zip(counts, fine, strict=True) if fits), default=0)

    def _fine(self, losses: Losses, allowed: tuple[Budget, float]) -> Tensor:
        budget, hinge = allowed
        return (budget.violation(losses) <= 1) & (losses.hinge.mean(-1) <= hinge + 1e-6)


def expected_forwards(landscape: Landscape) -> int:
    """About how many forwards of a prompt the tests of a circuit take."""
    measured = min(landscape.n_prompts, MEASURED)
    return (len(landscape.units()) + CANDIDATES * USUAL // 3) * min(measured, GLANCE) + USUAL * measured


def _without(kept: Tensor, group: Tensor) -> Tensor:
    return kept.index_fill(0, group, False)


def _blocks(groups: list[Tensor]) -> Iterator[list[Tensor]]:
    for i in range(0, len(groups), TOGETHER):
        yield groups[i: i + TOGETHER]
