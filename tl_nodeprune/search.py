"""The search: iterative hard thresholding of node scores, with the size led by the faithfulness budget.

Every node has a score. A step keeps the k best as a binary circuit, runs it once forward and backward, and moves the scores
of ALL nodes against the loss gradient at that circuit, so closed nodes rise as soon as opening them would help. k follows the
budget: it shrinks while the circuit is within it, and grows only when the loss has stopped falling at this k.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tl_nodeprune.budget import Snapshot
from tl_nodeprune.circuit import Circuit
from tl_nodeprune.landscape import Landscape, Record

START_SHARES = (0.5, 0.25, 0.12, 0.06, 0.03)
PATH = (0.05, 0.15, 0.3, 0.5, 0.7, 0.85)
RATE, RATE_DECAY = 0.3, 60
WINDOW, SHRINK, GROW, STALLED = 10, 0.85, 1.12, 0.97
PATIENCE = 6  # windows without a smaller circuit


class Search:
    """One run of the search over a landscape and some of its prompts (rows); `run` gives the best snapshot."""

    def __init__(self, landscape: Landscape, rows: Tensor, *, steps: int, step_prompts: int, generator: torch.Generator, record: Record,
                 start: Circuit | None = None, first_step: int = 0) -> None:
        self.landscape, self.budget, self.steps, self.record = landscape, landscape.budget, steps, record
        self.generator, self.step_prompts = generator, step_prompts
        self.everything = rows
        self.best: Snapshot | None = None
        self.nearest: Snapshot | None = None  # to the budget, of those outside it
        self.start, self.first_step, self.taken = start, first_step, 0

    def run(self) -> Snapshot:
        """Start from integrated gradients, threshold and step until nothing improves, then trim. Where nothing was within the budget, the
        nearest to it."""
        self.path_gradient = self._path_gradient()
        self.scores = -self.path_gradient / _rms(self.path_gradient)
        if self.start is not None:
            self._rank_first(self.landscape.flat(self.start))
        k = self._start_size() if self.budget.smallest else min(self.budget.max_size or self.landscape.n, self.landscape.n)
        lowest, before, stale = float("inf"), float("inf"), 0
        for step in range(self.steps):
            improved, violation = self._step(step, k)
            self.taken = step + 1
            lowest, stale = min(lowest, violation), 0 if improved else stale + 1
            if (step + 1) % WINDOW == 0:
                if self.budget.smallest:
                    k, before = self._next_size(k, lowest, before)
                lowest = float("inf")
            if stale >= PATIENCE * WINDOW and self.best:
                break
        if self.best and self.budget.smallest:
            return self._trim(self.best)
        found = self.best or self.nearest
        assert found is not None  # there is a step
        return found

    def _rows(self) -> Tensor:
        rows = self.everything
        return rows if len(rows) <= self.step_prompts else rows[torch.randperm(len(rows), generator=self.generator)[: self.step_prompts]]

    def _path_gradient(self) -> Tensor:
        """Mean gradient along the straight path from the ablated run to the full model: integrated gradients on the gates."""
        flats = [torch.full((self.landscape.n,), share) for share in PATH]
        return torch.stack([self.landscape.gradient(self._placed(flat), self._rows(), step=0)[1] for flat in flats]).mean(0).cpu()

    def _placed(self, flat: Tensor) -> Tensor:
        return flat.to(self.landscape.reference.full.device)

    def _top(self, k: int, scores: Tensor) -> Tensor:
        """The k nodes of highest score, or with limits the best within them."""
        if self.budget.limits:
            return self.budget.limits.best(scores)
        kept = torch.zeros(self.landscape.n, dtype=torch.bool)
        kept[scores.topk(k).indices] = True
        return kept

    def _rank_first(self, kept: Tensor) -> None:
        """Rank the nodes of a circuit before all others, each side in its order; the scores are only given out anew."""
        order = (self.scores.argsort(descending=True).argsort() + len(kept) * (~kept)).argsort()
        self.scores = torch.empty_like(self.scores).index_copy_(0, order, self.scores.sort(descending=True).values)
        found = self.landscape.snapshot(kept, self.everything, self.scores)
        if self.budget.better(found, None) and self.budget.allows(kept):
            self.best = found

    def _start_size(self) -> int:
        if self.start is not None:
            return max(int(self.landscape.flat(self.start).sum()), 1)
        sizes = [max(round(share * self.landscape.n), 1) for share in START_SHARES]
        rows = self._rows()
        return min(sizes, key=lambda k: self.landscape.snapshot(self._top(k, self.scores), rows).loss)

    def _step(self, step: int, k: int) -> tuple[bool, float]:
        kept, rows = self._top(k, self.scores), self._rows()
        measured, gradient = self.landscape.gradient(self._placed(kept.float()), rows, step)
        found = Snapshot(kept, self.budget.violation(measured), measured, self.landscape.ablation_now(), self.scores)
        if self.budget.better(found, self.best) and (len(rows) < len(self.everything) or self.landscape.constants):
            found = self.landscape.snapshot(kept, self.everything, self.scores)  # on all prompts, with constants that moved on
        if self.nearest is None or found.violation < self.nearest.violation:
            self.nearest = found
        if improved := self.budget.better(found, self.best):
            self.best = found
        gradient = gradient.cpu()
        self.scores = self.scores - RATE / (1 + step / RATE_DECAY) * gradient / _rms(gradient)
        size = int(kept.sum())
        self.record(self.first_step + step, measured.loss, size, float(self.scores.topk(size).values[-1]) if size else 0.0)
        return improved, found.violation

    def _next_size(self, k: int, lowest: float, before: float) -> tuple[int, float]:
        """Smaller while within the budget; larger once the loss no longer falls at this size; else as it is."""
        if lowest <= 1:
            return max(int(k * (SHRINK if lowest > 0.5 else SHRINK**2)), 1), float("inf")
        if lowest > STALLED * before:
            return min(int(k * GROW) + 1, self.landscape.n), float("inf")
        return k, lowest

    def grow(self, k: int) -> Snapshot:
        """The smallest circuit within the budget that adds nodes by attribution to the last one; the full model at worst."""
        order = self._top(k, self.scores) * self.path_gradient.abs().max() * 2 + self.path_gradient.abs()
        return self._bisect(order, k, self.landscape.n)

    @property
    def order(self) -> Tensor:
        """The scores of the best circuit, or the last scores where there was none."""
        scores = self.best.scores if self.best else self.scores
        assert scores is not None
        return scores

    def cut(self) -> Snapshot:
        """The smallest circuit within the landscape's budget as it is now, by `order`."""
        return self._bisect(self.order, 0, self.landscape.n)

    def _trim(self, best: Snapshot) -> Snapshot:
        """Drop the lowest scores of a circuit that is within the budget, as many as it allows; the scores are those it was cut from."""
        self.landscape.restore(best.ablation)
        assert best.scores is not None
        trimmed = self._bisect(torch.where(best.kept, best.scores, -torch.inf), 0, best.size)
        return trimmed if self.budget.better(trimmed, best) else best

    def _bisect(self, order: Tensor, low: int, high: int) -> Snapshot:
        """Between two sizes, a small one within the budget when nodes are kept in `order`; the larger end if none is."""
        found = high
        while low < high:
            middle = (low + high) // 2
            if self.landscape.snapshot(self._top(middle, order), self.everything, limit=1).violation <= 1:
                found = high = middle
            else:
                low = middle + 1
        return self.landscape.snapshot(self._top(found, order), self.everything, order)


def _rms(gradient: Tensor) -> Tensor:
    return gradient.pow(2).mean().sqrt().clamp(min=1e-12)
