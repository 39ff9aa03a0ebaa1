"""What a circuit must keep, and what was measured on one: the budget of a search."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple

from torch import Tensor

from tl_nodeprune.ablation import Ablation
from tl_nodeprune.checks import check_agreement
from tl_nodeprune.limits import Limits, count_of
from tl_nodeprune.nodes import NodeSpace
from tl_nodeprune.objective import LossFn, PaperObjective, kl_divergence

DISAGREEMENT, PER_NAT = 0.02, 0.4  # share of prompts on which the choice may differ: at any budget, for each of its nats


class Measured(NamedTuple):
    """loss: the highest of the groups' means over their prompts. disagreement: share of prompts on which the circuit chooses unlike the
    full model. hinge: mean of `choice_hinge`, logits. The last two are 0 for a loss of one's own."""

    loss: float
    disagreement: float
    hinge: float


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

    def allows(self, kept: Tensor) -> bool:
        """Whether a circuit, as kept nodes [node], is within the size or the limits asked for."""
        return (self.max_size is None or int(kept.sum()) <= self.max_size) and (self.limits is None or self.limits.hold(kept))

    def violation(self, measured: Measured) -> float:
        """At most 1 when within the budget."""
        return max(measured.loss / self.max_loss, measured.disagreement / (1 - self.agreement + 1e-9))

    def better(self, new: Snapshot, old: Snapshot | None) -> bool:
        """Smaller within the budget, or of one size and further within it; for a fixed size or within limits, further within it."""
        if old is None:
            return not self.smallest or new.violation <= 1
        if not self.smallest:
            return new.violation < old.violation
        if max(new.violation, old.violation) > 1:
            return new.violation < old.violation
        return (new.size, new.violation) < (old.size, old.violation)


@dataclass(frozen=True)
class Snapshot:
    """A binary circuit met on the way: kept nodes [node] bool, how far it is within the budget, what was measured, its constants, and
    the scores [node] that it was cut from."""

    kept: Tensor
    violation: float
    measured: Measured
    ablation: Ablation
    scores: Tensor | None = None

    @property
    def size(self) -> int:
        return int(self.kept.sum())

    @property
    def loss(self) -> float:
        return self.measured.loss


def budget_of(space: NodeSpace, max_kl: float | None, agreement: float | None, max_nodes: float | int | Mapping[str, float | int] | None,
              loss: LossFn | None, max_loss: float | None, objective: PaperObjective | None) -> Budget:
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
        if name != "objective" and value is not None and (isinstance(value, bool) or not isinstance(value, Real)):
            raise TypeError(f"{name}={value!r}; it must be a number.")
    limit = max_kl if max_kl is not None else max_loss
    if limit is not None and not 0 < limit < float("inf"):
        raise ValueError(f"{chosen[0]}={limit}; it must be a finite number above 0 (nats for max_kl; 0.05 is a good start).")
    if limit is not None:
        usual = 1 - max(DISAGREEMENT, PER_NAT * limit)  # by what was asked for, also where the search takes less of it
        return Budget(loss or kl_divergence, limit, usual if agreement is None else agreement)
    return Budget(max_size=None if max_nodes is None else count_of("max_nodes", max_nodes, space.free_total()))
