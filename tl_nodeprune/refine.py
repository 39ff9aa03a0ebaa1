"""The finish of a search: exchanges and removals planned on a local quadratic model, each taken only as far as it measures well,
then exact tests that nothing more can be left out."""

from __future__ import annotations

import torch
from torch import Tensor

from tl_nodeprune.landscape import Landscape, Quadratic, Record, Snapshot
from tl_nodeprune.objective import kl_divergence

RADIUS, WIDEST, ALL_NODES = 0.1, 0.2, 16384
SETTLED, STILL = 0.01, 3  # stop when as many rounds in a row bring less than this share

Move = list[int]


class Refinement:
    """Improves a snapshot: fewer nodes within the budget, or for a fixed size a smaller loss. Never returns a worse one.

    scores: [node], the search's; where there are very many nodes, only the best of the closed ones are candidates.
    """

    def __init__(self, landscape: Landscape, start: Snapshot, scores: Tensor, *, step_prompts: int, generator: torch.Generator,
                 record: Record) -> None:
        self.landscape, self.budget, self.best, self.scores = landscape, landscape.budget, start, scores
        self.generator, self.record = generator, record
        self._prices: list[float] = []
        self.everything = torch.arange(len(landscape.reference.prompts))
        n = len(self.everything)
        self.rows = self.everything if n <= step_prompts else torch.randperm(n, generator=generator)[:step_prompts]

    def run(self, rounds: int, first_step: int) -> Snapshot:
        """Rounds of exchanges and removals, until they bring nothing or `rounds` are over."""
        radius, still = RADIUS, 0
        for step in range(first_step, first_step + rounds):
            before = self.best
            model = self.landscape.quadratic(before.kept, self.rows, self._candidates(), self.generator)
            exchanges, removals = self._plan(model, max(int(radius * before.size), 2))
            taken = self._take(model.nodes, exchanges, removals)
            self.record(step, self.best.loss, self.best.size, max((cost for cost in self._prices), default=0.0))
            radius = min(radius * 1.5, WIDEST) if taken else radius / 3
            still = still + 1 if self._gain(before) < SETTLED else 0
            if still >= STILL or radius * before.size < 1 and not taken or not exchanges and not removals:
                break
        return self.best

    def _candidates(self) -> Tensor:
        kept = self.best.kept
        ranked = torch.where(kept, torch.inf, self.scores)
        return ranked.topk(min(len(kept), max(2 * int(kept.sum()), ALL_NODES))).indices

    def _gain(self, before: Snapshot) -> float:
        smaller = 1 - self.best.size / max(before.size, 1)
        return max(smaller, 1 - self.best.violation / max(before.violation, 1e-12) if self.best.size == before.size else smaller)

    def _plan(self, model: Quadratic, flips: int) -> tuple[list[Move], list[Move]]:
        """Exchanges that lower the predicted loss, then removals (or, above the budget, openings) up to the budget."""
        room = (1 - self.best.violation) * self.budget.max_loss
        limit, self._prices = model.loss + room, []
        exchanges: list[Move] = []
        changes: list[Move] = []
        while 2 * len(exchanges) < flips and (move := _exchange(model)):
            exchanges.append(move)
        if self.budget.max_size is not None:
            return exchanges, changes
        while model.loss > limit and not bool(model.kept.all()):
            changes.append([i := int(model.costs().masked_fill(model.kept, torch.inf).argmin())])
            model.flip(i)
        while not changes or 2 * len(exchanges) + len(changes) < flips:
            costs = model.costs().masked_fill(~model.kept, torch.inf)
            i = int(costs.argmin())
            if model.loss + float(costs[i]) > limit:
                break
            changes.append([i])
            self._prices.append(model.flip(i))
        return exchanges, changes

    def _take(self, nodes: Tensor, exchanges: list[Move], changes: list[Move]) -> bool:
        """Take as many moves, in order, as measure better; all exchanges first. Whether any were."""
        moves, start = exchanges + changes, self.best
        low, high = len(exchanges), len(moves)
        if self._try(start, nodes, moves):
            return True
        while low < high:  # the most changes that stay within the budget
            middle = (low + high) // 2
            if self._try(start, nodes, moves[:middle]):
                low = middle + 1
            else:
                high = middle
        count = len(exchanges) // 2
        while self.best is start and count:
            self._try(start, nodes, moves[:count])
            count //= 2
        return self.best is not start

    def _try(self, start: Snapshot, nodes: Tensor, moves: list[Move]) -> bool:
        kept = start.kept.clone()
        for i in (i for move in moves for i in move):
            kept[nodes[i]] = ~kept[nodes[i]]
        found = self.landscape.snapshot(kept, self.everything)
        better = self.budget.better(found, self.best)
        if better:
            self.best = found
        return better

    def minimal(self, tests: int) -> bool:
        """Remove whole heads and blocks, then single nodes, for as long as an exact test stays within the budget.

        tests: of single nodes at most, the likeliest first. Whether no single node is left that could go.
        """
        for groups, limit in ((self.landscape.units(), None), ([[i] for i in range(self.landscape.n)], tests)):
            again = True
            while again:
                again, done = self._remove_one_by_one([torch.as_tensor(group) for group in groups], limit)
                limit = None if limit is None else max(limit - done, 0)
        return self._tested_all

    def _remove_one_by_one(self, groups: list[Tensor], limit: int | None) -> tuple[bool, int]:
        """One pass over the groups that are live, the cheapest first. Whether any went, and how many were tested."""
        live = [group for group in groups if bool(self.best.kept[group].any())]
        gone, self._tested_all = False, limit is None or len(live) <= limit
        live = [live[i] for i in self._prices_of(live).argsort().tolist()[:limit]]
        for group in live:
            kept = self.best.kept.clone()
            kept[group] = False
            if int(kept.sum()) < self.best.size and self._fits(kept):
                self.best, gone = self.landscape.snapshot(kept, self.everything), True
        return gone, len(live)

    def _prices_of(self, groups: list[Tensor]) -> Tensor:
        """What each group's removal would cost by the quadratic model, or by the scores for a loss that has none."""
        if self.budget.loss is not kl_divergence:
            return torch.stack([self.scores[group][self.best.kept[group]].sum() for group in groups]) if groups else torch.zeros(0)
        model = self.landscape.quadratic(self.best.kept, self.rows, self.best.kept.nonzero()[:, 0], self.generator)
        place = torch.full((self.landscape.n,), -1)
        place[model.nodes] = torch.arange(len(model.nodes))
        return torch.stack([model.cost_of_closing(place[group][place[group] >= 0]) for group in groups]) if groups else torch.zeros(0)

    def _fits(self, kept: Tensor) -> bool:
        """Whether a circuit is within the budget; for KL, which is never below 0, some prompts can be enough to say no."""
        some = self.everything[:: max(len(self.everything) // 32, 1)]
        if self.budget.loss is kl_divergence and len(some) < len(self.everything):
            partial = self.landscape.snapshot(kept, some).loss * len(some)
            if partial > self.budget.max_loss * len(self.everything) * 2:
                return False
        return self.landscape.snapshot(kept, self.everything).violation <= 1


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
