"""The search: iterative hard thresholding of node scores, with the size led by the faithfulness budget.

Every node has a score. A step keeps the k best as a binary circuit, runs it once forward and backward, and moves the scores
of ALL nodes against the loss gradient at that circuit, so closed nodes rise as soon as opening them would help. k follows the
budget: it shrinks while the circuit is within it, and grows only when the loss has stopped falling at this k.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tl_nodeprune.ablation import Ablation
from tl_nodeprune.circuit import Circuit
from tl_nodeprune.hooks import mask_hooks, temporary_hooks
from tl_nodeprune.nodes import GateKey, Gates, NodeSpace, combine
from tl_nodeprune.objective import LossFn, Reference, check_finite, choice_hinge, kl_divergence

START_SHARES = (0.5, 0.25, 0.12, 0.06, 0.03)
PATH = (0.05, 0.15, 0.3, 0.5, 0.7, 0.85)
RATE, RATE_DECAY = 0.3, 60
WINDOW, SHRINK, GROW, STALLED = 10, 0.85, 1.12, 0.97
HINGE_WEIGHT, DISAGREEMENT = 0.2, 0.02
GIVEN, TURNED = 0, 1  # groups of prompts
PATIENCE = 9  # windows without a smaller circuit

Record = Callable[[int, float, int, float], None]


@dataclass(frozen=True)
class Budget:
    """What a circuit must keep: the loss, and for KL also the choice between answer and wrong answer.

    loss: what `max_loss` bounds (mean over prompts). max_size: leaf nodes at most; None: as few as the loss allows.
    """

    loss: LossFn = kl_divergence
    max_loss: float = 0.05
    max_size: int | None = None

    def violation(self, loss: float, disagreement: float) -> float:
        """At most 1 when within the budget."""
        return max(loss / self.max_loss, disagreement / DISAGREEMENT)


@dataclass(frozen=True)
class Snapshot:
    """A binary circuit met on the way: kept nodes [node] bool, how far it is within the budget, its loss and constants."""

    kept: Tensor
    violation: float
    loss: float
    ablation: Ablation

    @property
    def size(self) -> int:
        return int(self.kept.sum())


class Landscape:
    """Losses and gradients of circuits, given as one flat vector of gates [node] over all free gate tensors.

    groups: of the reference's prompts, see `pruning.sample`; a circuit is judged by its worst group.
    Free are the leaves and the gates above something ungated; a coarse gate that is covered follows what is below it.
    """

    def __init__(self, space: NodeSpace, reference: Reference, budget: Budget, groups: Tensor) -> None:
        self.space, self.reference, self.budget, self.groups = space, reference, budget, groups
        self.keys: list[GateKey] = [key for key in space.shapes if not space.covered(key)]
        self.sizes = [int(torch.Size(space.shapes[key]).numel()) for key in self.keys]
        self.n = sum(self.sizes)
        self.constants = _learned(reference)
        self._optimizer = torch.optim.Adam(list(self.constants.values()), lr=0.02) if self.constants else None

    def gates(self, flat: Tensor) -> Gates:
        """A flat vector as gate tensors; covered coarse gates open."""
        pieces = {key: piece.view(self.space.shapes[key]) for key, piece in zip(self.keys, flat.split(self.sizes), strict=True)}
        return {key: pieces.get(key, torch.ones(shape, device=flat.device)) for key, shape in self.space.shapes.items()}

    def circuit(self, kept: Tensor, ablation: Ablation) -> Circuit:
        return Circuit(self.space, self.gates(kept.float()), ablation)

    def measure(self, flat: Tensor, rows: Tensor) -> tuple[float, float]:
        """The loss, and the share of prompts on which the circuit chooses unlike the full model.

        The loss is the highest of the groups' means over their prompts among `rows`.
        """
        with torch.no_grad():
            return self._accumulate(flat, rows, step=None)

    def gradient(self, flat: Tensor, rows: Tensor, step: int) -> tuple[float, float, Tensor]:
        """`measure`, and the gradient of loss + hinge to the gates [node]. Raises FloatingPointError for NaN or inf logits."""
        leaf = flat.detach().clone().requires_grad_(True)
        if self._optimizer:
            self._optimizer.zero_grad()
        with torch.enable_grad():
            loss, disagreement = self._accumulate(leaf, rows, step)
        if self._optimizer:
            self._optimizer.step()
        assert leaf.grad is not None
        return loss, disagreement, leaf.grad

    def _accumulate(self, flat: Tensor, rows: Tensor, step: int | None) -> tuple[float, float]:
        losses, wrong = [], 0.0
        for chunk in self.reference.chunks(rows):
            prompts, full = self.reference.prompts[chunk], self.reference.full[chunk.to(self.reference.full.device)]
            logits = self._run(flat, chunk)
            check_finite(logits, "the circuit" if step is None else f"the circuit at step {step}")
            wanted = loss = self.budget.loss(logits, full, prompts)
            if self.budget.loss is kl_divergence:
                hinge = choice_hinge(logits, full, prompts)
                wanted = loss + HINGE_WEIGHT * hinge
                wrong += float((prompts.logit_diff(logits) * prompts.logit_diff(full) < 0).sum())
            if flat.requires_grad:
                (wanted.sum() / len(rows)).backward()
            losses.append(loss.detach().cpu())
        per_prompt, group = torch.cat(losses), self.groups[rows]
        return max(float(per_prompt[group == g].mean()) for g in group.unique()), wrong / len(rows)

    def _run(self, flat: Tensor, rows: Tensor) -> Tensor:
        gates, stand_ins = self.gates(flat), self.constants or self.reference.stand_ins(rows)
        hooks = dict.fromkeys(key.hook for key in self.keys)
        masks = {hook: combine(self.space, hook, gates) for hook in hooks}
        with temporary_hooks(self.reference.model, mask_hooks(hooks, masks.__getitem__, stand_ins.__getitem__)):
            return self.reference.logits(self.reference.prompts[rows])

    def ablation_now(self) -> Ablation:
        """The ablation with its constants as they are learned so far."""
        kept = self.reference.ablation
        if not self.constants:
            return kept
        return Ablation(kept.name, {**kept.constants, **{hook: value.detach().clone() for hook, value in self.constants.items()}})


def _learned(reference: Reference) -> dict[str, Tensor]:
    """The constants of "optimal" ablation as tensors to learn; none for the others."""
    if reference.ablation.name != "optimal":
        return {}
    return {hook: value.detach().clone().requires_grad_(True) for hook, value in reference.ablation.constants.items()}


class Search:
    """One run of the search over a landscape; `run` gives the best snapshot."""

    def __init__(self, landscape: Landscape, *, steps: int, step_prompts: int, generator: torch.Generator, record: Record) -> None:
        self.landscape, self.budget, self.steps, self.record = landscape, landscape.budget, steps, record
        self.generator, self.step_prompts = generator, step_prompts
        self.everything = torch.arange(len(landscape.reference.prompts))
        self.best: Snapshot | None = None

    def run(self) -> Snapshot:
        """Start from integrated gradients, threshold and step until nothing improves, then trim."""
        self.path_gradient = self._path_gradient()
        self.scores = -self.path_gradient / _rms(self.path_gradient)
        k = self._start_size() if self.budget.max_size is None else min(self.budget.max_size, self.landscape.n)
        lowest, before, stale = float("inf"), float("inf"), 0
        for step in range(self.steps):
            improved, violation = self._step(step, k)
            lowest, stale = min(lowest, violation), 0 if improved else stale + 1
            if (step + 1) % WINDOW == 0:
                if self.budget.max_size is None:
                    k, before = self._next_size(k, lowest, before)
                lowest = float("inf")
            if stale >= PATIENCE * WINDOW and self.best:
                break
        return self._trim(self.best) if self.best and self.budget.max_size is None else self.best or self._grow(k)

    def _rows(self) -> Tensor:
        n = len(self.everything)
        return self.everything if n <= self.step_prompts else torch.randperm(n, generator=self.generator)[: self.step_prompts]

    def _path_gradient(self) -> Tensor:
        """Mean gradient along the straight path from the ablated run to the full model: integrated gradients on the gates."""
        flats = [torch.full((self.landscape.n,), share) for share in PATH]
        return torch.stack([self.landscape.gradient(self._placed(flat), self._rows(), step=0)[2] for flat in flats]).mean(0).cpu()

    def _placed(self, flat: Tensor) -> Tensor:
        return flat.to(self.landscape.reference.full.device)

    def _top(self, k: int, scores: Tensor) -> Tensor:
        kept = torch.zeros(self.landscape.n, dtype=torch.bool)
        kept[scores.topk(k).indices] = True
        return kept

    def _violation(self, kept: Tensor, rows: Tensor) -> tuple[float, float]:
        loss, disagreement = self.landscape.measure(self._placed(kept.float()), rows)
        return self.budget.violation(loss, disagreement), loss

    def _start_size(self) -> int:
        sizes = [max(round(share * self.landscape.n), 1) for share in START_SHARES]
        rows = self._rows()
        return min(sizes, key=lambda k: self._violation(self._top(k, self.scores), rows)[1])

    def _step(self, step: int, k: int) -> tuple[bool, float]:
        kept, rows = self._top(k, self.scores), self._rows()
        loss, disagreement, gradient = self.landscape.gradient(self._placed(kept.float()), rows, step)
        violation = self.budget.violation(loss, disagreement)
        if violation <= 1 and self.budget.max_size is None and len(rows) < len(self.everything):
            violation, loss = self._violation(kept, self.everything)
        improved = self._better(kept, violation) and self._keep(kept, violation, loss)
        gradient = gradient.cpu()
        self.scores = self.scores - RATE / (1 + step / RATE_DECAY) * gradient / _rms(gradient)
        self.record(step, loss, k, float(self.scores.topk(k).values[-1]))
        return improved, violation

    def _better(self, kept: Tensor, violation: float) -> bool:
        if self.budget.max_size is not None:
            return self.best is None or violation < self.best.violation
        return violation <= 1 and (self.best is None or int(kept.sum()) < self.best.size)

    def _keep(self, kept: Tensor, violation: float, loss: float) -> bool:
        """Remember a circuit; measured again where its constants have just moved on."""
        if self.landscape.constants:
            violation, loss = self._violation(kept, self.everything)
            if not self._better(kept, violation):
                return False
        self.best = Snapshot(kept, violation, loss, self.landscape.ablation_now())
        return True

    def _next_size(self, k: int, lowest: float, before: float) -> tuple[int, float]:
        """Smaller while within the budget; larger once the loss no longer falls at this size; else as it is."""
        if lowest <= 1:
            return max(int(k * (SHRINK if lowest > 0.5 else SHRINK**2)), 1), float("inf")
        if lowest > STALLED * before:
            return min(int(k * GROW) + 1, self.landscape.n), float("inf")
        return k, lowest

    def _grow(self, k: int) -> Snapshot:
        """The smallest circuit within the budget that adds nodes by attribution to the last one; the full model at worst."""
        order = self._top(k, self.scores) * self.path_gradient.abs().max() * 2 + self.path_gradient.abs()
        return self._bisect(order, k, self.landscape.n)

    def _trim(self, best: Snapshot) -> Snapshot:
        """Drop the lowest scores of a circuit that is within the budget, as many as it allows."""
        if self.landscape.constants:
            return best
        order = torch.where(best.kept, self.scores, -torch.inf)
        trimmed = self._bisect(order, 1, best.size)
        return trimmed if trimmed.violation <= 1 and trimmed.size < best.size else best

    def _bisect(self, order: Tensor, low: int, high: int) -> Snapshot:
        """Between two sizes, a small one within the budget when nodes are kept in `order`; the larger end if none is."""
        found = high
        while low < high:
            middle = (low + high) // 2
            if self._violation(self._top(middle, order), self.everything)[0] <= 1:
                found = high = middle
            else:
                low = middle + 1
        kept = self._top(found, order)
        return Snapshot(kept, *self._violation(kept, self.everything), self.landscape.ablation_now())


def _rms(gradient: Tensor) -> Tensor:
    return gradient.pow(2).mean().sqrt().clamp(min=1e-12)
