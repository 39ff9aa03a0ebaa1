"""The stages of a search, from thresholding to exact tests, and the room that it leaves for fresh prompts."""

from __future__ import annotations

from dataclasses import replace

import torch

from tl_nodeprune.circuit import Circuit
from tl_nodeprune.landscape import Landscape, Record
from tl_nodeprune.nodes import GateKey
from tl_nodeprune.objective import kl_divergence
from tl_nodeprune.preference import Sample
from tl_nodeprune.refine import Descent, Refinement
from tl_nodeprune.search import Search

ROUND_COST = 12  # steps of the search that are worth one round of the refinement
FOLDS, FEWEST_TO_HOLD = 4, 16  # parts of the pairs, each held out once for the gap; from how many pairs on
GAP_COST = 20  # one step in so many goes to each fold's search
FRESH, TIGHTEST = 1.5, 0.4  # KL on fresh pairs over the budget, at most; the tightest budget over that asked for
FEW = 0.5  # the budget over that asked for for pairs that are several but too few to hold any out
NEARLY = 1.05  # a violation of the tighter budget, an estimate, that nothing is paid to get rid of
LARGE = 1 / 3  # of the nodes: where thresholding ends with more, the way down from the full model is tried too
MOOT = 1 + 1e-4  # times the violation with nodes that have no effect: rounding
MOST = 2  # times the nodes that a cut through the scores may take to meet a budget that opening nodes does not


class Stages:
    """The parts of a search in order: thresholding, refinement, the gap to fresh pairs, refinement within a budget that leaves room for
    the gap, exact tests."""

    def __init__(self, landscape: Landscape, sample: Sample, *, step_prompts: int, generator: torch.Generator, record: Record) -> None:
        self.landscape, self.sample, self.budget = landscape, sample, landscape.budget
        self.generator, self.common = generator, {"step_prompts": step_prompts, "generator": generator, "record": record}
        self.everything, self.gap = torch.arange(len(sample.prompts)), float("nan")
        self.taken = 0

    def run(self, *, steps: int, exact_tests: int, start: Circuit | None) -> bool:
        """Leaves the best circuit in `best`, and the scores of all nodes in `order`. Whether it is minimal as far as exact tests tell."""
        by_kl = self.budget.loss is kl_divergence
        rounds = steps // ROUND_COST if by_kl else 0
        pairs = len(self.sample.pairs.unique())
        hold_out = rounds >= 2 and pairs >= FEWEST_TO_HOLD
        if by_kl and self.budget.smallest and 1 < pairs < FEWEST_TO_HOLD:
            self.landscape.budget = replace(self.budget, max_loss=self.budget.max_loss * FEW)
        again = steps // GAP_COST if hold_out else 0
        search = Search(self.landscape, self.everything, steps=steps - rounds - FOLDS * again, start=start, **self.common)  # type: ignore[arg-type]
        self.best, self.taken = search.run(), search.taken
        self.order = search.order
        self.landscape.restore(self.best.ablation)
        if rounds >= 2 and self.budget.smallest and (self.best.violation > 1 or self.best.size > LARGE * self.landscape.n):
            self._descend(rounds)
        finish = self._refine(search, rounds // 2 if again else rounds)
        if again and self.best.size:
            self._make_room(again)
            finish = self._refine(search, rounds - rounds // 2)
            if self._found_by_scores(search):
                finish = self._refine(search, 0)
            elif self.budget.smallest and self.best.violation > NEARLY and self._descend(rounds):
                finish = self._refine(search, rounds - rounds // 2)
        if self.best.violation > 1 and self.budget.smallest:
            finish = self._within_what_was_asked(search)
        minimal = self.budget.smallest and finish.minimal(exact_tests)
        self.best = finish.best
        self._drop_moot()
        return minimal

    def _drop_moot(self) -> None:
        """Closes what has no effect: output dims of an MLP with no neuron kept, neurons of one with no output dim."""
        kept = self.best.kept.clone()
        gates = self.landscape.gates(kept)  # views into `kept`
        for layer in self.landscape.space.layers:
            neurons, outs = (gates.get(GateKey(name, layer)) for name in ("mlp_neuron", "mlp_out"))
            if neurons is not None and outs is not None and not (neurons.any() and outs.any()):
                neurons.zero_()
                outs.zero_()
        without = self.landscape.snapshot(kept, self.everything)
        if without.violation <= max(self.best.violation * MOOT, 1.0 if self.budget.smallest else 0.0):
            self.best = without

    def _refine(self, search: Search, rounds: int) -> Refinement:
        finish = Refinement(self.landscape, self.everything, self.best, search.scores, **self.common)  # type: ignore[arg-type]
        self.taken += finish.run(rounds, first_step=self.taken)
        self.best = finish.best
        return finish

    def _descend(self, rounds: int) -> bool:
        """Whether the way down from the full model comes to a better circuit within the budget as it is now."""
        full = self.landscape.snapshot(torch.ones(self.landscape.n, dtype=torch.bool), self.everything)
        descent = Descent(self.landscape, self.everything, full, torch.zeros(self.landscape.n), **self.common)
        self.taken += descent.run(rounds, first_step=self.taken)
        if better := self.landscape.budget.better(descent.best, self.landscape.snapshot(self.best.kept, self.everything)):
            self.best = descent.best
        return better

    def _make_room(self, steps: int) -> None:
        """How much worse than on its own pairs a circuit of this size does on others: searches on three quarters of them, each judged on
        the rest. The budget is tightened by what is too much."""
        if self.budget.limits is None:
            self.landscape.budget = replace(self.budget, max_size=self.best.size)
        excess = 0.0
        for rows, held in self.sample.folds(FOLDS, self.generator):
            search = Search(self.landscape, rows, steps=steps, first_step=self.taken, **self.common)  # type: ignore[arg-type]
            found = search.run()
            self.taken += search.taken
            self.landscape.restore(found.ablation)
            excess += (self.landscape.snapshot(found.kept, held).loss - found.loss) / FOLDS
            self.landscape.restore(self.best.ablation)
        self.gap = 1 + max(excess, 0.0) / max(self.best.loss, 1e-12)
        room = min(1.0, max(FRESH / max(self.gap, 1e-12), TIGHTEST)) if self.budget.smallest else 1.0
        self.landscape.budget = replace(self.budget, max_loss=self.budget.max_loss * room)

    def _found_by_scores(self, search: Search) -> bool:
        """Whether the tighter budget is better met by a cut through the search's own scores: where nodes matter alike for all prompts,
        those generalise better than nodes opened one by one. Where opening does not meet it, at up to `MOST` times the size."""
        if not self.budget.smallest:
            return False
        cut = search.cut()
        most = self.best.size - 1 if self.best.violation <= NEARLY else MOST * self.best.size
        if better := cut.violation <= 1 and cut.size <= most:
            self.best = cut
        return better

    def _within_what_was_asked(self, search: Search) -> Refinement:
        """Where there is no getting within the tighter budget: as far as it went, or, outside the one asked for, nodes added until that
        is met."""
        self.landscape.budget = self.budget
        self.best = self.landscape.snapshot(self.best.kept, self.everything)
        if self.best.violation > 1:
            self.best = search.grow(self.best.size)
        elif self.best.loss > 0:
            self.landscape.budget = replace(self.budget, max_loss=self.best.loss)
        return self._refine(search, 0)
