"""Soft gates trained under the price of their expected live size, in designs that differ in which gates are trained when.

The gradients of loss and penalty are brought to one scale, and the first is weighed by `price * KL / budget`; the price rises while the KL
of the draws is above the budget, and falls below it.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tl_nodeprune.budget import Snapshot
from tl_nodeprune.gates import Gate, HardConcrete, Step
from tl_nodeprune.landscape import HINGE_WEIGHT, Landscape
from tl_nodeprune.masks import NodeMasks
from tl_nodeprune.nodes import GRANULARITIES, LEAVES, GateKey, spread
from tl_nodeprune.objective import choice_hinge, kl_divergence
from tl_nodeprune.search import PATH

COARSE = tuple(name for name in GRANULARITIES if name not in LEAVES)
FIXED = 30.0  # a score whose gate is open, or closed, in every draw
LOOK = 10  # steps from one look at the thresholded circuit to the next
GATES: dict[str, Gate] = {"hard concrete": HardConcrete(), "straight-through": HardConcrete(straight_through=True), "step": Step()}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"adam": partial(torch.optim.Adam, betas=(0.9, 0.95)), "sgd": torch.optim.SGD}
MOST = 100.0  # price


@dataclass(frozen=True)
class Phase:
    """share: of the steps. trained: granularities. budget: share of the budget. cut: whether what was trained is then fixed."""

    share: float
    trained: tuple[str, ...]
    budget: float = 1.0
    cut: bool = False


@dataclass(frozen=True)
class Settings:
    """gate: of GATES. lr: Adam's. open: share of the leaf gates with a score above 0 at the start, best attribution first; width: of the
    scores from the best to the worst. coarse: mean score of the coarse gates at the start. rate: of the price, per step. limit: of scores.
    optimizer: "adam" or "sgd"."""

    gate: str = "step"
    lr: float = 0.05
    open: float = 0.5
    width: float = 4.0
    coarse: float = 2.0
    rate: float = 0.05
    limit: float = 3.0
    optimizer: str = "adam"


SETTINGS = {"step": Settings(), "straight-through": Settings("straight-through", lr=0.1, coarse=3.0, limit=8.0)}
"""The best of those tried on toy/ioi."""

DESIGNS: dict[str, tuple[Phase, ...]] = {
    "joint": (Phase(1.0, GRANULARITIES),),
    "fine only": (Phase(1.0, LEAVES),),
    "group": (Phase(1.0, LEAVES),),
    "fine then coarse": (Phase(0.5, LEAVES), Phase(0.5, GRANULARITIES)),
    "coarse first": (Phase(1 / 3, COARSE, budget=0.5, cut=True), Phase(2 / 3, LEAVES)),
}


class SoftGates:
    """One training of a design's gates on attached masks; `run` leaves the thresholded circuit, `smallest` cuts it to the budget."""

    def __init__(self, masks: NodeMasks, land: Landscape, settings: Settings, *, grouped: bool, generator: torch.Generator) -> None:
        self.masks, self.land, self.settings, self.grouped, self.generator = masks, land, settings, grouped, generator
        masks.gate = GATES[settings.gate]
        self.rows, self.price = torch.arange(len(land.groups)), 1.0
        with masks.inactive():
            slopes = [land.gradient(torch.full((land.n,), point), self.rows, step=0)[1] for point in PATH]
        self.attribution = -torch.stack(slopes).mean(0)
        self.met: tuple[Snapshot, Tensor] | None = None
        self.set({key: torch.full(shape, FIXED) for key, shape in masks.space.shapes.items()})

    def run(self, phases: tuple[Phase, ...], steps: int) -> Snapshot:
        ready: set[str] = set()
        for phase in phases:
            self.start([name for name in phase.trained if name not in ready])
            ready |= set(phase.trained)
            self.train(phase, max(round(phase.share * steps), 1))
            if phase.cut:
                self.fix(phase)
        return self.thresholded()

    def set(self, scores: dict[GateKey, Tensor]) -> None:
        with torch.no_grad():
            for key, score in scores.items():
                self.masks.score(key).copy_(score)

    def start(self, granularities: list[str]) -> None:
        """First scores by rank of attribution: leaves among all that are not cut off, coarse gates within their granularity."""
        values, alive = self.land.gates(self.attribution), self.order() > math.log(1e-6)
        ranks = (torch.where(alive, self.attribution, -torch.inf).argsort().argsort() - (~alive).sum()) / alive.sum()
        leaves = self.land.gates((ranks - (1 - self.settings.open)) * self.settings.width)
        below = {key: self._sums(key, values) for key in self.masks.space.shapes}
        for name in granularities:
            keys = [key for key in self.masks.space.shapes if key.granularity == name]
            every = torch.cat([below[key].flatten() for key in keys])
            for key in keys:
                rank = (below[key].unsqueeze(-1) > every).float().mean(-1) - 0.5
                self.set({key: leaves[key] if name in LEAVES else self.settings.coarse + rank})

    def _sums(self, key: GateKey, values: dict[GateKey, Tensor]) -> Tensor:
        """Attribution of a gate: that of what is below it, summed."""
        if key in self.land.keys:
            return values[key]
        parts = [self._sums(child, values) for child in self.masks.space.children(key)]
        return sum(part.flatten(len(self.masks.space.shapes[key])).sum(-1) for part in parts)  # type: ignore[return-value]

    def train(self, phase: Phase, steps: int) -> None:
        scores = [self.masks.score(key) for key in self.masks.space.shapes if key.granularity in phase.trained]
        optimizer, budget = OPTIMIZERS[self.settings.optimizer](scores, lr=self.settings.lr), phase.budget * self.land.budget.max_loss
        for step in range(steps):
            kl, wanted = self.draw()
            over = min(max(kl / budget, 0.1), 10.0)
            parts = [torch.autograd.grad(part, scores) for part in (wanted, self.penalty())]
            weights = [weight / _rms(part) for weight, part in zip((self.price * over, 1.0), parts, strict=True)]
            for score, *grads in zip(scores, *parts, strict=True):
                score.grad = sum(w * g for w, g in zip(weights, grads, strict=True)) / (1 + self.price * over)  # type: ignore[assignment]
            optimizer.step()
            with torch.no_grad():
                for score in scores:
                    score.clamp_(-self.settings.limit, self.settings.limit)
            self.price = min(max(self.price * over**self.settings.rate, 1 / MOST), MOST)
            if step % LOOK == LOOK - 1:
                self.look()

    def draw(self) -> tuple[float, Tensor]:
        """KL of one draw of the gates, the worse direction's mean; and what is minimised, KL and hinge: differentiable."""
        reference = self.land.reference
        with self.masks.sampling(self.generator), self.masks.standing_in(reference.stand_ins(self.rows)):
            logits = reference.logits(reference.prompts)
        kl = kl_divergence(logits, reference.full)
        worst = max(float(kl.detach()[self.land.groups == group].mean()) for group in self.land.groups.unique())
        return worst, (kl + HINGE_WEIGHT * choice_hinge(logits, reference.full, reference.prompts)).mean()

    def penalty(self) -> Tensor:
        """The log of the expected live size; grouped: half of it and half the log of the sum over heads and MLPs of its root."""
        size = self.masks.expected_size().clamp(min=1).log()
        if not self.grouped:
            return size
        probability = {key: self.masks.gate.probability(self.masks.score(key)) for key in self.land.keys}
        mlps = [sum(p.sum() for key, p in probability.items() if key.layer == layer and key.granularity in ("mlp_neuron", "mlp_out"))
                for layer in self.masks.space.layers]
        heads = [p.sum(-1) for key, p in probability.items() if key.granularity == "attn_neuron"]
        roots = torch.cat([*heads, torch.stack(mlps)]).clamp(min=1e-3).sqrt()  # type: ignore[arg-type]
        return (size + roots.sum().clamp(min=1).log()) / 2

    def order(self) -> Tensor:
        """The logistic of the scores, multiplied along the path of each leaf, as a logarithm: [node]."""
        logs = {key: logsigmoid(self.masks.score(key).detach().double()) for key in self.masks.space.shapes}
        paths = [sum((spread(logs[parent], logs[key].ndim) for parent in self.masks.space.ancestors(key)), logs[key])
                 for key in self.land.keys]
        return torch.cat([path.flatten() for path in paths])

    def thresholded(self) -> Snapshot:
        with self.masks.inactive():
            return self.land.snapshot(self.land.flat(self.masks.to_circuit()), self.rows)

    def look(self) -> Snapshot:
        found = self.thresholded()
        if self.land.budget.better(found, self.met[0] if self.met else None):
            self.met = found, self.order()
        return found

    def cut(self, order: Tensor) -> Snapshot:
        """The smallest circuit within the budget that keeps the top of an order; the full model at worst. By bisection between the first
        two sizes, up from half of the thresholded one in steps of 10 %, the larger of which is within: further up the KL may rise again."""
        levels, sizes = order.unique(return_counts=True)
        counts = sizes.flip(0).cumsum(0).tolist()

        def keep(i: int) -> Snapshot:
            return self.land.snapshot(order >= levels[len(levels) - 1 - i], self.rows)

        size, low, high = int(self.land.flat(self.masks.to_circuit()).sum()) / 2, 0, len(counts) - 1
        while (high := min(bisect_left(counts, size), len(counts) - 1)) < len(counts) - 1 and keep(high).violation > 1:
            low, size = high + 1, size * 1.1 + 1
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if keep(middle).violation <= 1 else (middle + 1, high)
        return keep(high)

    def smallest(self) -> Snapshot:
        """Within the budget, of the orders at the end and at the smallest circuit met; attribution decides between equals."""
        ties = 1e-9 * self.attribution.argsort().argsort()
        with self.masks.inactive():
            found = [self.cut(order + ties) for order in (self.order(), *([self.met[1]] if self.met else []))]
        return min([*found, *([self.met[0]] if self.met else [])], key=lambda one: (one.violation > 1, one.size))

    def fix(self, phase: Phase) -> None:
        """Cut the gates trained so far within the phase's share of the budget; they are trained no more."""
        whole, self.met = self.land.budget, None
        self.land.budget = replace(whole, max_loss=phase.budget * whole.max_loss)
        with self.masks.inactive():
            circuit = self.land.circuit(self.cut(self.order()).kept, self.masks.ablation)
        self.land.budget = whole
        trained = [key for key in self.masks.space.shapes if key.granularity in phase.trained]
        self.set({key: torch.where(circuit.live(*key), FIXED, -FIXED) for key in trained})


def _rms(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.flatten() for part in parts]).pow(2).mean().sqrt().clamp(min=1e-12)
