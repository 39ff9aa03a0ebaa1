"""The finish of a search: a circuit of one size made better by exchanges, then smaller by removals, each taken only as far as it
measures well, and at last exact tests that nothing more can be left out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_nodeprune.losses import kl_divergence
from tl_nodeprune.search.budget import Budget, Limits
from tl_nodeprune.search.landscape import Landscape, Losses, circuits_of
from tl_nodeprune.search.quadratic import Quadratic, quadratic

ROUNDS, EXCHANGED, REMOVED = 2, 0.08, 0.2  # rounds of each kind at most; moves of a round at most, as a share of the circuit's nodes
TAKEN = (1.0, 0.6, 0.3, 0.12)  # shares of a plan that are measured, all in one go
MEASURED, MODELLED, MODEL_SIZE = 128, 48, 1 << 28  # prompts measured on and in a quadratic, at most; numbers in it
CANDIDATES = 4096  # closed nodes beside as many as are kept that a round looks at, the best by the search's scores
SETTLED, LEAST_HINGE = 0.003, 0.01  # a round that brings less of the loss ends the rounds; a hinge that is none
SETTLED_SIZE = 0.02  # a sweep of tests that brings less of the nodes is the last
TOGETHER, WIDE, CHEAPEST, SWEEPS, GLANCE = 16, 8.0, 16, 2, 16  # tests in one go; price over the room left that
# rules a unit out; those tested all the same; sweeps over all units; prompts that are run first, which most tests end at
DIRECTIONS, TESTED = 9, 64  # rows of a quadratic for each prompt; exact tests that are about usual


@dataclass
class Tests:
    """What the exact tests came to: units and nodes tested, those that prices ruled out, and whether none that could go is untested."""

    tested: int = 0
    ruled_out: int = 0
    complete: bool = True


def expected_forwards(n_prompts: int) -> int:
    """About how many forwards of a prompt a finish takes, on so many prompts searched."""
    plans, measured = 2 * ROUNDS + 2, min(n_prompts, MEASURED)
    return plans * min(n_prompts, MODELLED) * (1 + 2 * DIRECTIONS) + measured * (2 * ROUNDS * len(TAKEN) + TESTED)


class Finish:
    """Betters a circuit on the prompts searched. Its choices may get less sure (`choice_hinge`) by no more than `begin` says: what is lost
    there shows on fresh prompts only. over: whether time is up, so that what is best so far is returned."""

    def __init__(self, landscape: Landscape, budget: Budget, rows: Int[Tensor, "row"], scores: Float[Tensor, "node"], *,
                 generator: torch.Generator, over: Callable[[], bool] = lambda: False) -> None:
        self.landscape, self.budget, self.scores, self.generator, self.over = landscape, budget, scores, generator, over
        self.rows = rows
        self.by_kl = budget.loss is kl_divergence
        self.hinge_limit = torch.inf
        self.tests = Tests()
        self._priced: tuple[Tensor, Quadratic] | None = None  # the circuit that prices are known at, and its quadratic

    def measure(self, kept: Sequence[Bool[Tensor, "node"]]) -> Losses:
        """Circuits on the prompts measured on."""
        return self.landscape.losses(circuits_of(kept), self.rows)

    def begin(self, kept: Bool[Tensor, "node"]) -> float:
        """Take a circuit's hinge as what none may be above; a choice may be less sure by as much as the loss may rise. Its violation."""
        losses = self.measure([kept])
        self.hinge_limit = max(float(losses.hinge.mean()), self.budget.max_loss if self.budget.smallest else LEAST_HINGE)
        return float(self.budget.violation(losses)[0])

    def exchange(self, kept: Bool[Tensor, "node"], rounds: int = ROUNDS) -> Bool[Tensor, "node"]:
        """Nodes exchanged for closed ones, at one size, while the loss falls; within limits by granularity openings too."""
        best = float(self._merit(self.measure([kept]))[0])
        for _ in range(rounds if self.by_kl else 0):
            if self.over() or not kept.any() or bool(kept.all()) and self.budget.limits is None:
                break
            model = self._model(kept, self._candidates(kept))
            most = max(int(EXCHANGED * int(kept.sum())), 2)
            moves = [model.nodes[pair] for pair in model.exchanges(most)] if self.budget.limits is None else self._within(model, most)
            found = self._best_of(kept, moves)
            before = best
            if found is not None and found[1] < best:
                kept, best = found
            if best > (1 - SETTLED) * before:
                break
        return kept

    def remove(self, kept: Bool[Tensor, "node"], limit: float, rounds: int = ROUNDS) -> list[Bool[Tensor, "node"]]:
        """Ever smaller circuits from this one, whose loss stays at the limit or below; exchanges in between."""
        chain, budget = [kept], replace(self.budget, max_loss=limit)
        for _ in range(rounds if self.by_kl else 0):
            if self.over() or not kept.any():
                break
            model = self._model(kept, kept.nonzero()[:, 0])
            moves = list(model.nodes[model.removals(limit, max(int(REMOVED * int(kept.sum())), 1))].view(-1, 1))
            fits = self._most_of(kept, moves, budget)
            if fits is None:
                break
            kept = self.exchange(fits, rounds=1)
            chain.append(kept)
        return chain

    def minimal(self, kept: Bool[Tensor, "node"], limit: float, tests: int) -> Bool[Tensor, "node"]:
        """Without each head, block and layer, then each single node (`tests` of them at most, the likeliest first), whose removal measures
        within the limit, until none is left that could go."""
        budget, left = replace(self.budget, max_loss=limit), tests
        for _ in range(SWEEPS):
            before = kept
            kept, _ = self._test(kept, self.landscape.units(), budget, None)
            kept, used = self._test(kept, list(kept.nonzero()), budget, left)
            left -= used
            if int(kept.sum()) >= (1 - SETTLED_SIZE) * int(before.sum()):
                break
        return kept

    def _test(self, kept: Tensor, groups: list[Tensor], budget: Budget, most: int | None) -> tuple[Tensor, int]:
        """Try to close each group, the cheapest first; `most` tests at most. The circuit, and how many tests that took."""
        groups = [group for group in groups if bool(kept[group].any())]
        prices, room = self._prices(kept, groups), max(budget.max_loss - float(self.measure([kept]).loss.mean()), 1e-9)
        order = prices.argsort().tolist()
        likely = [i for place, i in enumerate(order) if place < CHEAPEST or float(prices[i]) <= WIDE * room]
        self.tests.ruled_out += len(groups) - len(likely)
        waiting = likely if most is None else likely[: max(most, 0)]
        self.tests.complete &= len(waiting) == len(likely)
        used = 0
        while waiting and not self.over() and (most is None or used < most):
            now = waiting[: TOGETHER if most is None else min(TOGETHER, most - used)]
            waiting = waiting[len(now):]
            used += len(now)
            passed = self._passed([_without(kept, groups[i]) for i in now], budget)
            passed = [now[j] for j in passed]
            taken = self._together(kept, [groups[i] for i in passed], budget)
            if taken:
                for i in passed[:taken]:
                    kept = _without(kept, groups[i])
                waiting = passed[taken:] + waiting  # what could go alone may still
        self.tests.tested += used
        self.tests.complete &= not waiting
        return kept, used

    def _passed(self, circuits: list[Tensor], budget: Budget) -> list[int]:
        """Which circuits are within the budget, the lowest loss first. By KL a few prompts are run first: others can only add to it."""
        some = list(range(len(circuits)))
        if self.by_kl and len(self.rows) >= 2 * GLANCE:
            few = self.rows[:: len(self.rows) // GLANCE]
            least = self.landscape.losses(circuits_of(circuits), few).loss.sum(-1) / len(self.rows)
            some = (least <= budget.max_loss).nonzero()[:, 0].tolist()
        if not some:
            return []
        losses = self.measure([circuits[i] for i in some])
        fine = self._within_limits(losses, budget)
        return [some[j] for j in losses.loss.mean(-1).argsort().tolist() if bool(fine[j])]

    def _together(self, kept: Tensor, groups: list[Tensor], budget: Budget) -> int:
        """How many of groups that can go one by one can go together, in order."""
        counts = sorted({1, *(round(len(groups) * share) for share in TAKEN)} - {0}) if groups else []
        circuits = []
        for count in counts:
            without = kept
            for group in groups[:count]:
                without = _without(without, group)
            circuits.append(without)
        fine = self._within_limits(self.measure(circuits), budget).tolist() if circuits else []
        return max((count for count, fits in zip(counts, fine, strict=True) if fits), default=0)

    def _prices(self, kept: Tensor, groups: list[Tensor]) -> Tensor:
        """What each group's removal would cost by the quadratic, or by the scores for a loss that has none."""
        if not groups:
            return torch.zeros(0)
        if not self.by_kl:
            return torch.stack([self.scores[group][kept[group]].sum() for group in groups]).cpu()
        if self._priced is None or not torch.equal(self._priced[0], kept):
            self._priced = (kept, self._model(kept, kept.nonzero()[:, 0]))
        model = self._priced[1]
        place = torch.full((self.landscape.n,), -1, device=kept.device)
        place[model.nodes] = torch.arange(len(model.nodes), device=kept.device)
        if all(len(group) == 1 for group in groups):
            return model.costs()[place[torch.cat(groups)]].cpu()
        return torch.stack([model.cost_of_closing(place[group[kept[group]]]) for group in groups]).cpu()

    def _model(self, kept: Tensor, nodes: Tensor) -> Quadratic:
        some = min(MODELLED, len(self.rows), max(MODEL_SIZE // (DIRECTIONS * max(len(nodes), 1)), 1))
        rows = self.rows[torch.randperm(len(self.rows), generator=self.generator)[:some]]
        return quadratic(self.landscape, kept, rows, nodes, self.generator)

    def _candidates(self, kept: Tensor) -> Tensor:
        size = int(kept.sum())
        ranked = torch.where(kept, torch.inf, self.scores)
        return ranked.topk(min(len(kept), 2 * size + CANDIDATES)).indices

    def _within(self, model: Quadratic, most: int) -> list[Tensor]:
        """Openings and exchanges within the limits, one by one: each changes what the next may be."""
        assert self.budget.limits is not None
        limits, moves = self.budget.limits.among(model.nodes.cpu()), list[Tensor]()
        while len(moves) < most and (move := _move_within(model, limits)) is not None:
            moves.append(model.nodes[move])
        return moves

    def _best_of(self, kept: Tensor, moves: list[Tensor]) -> tuple[Tensor, float] | None:
        """The share of a plan that measures best, with its merit; None where none is as sure of its choices."""
        circuits = [_flipped(kept, moves[:count]) for count in _counts(len(moves))]
        if self.budget.limits is not None:
            circuits = [circuit for circuit in circuits if self.budget.limits.hold(circuit.cpu())]
        if not circuits:
            return None
        losses = self.measure(circuits)
        merits = torch.where(losses.hinge.mean(-1) <= self.hinge_limit + 1e-6, self._merit(losses), torch.inf)
        best = int(merits.argmin())
        return (circuits[best], float(merits[best])) if torch.isfinite(merits[best]) else None

    def _most_of(self, kept: Tensor, moves: list[Tensor], budget: Budget) -> Tensor | None:
        """The largest share of a plan that is within the budget."""
        circuits = [_flipped(kept, moves[:count]) for count in _counts(len(moves))]
        fine = self._within_limits(self.measure(circuits), budget) if circuits else torch.zeros(0)
        return circuits[int(fine.nonzero()[0])] if fine.any() else None

    def _within_limits(self, losses: Losses, budget: Budget) -> Tensor:
        return (budget.violation(losses) <= 1) & (losses.hinge.mean(-1) <= self.hinge_limit + 1e-6)

    def _merit(self, losses: Losses) -> Tensor:
        return losses.loss.mean(-1)


def _counts(n: int) -> list[int]:
    """How many moves of a plan are tried, the most first."""
    return sorted({max(round(share * n), 1) for share in TAKEN}, reverse=True) if n else []


def _flipped(kept: Tensor, moves: list[Tensor]) -> Tensor:
    changed = kept.clone()
    for move in moves:
        changed[move] = ~changed[move]
    return changed


def _without(kept: Tensor, group: Tensor) -> Tensor:
    changed = kept.clone()
    changed[group] = False
    return changed


def _move_within(model: Quadratic, limits: Limits) -> Tensor | None:
    """Open the closed node, and where a limit is full close the kept one that makes room for it, that lower the loss most; None, and
    nothing changed, where none does. Nothing is closed for its own sake: that would fit the search's prompts only."""
    needs, frees = (mask.to(model.kept.device) for mask in limits.full(model.kept.cpu()))
    best, lowest = None, -1e-4 * abs(model.loss)
    for need in needs[~model.kept].unique(dim=0):
        opened = model.costs().masked_fill(model.kept | (needs != need).any(1), torch.inf).argmin().view(1)
        move, gained = [opened], model.flip(opened)
        if need.any():
            costs = model.costs().masked_fill(~model.kept | (need & ~frees).any(1), torch.inf)
            move.append(costs.argmin().view(1))
            gained += float(costs[move[1]])
        model.flip(opened)
        if gained < lowest:
            best, lowest = torch.cat(move), gained
    if best is not None:
        model.flip(best)
    return best
