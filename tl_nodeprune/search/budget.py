"""What a circuit must keep: a bound on the loss, on the number of nodes, or on those of single granularities."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from tl_nodeprune.masks import Losses, LossFn, kl_divergence
from tl_nodeprune.nodes import GRANULARITIES, GateKey, NodeSpace, check_agreement, check_number

DISAGREEMENT, PER_NAT = 0.02, 0.4  # share of prompts on which the choice may differ: at any budget, for each of its nats
PASSES = 4  # rounds of prices; in random trees of up to seven limits more added less than .2 % to the sum
OPEN_ABOVE = -1.0  # score, in root mean squares of a gradient: what is not limited is closed only where that clearly helps


@dataclass(frozen=True)
class Budget:
    """What a circuit must keep: the loss, and for KL also the choice between answer and wrong answer.

    loss: what `max_loss` bounds (mean over prompts). agreement: share of the prompts with the full model's choice, at least. max_size: leaf
    nodes at most. limits: nodes of single granularities at most. With neither, as few nodes as the loss allows.
    """

    loss: LossFn = kl_divergence
    max_loss: float = 0.05
    agreement: float = 1 - DISAGREEMENT
    max_size: int | None = None
    limits: Limits | None = None

    @property
    def smallest(self) -> bool:
        """Whether the smallest circuit within the loss is sought, not the most faithful of a size."""
        return self.max_size is None and self.limits is None

    def violation(self, losses: Losses) -> Tensor:
        """Of one or more circuits [*circuit]: at most 1 where within the budget; for a size or limits the loss."""
        loss = losses.loss.mean(-1)
        if not self.smallest:
            return loss
        if self.loss is not kl_divergence:
            return loss / self.max_loss
        return torch.maximum(loss / self.max_loss, losses.wrong.mean(-1) / (1 - self.agreement + 1e-9))


def budget_of(space: NodeSpace, *, max_kl: float | None = None, agreement: float | None = None,
              max_nodes: float | int | Mapping[str, float | int] | None = None, loss: LossFn | None = None, max_loss: float | None = None,
              objective: object = None) -> Budget:
    """The budget that `prune`'s arguments ask for; an objective has none, and gets the default. Raises what `prune` says of them."""
    given: dict[str, Any] = {"max_kl": max_kl, "max_nodes": max_nodes, "max_loss": max_loss, "objective": objective}
    chosen = [name for name, value in given.items() if value is not None]
    if len(chosen) != 1:
        raise ValueError(f"give exactly one of max_kl, max_nodes, loss with max_loss, or objective; got {' and '.join(chosen) or 'none'}.")
    if (loss is None) != (max_loss is None):
        raise ValueError("loss and max_loss go together: a loss of your own and what its mean may be at most.")
    if agreement is not None and max_kl is None:
        raise ValueError(f"agreement={agreement} goes with max_kl; give that too.")
    if isinstance(max_nodes, Mapping):
        return Budget(limits=Limits.of(space, max_nodes))
    check_agreement(agreement)
    for name, value in given.items():
        if name != "objective" and value is not None:
            check_number(name, value)
    limit = max_kl if max_kl is not None else max_loss
    if limit is not None and not 0 < limit < float("inf"):
        raise ValueError(f"{chosen[0]}={limit}; it must be a finite number above 0 (nats for max_kl; 0.05 is a good start).")
    if limit is not None:
        usual = 1 - max(DISAGREEMENT, PER_NAT * limit)  # by what was asked for, also where the search takes less of it
        return Budget(loss or kl_divergence, limit, usual if agreement is None else agreement)
    return Budget(max_size=None if max_nodes is None else count_of("max_nodes", max_nodes, space.free_total()))


@dataclass(frozen=True, eq=False)
class Limits:
    """At most `most[name]` live nodes of each granularity named, all others as many as there are.

    units: by granularity, coarse first: which node of it each gate [node] is or lies in (see `Landscape` for the order), -1 for none. A
    node counts as live where any gate of it is kept. floor: [node], the score above which a gate may be kept.
    """

    most: Mapping[str, int]
    units: Mapping[str, Tensor]
    floor: Tensor

    @classmethod
    def of(cls, space: NodeSpace, given: Mapping[str, float | int]) -> Limits:
        """From counts (int) or shares (float) by granularity.

        Raises: ValueError where none is given, for a granularity that is unknown or not gated here and a number out of range; TypeError for
        what is not a number.
        """
        totals = space.totals()
        gated = f"these masks gate {', '.join(totals)}"
        if not given:
            raise ValueError(f"max_nodes is empty; give a share or count for one granularity or more: {gated}.")
        for name in given:
            if name not in totals:
                known = "are not gated" if name in GRANULARITIES else "do not exist"
                raise ValueError(f"max_nodes limits {name!r} nodes, which {known}; {gated}.")
        most = {name: count_of(f"max_nodes[{name!r}]", given[name], total) for name, total in totals.items() if name in given}
        floor = [torch.full(space.shapes[key], 0.0 if key.granularity in most else OPEN_ABOVE, dtype=torch.float32).flatten()
                 for key in space.free()]
        return cls(most, {name: _units(space, name) for name in most}, torch.cat(floor))

    def hold(self, kept: Tensor) -> bool:
        """Whether kept gates [node] are within all limits."""
        return all(int((_sums(unit, kept.float()) > 0).sum()) <= self.most[name] for name, unit in self.units.items())

    def best(self, scores: Tensor) -> Tensor:
        """The gates [node] within the limits whose positive scores sum highest. Exact where no limit lies within another; else each limit
        gets a price, and of a few rounds of prices the best is taken (Lagrangian relaxation).
        """
        prices, worth, highest = dict.fromkeys(self.most, 0.0), scores.clamp(min=0), -1.0
        for _ in range(PASSES if len(self.most) > 1 else 1):
            kept = self._cut(scores > self.floor, self._values(worth, prices), prices)
            if (total := float(worth[kept].sum())) > highest:
                found, highest = kept, total
        return found

    def _values(self, worth: Tensor, prices: Mapping[str, float]) -> dict[str, Tensor]:
        """What the nodes of each limited granularity are worth: all in them, less the price of each limited node in them, where above 0."""
        values = {}
        for name in reversed(tuple(self.units)):
            unit = self.units[name]
            values[name] = _sums(unit, worth)
            net = (values[name] - prices[name]).clamp(min=0) / values[name].clamp(min=1e-30)
            worth = torch.where(unit < 0, worth, worth * net[unit])
        return values

    def _cut(self, kept: Tensor, values: Mapping[str, Tensor], prices: dict[str, float]) -> Tensor:
        """From coarse to fine, keep the nodes worth most. Sets each price to what the best of those cut is worth."""
        for name, unit in self.units.items():
            value = values[name].masked_fill(_sums(unit, kept.float()) == 0, -1)
            ranked = value.topk(min(self.most[name] + 1, len(value)))
            chosen = torch.zeros(len(value), dtype=torch.bool)
            chosen[ranked.indices[: self.most[name]]] = True
            prices[name] = max(float(ranked.values[-1]), 0.0) if len(value) > self.most[name] else 0.0
            kept = kept & ((unit < 0) | chosen[unit])
        return kept


def _units(space: NodeSpace, name: str) -> Tensor:
    """Which node of a granularity each gate [node] of the free gate tensors is or lies in, counted over layers; -1 for none."""
    shapes = {key: shape for key, shape in space.shapes.items() if key.granularity == name}
    sizes = [math.prod(shape) for shape in shapes.values()]
    ids = dict(zip(shapes, torch.arange(sum(sizes)).split(sizes), strict=True))
    parts = []
    for key in space.free():
        unit, shape = GateKey(name, key.layer), space.shapes[key]
        within = key == unit or unit in space.ancestors(key)
        of = ids[unit].view(shapes[unit] + (1,) * (len(shape) - len(shapes[unit]))) if within else torch.tensor(-1)
        parts.append(of.expand(shape).flatten())
    return torch.cat(parts)


def _sums(unit: Tensor, values: Tensor) -> Tensor:
    """Sums of values [node] by unit; the last, for what is in none, is 0."""
    sums = torch.zeros(int(unit.max()) + 2, dtype=torch.float32).index_add_(0, unit.where(unit >= 0, unit.max() + 1), values)
    sums[-1] = 0
    return sums


def count_of(name: str, given: float | int, total: int) -> int:
    """A share (float) or count (int) of so many nodes as a count. Raises ValueError where it is out of range, TypeError for no number."""
    check_number(name, given)
    is_share = not isinstance(given, Integral)
    count = round(given * total) if is_share and 0 < given <= 1 else 0 if is_share else given
    if not 1 <= count <= total:
        raise ValueError(f"{name}={given}; give a share above 0 and up to 1.0 as a float, or a count of 1 to {total} as an int.")
    return int(count)
