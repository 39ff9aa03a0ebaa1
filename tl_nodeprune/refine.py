"""The finish of a search: exchanges and removals planned on a local quadratic model, each taken only as far as it measures well,
then exact tests that nothing more can be left out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tl_nodeprune.budget import Snapshot
from tl_nodeprune.landscape import CURVATURES, Landscape, Quadratic, Record
from tl_nodeprune.limits import Limits
from tl_nodeprune.objective import kl_divergence

WIDEN, NARROW, TRUSTED, DOUBTED = 1.3, 2.0, 0.7, 0.3
ALL_NODES, LEAST_HINGE = 16384, 0.01
MODEL_PROMPTS, MODEL_SIZE = 128, 1 << 28  # that the quadratic is of, where there are as many, and numbers in it at most
SETTLED, STILL = 0.003, 3  # stop when as many rounds in a row bring less than this share
STALE = 0.95  # exact tests go by the prices of one circuit until this share of it is left

Move = list[int]


class Refinement:
    """Improves a snapshot: fewer nodes within the budget, or for a fixed size, or within limits, a smaller loss. Never returns a worse one,
    nor one that is less sure of its choices (`choice_hinge`): what is lost there shows on fresh prompts only.

    rows: of the reference's prompts, all of which the budget holds for. scores: [node], the search's; where there are very many
    nodes, only the best of the closed ones are candidates.
    """

    radius, widest = 0.1, 0.2  # share of the nodes that a round flips: at first, at most
    exchanged = 0.25  # exchanges for each of these flips, at most

    def __init__(self, landscape: Landscape, rows: Tensor, start: Snapshot, scores: Tensor, *, step_prompts: int,
                 generator: torch.Generator, record: Record) -> None:
        self.landscape, self.budget, self.scores = landscape, landscape.budget, scores
        self.generator, self.record = generator, record
        self._prices: list[float] = []
        self._priced: Quadratic | None = None
        self.everything, n = rows, len(rows)
        nodes = min(landscape.n, max(2 * start.size, ALL_NODES))
        some = min(max(step_prompts, MODEL_PROMPTS), max(MODEL_SIZE // (CURVATURES * nodes), 1))
        self.rows = rows if n <= some else rows[torch.randperm(n, generator=generator)[:some]]
        self.best = landscape.snapshot(start.kept, rows)
        self._hinge_limit = max(self.best.measured.hinge, LEAST_HINGE)

    def run(self, rounds: int, first_step: int) -> int:
        """Rounds of exchanges and removals, until they bring nothing or `rounds` are over. How many were run."""
        radius, still = self.radius, 0
        for n in range(rounds):
            before = self.best
            model = self.landscape.quadratic(before.kept, self.rows, self._candidates(), self.generator)
            exchanges, changes = self._plan(model, max(int(radius * before.size), 2))
            share = self._take(model.nodes, exchanges, changes)
            self.record(first_step + n, self.best.loss, self.best.size, max(self._prices, default=0.0))
            radius = min(radius * WIDEN, self.widest) if share > TRUSTED else radius / NARROW if share < DOUBTED else radius
            still = still + 1 if self._merit(self.best) > (1 - SETTLED) * self._merit(before) else 0
            if still >= STILL or not exchanges and not changes:
                return n + 1
        return rounds

    def _merit(self, found: Snapshot) -> float:
        """What a round should lower: the loss for a fixed size, within limits or above the budget; else the size, with unused budget
        counted in."""
        above = not self.budget.smallest or found.violation > 1
        return found.violation if above else found.size * found.violation**0.5

    def _candidates(self) -> Tensor:
        kept = self.best.kept
        ranked = torch.where(kept, torch.inf, self.scores)
        return ranked.topk(min(len(kept), max(2 * int(kept.sum()), ALL_NODES))).indices

    def _plan(self, model: Quadratic, flips: int) -> tuple[list[Move], list[Move]]:
        """Exchanges that lower the predicted loss (within limits, openings too), then removals up to the budget, or above it openings."""
        start, self._prices = model.loss, []
        exchanges: list[Move] = []
        limits = self.budget.limits and self.budget.limits.among(model.nodes)
        while len(exchanges) < self.exchanged * flips and (move := _within(model, limits) if limits else _exchange(model)):
            exchanges.append(move)
        if not self.budget.smallest:
            return exchanges, []
        if self.best.violation > 1:
            return exchanges, self._openings(model, flips, start)
        changes: list[Move] = []
        limit = start + (1 - self.best.violation) * self.budget.max_loss
        while 2 * len(changes) < flips:
            costs = model.costs().masked_fill(~model.kept, torch.inf)
            i = int(costs.argmin())
            if model.loss + float(costs[i]) > limit:
                break
            changes.append([i])
            self._prices.append(model.flip(i))
        return exchanges, changes

    def _openings(self, model: Quadratic, flips: int, start: float) -> list[Move]:
        """Nodes to open, until the prediction is within the budget and half of the flips at least, since less comes true than is predicted.
        Where it is only that too many choices differ, which nothing predicts: as many nodes again."""
        over = self.best.loss - self.budget.max_loss
        least, worst = ((flips + 1) // 2, 0.0) if over > 0 else (max(self.best.size, flips), torch.inf)
        openings: list[Move] = []
        while len(openings) < least or over > 0 and model.loss > start - over:
            costs = model.costs().masked_fill(model.kept, torch.inf)
            i = int(costs.argmin())
            if costs[i] >= worst:
                break
            openings.append([i])
            model.flip(i)
        return openings

    def _take(self, nodes: Tensor, exchanges: list[Move], changes: list[Move]) -> float:
        """Take as many moves, in order, as measure better; all exchanges first. The share that was taken, 0 to 1."""
        moves, start = exchanges + changes, self.best
        taken, low, high = 0, len(exchanges), len(moves)
        if self._try(start, nodes, moves):
            return 1.0
        while low < high:  # the most changes that stay within the budget
            middle = (low + high) // 2
            if self._try(start, nodes, moves[:middle]):
                taken, low = middle, middle + 1
            else:
                high = middle
        count = len(exchanges) // 2
        while not taken and count:
            taken, count = count if self._try(start, nodes, moves[:count]) else 0, count // 2
        return taken / max(len(moves), 1)

    def _try(self, start: Snapshot, nodes: Tensor, moves: list[Move]) -> bool:
        kept = start.kept.clone()
        for i in (i for move in moves for i in move):
            kept[nodes[i]] = ~kept[nodes[i]]
        if not self.budget.allows(kept):
            return False
        limit = max(self.best.violation, 1.0) if self.budget.smallest else self.best.violation
        found = self.landscape.snapshot(kept, self.everything, limit=limit)
        better = self.budget.better(found, self.best) and found.measured.hinge <= self._hinge_limit
        if better:
            self.best = found
        return better

    def minimal(self, tests: int) -> bool:
        """Remove whole heads and blocks, then single nodes, for as long as an exact test stays within the budget.

        tests: of single nodes at most, the likeliest first. Whether no single node is left that could go.
        """
        before, left, complete = None, tests, True
        while self.best is not before and self.best.size:
            self._remove_one_by_one(self.landscape.units(), limit=None)
            before = self.best
            took, complete = self._remove_one_by_one(list(before.kept.nonzero()), limit=left)
            left -= took
        return complete

    def _remove_one_by_one(self, groups: list[Tensor], limit: int | None) -> tuple[int, bool]:
        """Try the groups round and round, the cheapest first, until none can go from the circuit as it is by then. How many tests that
        took, and whether it came to its end."""
        waiting = [groups[i] for i in self._prices_of(groups).argsort().tolist()]
        failed: list[Tensor] = []
        tests = 0
        while waiting and (limit is None or tests < limit):
            group = waiting.pop(0)
            kept = self.best.kept.clone()
            kept[group] = False
            if int(kept.sum()) == self.best.size:
                continue
            tests += 1
            found = self.landscape.snapshot(kept, self.everything, limit=1)
            if found.violation <= 1 and found.measured.hinge <= self._hinge_limit:
                self.best = found
                waiting, failed = waiting + failed, []
            else:
                failed.append(group)
        return tests, not waiting

    def _prices_of(self, groups: list[Tensor]) -> Tensor:
        """What each group's removal would cost by the quadratic model, or by the scores for a loss that has none."""
        if self.budget.loss is not kl_divergence:
            return torch.stack([self.scores[group][self.best.kept[group]].sum() for group in groups]) if groups else torch.zeros(0)
        if self._priced is None or self.best.size < STALE * len(self._priced.nodes):
            self._priced = self.landscape.quadratic(self.best.kept, self.rows, self.best.kept.nonzero()[:, 0], self.generator)
        place = torch.full((self.landscape.n,), -1)
        place[self._priced.nodes] = torch.arange(len(self._priced.nodes))
        live = (group[self.best.kept[group]] for group in groups)
        return torch.stack([self._priced.cost_of_closing(place[group]) for group in live]) if groups else torch.zeros(0)


class Descent(Refinement):
    """The way down from the full model, or from another large circuit within the budget: removals alone, many at a time, the cheapest
    first. A choice may be less sure than the full model's by as much as the loss may rise."""

    radius, widest, exchanged = 0.3, 0.6, 0.0

    def __init__(self, *circuit: Any, **search: Any) -> None:
        super().__init__(*circuit, **search)
        self._hinge_limit = max(self._hinge_limit, self.budget.max_loss)

    def _merit(self, found: Snapshot) -> float:
        return found.size


def _exchange(model: Quadratic) -> Move | None:
    """Open the closed node and close the kept one that lower the loss most; None, and nothing changed, where no pair does."""
    if bool(model.kept.all()) or not bool(model.kept.any()):
        return None
    opened = int(model.costs().masked_fill(model.kept, torch.inf).argmin())
    gained = model.flip(opened)
    costs = model.costs().masked_fill(~model.kept, torch.inf)
    costs[opened] = torch.inf
    closed = int(costs.argmin())
    if gained + float(costs[closed]) > -1e-4 * abs(model.loss):
        model.flip(opened)
        return None
    model.flip(closed)
    return [opened, closed]


def _within(model: Quadratic, limits: Limits) -> Move | None:
    """Open the closed node, and where a limit is full close the kept one that makes room for it, that lower the loss most; None, and
    nothing changed, where none does. Nothing is closed for its own sake: that would fit the search's prompts only."""
    needs, frees = limits.full(model.kept)
    best, lowest = None, -1e-4 * abs(model.loss)
    for need in needs[~model.kept].unique(dim=0):
        opened = int(model.costs().masked_fill(model.kept | (needs != need).any(1), torch.inf).argmin())
        move, gained = [opened], model.flip(opened)
        if need.any():
            costs = model.costs().masked_fill(~model.kept | (need & ~frees).any(1), torch.inf)
            move.append(int(costs.argmin()))
            gained += float(costs[move[1]])
        model.flip(opened)
        if gained < lowest:
            best, lowest = move, gained
    for i in best or []:
        model.flip(i)
    return best
