"""The landscape of a search: losses, gradients and local quadratic models of circuits given as one flat vector of gates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from tl_nodeprune.ablation import Ablation
from tl_nodeprune.budget import Budget, Measured, Snapshot
from tl_nodeprune.circuit import Circuit
from tl_nodeprune.constants import RATE as CONSTANTS_RATE
from tl_nodeprune.hooks import HookFn, capture_nodes, mask_hooks, temporary_hooks
from tl_nodeprune.nodes import GateKey, Gates, NodeSpace
from tl_nodeprune.objective import Reference, check_finite, choice_hinge, fisher_probes, kl_divergence
from tl_nodeprune.prompts import PromptPairs

HINGE_WEIGHT = 0.2
FIRST_LOOK = 16  # prompts
CURVATURES = 9  # rows of a quadratic for each prompt

Record = Callable[[int, float, int, float], None]


class Quadratic:
    """`loss + slope . d + |rows d|^2 / 2` for changes d [c] of gates from where they are; flipping gates updates it in place.

    nodes: [c] indices into the flat gates. kept: [c] bool, now. rows: [curvature c].
    """

    def __init__(self, nodes: Tensor, kept: Tensor, slope: Tensor, rows: Tensor, loss: float) -> None:
        self.nodes, self.kept, self.rows, self.loss = nodes, kept.clone(), rows, loss
        self._slope, self._curvature = slope.clone(), rows.pow(2).sum(0)

    def costs(self) -> Tensor:
        """What flipping each gate, one alone, would add to the loss: [c]."""
        return torch.where(self.kept, -self._slope, self._slope) + self._curvature / 2

    def cost_of_closing(self, together: Tensor) -> Tensor:
        """What closing several kept gates at once would add to the loss."""
        return self.rows[:, together].sum(1).pow(2).sum() / 2 - self._slope[together].sum()

    def flip(self, i: int) -> float:
        """Flip one gate; what that adds to the loss."""
        cost, step = float(self.costs()[i]), -1.0 if self.kept[i] else 1.0
        self._slope += step * (self.rows.T @ self.rows[:, i])
        self.kept[i] = ~self.kept[i]
        self.loss += cost
        return cost


class Landscape:
    """Losses and gradients of circuits, given as one flat vector of gates [node] over all free gate tensors.

    groups: [prompt] int, of the reference's prompts, see `Preference.sample`; a circuit is judged by its worst group.
    A coarse gate that is covered follows what is below it.
    """

    def __init__(self, space: NodeSpace, reference: Reference, budget: Budget, groups: Tensor) -> None:
        self.space, self.reference, self.budget, self.groups = space, reference, budget, groups
        self.keys: list[GateKey] = space.free()
        self.sizes = [int(torch.Size(space.shapes[key]).numel()) for key in self.keys]
        self.n = sum(self.sizes)
        self.constants = _learned(reference)
        self._optimizer = torch.optim.Adam(list(self.constants.values()), lr=CONSTANTS_RATE) if self.constants else None

    def gates(self, flat: Tensor) -> Gates:
        """A flat vector as gate tensors; covered coarse gates open."""
        pieces = {key: piece.view(self.space.shapes[key]) for key, piece in zip(self.keys, flat.split(self.sizes), strict=True)}
        return {key: pieces.get(key, torch.ones(shape, device=flat.device)) for key, shape in self.space.shapes.items()}

    def circuit(self, kept: Tensor, ablation: Ablation) -> Circuit:
        return Circuit(self.space, self.gates(kept.float()), ablation)

    def measure(self, flat: Tensor, rows: Tensor, limit: float = math.inf) -> Measured:
        """Run gates [node] on some of the prompts, for KL only until the violation is above `limit`: what is left can only add to it."""
        with torch.no_grad():
            return self._accumulate(flat, rows, step=None, limit=limit if self.budget.loss is kl_divergence else math.inf)

    def gradient(self, flat: Tensor, rows: Tensor, step: int) -> tuple[Measured, Tensor]:
        """`measure`, and the gradient of loss + hinge to the gates [node]. Raises FloatingPointError for NaN or inf in either."""
        leaf = flat.detach().clone().requires_grad_(True)
        if self._optimizer:
            self._optimizer.zero_grad()
        with torch.enable_grad():
            measured = self._accumulate(leaf, rows, step)
        assert leaf.grad is not None
        if not torch.isfinite(leaf.grad).all():
            raise FloatingPointError(f"NaN or inf in the gradient of the loss at step {step}; nothing was changed. Is it smooth where the "
                                     "circuit is the full model (a square root of 0 is not)?")
        if self._optimizer:
            self._optimizer.step()
        return measured, leaf.grad

    def _accumulate(self, flat: Tensor, rows: Tensor, step: int | None, limit: float = math.inf) -> Measured:
        sums, sizes = torch.zeros(int(self.groups.max()) + 1), self.groups[rows].bincount()
        wrong = hinges = 0.0
        measured = Measured(0.0, 0.0, 0.0)
        for chunk in self._chunks(rows, look_first=limit < math.inf):
            prompts, full = self.reference.prompts[chunk], self.reference.full[chunk.to(self.reference.full.device)]
            logits = self._run(flat, chunk)
            check_finite(logits, "the circuit" if step is None else f"the circuit at step {step}")
            wanted = loss = self.budget.loss(logits, full, prompts)
            _check_loss(loss, len(chunk), step)
            if flat.requires_grad and not loss.requires_grad:
                raise ValueError("the loss has no gradient (a count or an argmax?); a search needs a differentiable one.")
            if self.budget.loss is kl_divergence:
                hinge = choice_hinge(logits, full, prompts)
                wanted = loss + HINGE_WEIGHT * hinge
                hinges += float(hinge.detach().sum())
                wrong += float((prompts.logit_diff(logits.detach()) * prompts.logit_diff(full) < 0).sum())
            if flat.requires_grad:
                (wanted.sum() / len(rows)).backward()
            sums.index_add_(0, self.groups[chunk], loss.detach().cpu().float())
            measured = Measured(_worst(sums, sizes), wrong / len(rows), hinges / len(rows))
            if self.budget.violation(measured) > limit:
                break
        return measured

    def _chunks(self, rows: Tensor, *, look_first: bool) -> Iterator[Tensor]:
        """Prompt indices in pieces of the batch size; with `look_first` a few from all over come first."""
        if look_first and len(rows) >= 2 * FIRST_LOOK:
            few = torch.arange(len(rows)) % (len(rows) // FIRST_LOOK) == 0
            yield from self.reference.chunks(rows[few])
            rows = rows[~few]
        yield from self.reference.chunks(rows)

    def quadratic(self, kept: Tensor, rows: Tensor, nodes: Tensor, generator: torch.Generator) -> Quadratic:
        """The loss + hinge near a binary circuit as a quadratic of the gates of `nodes` [c] (Gauss-Newton).

        Every prompt has gates of its own here, so one backward pass per curvature direction gives all prompts' rows at once.
        """
        slope, curves, losses = torch.zeros(len(nodes)), [], []
        for chunk in self.reference.chunks(rows):
            prompts, full = self.reference.prompts[chunk], self.reference.full[chunk.to(self.reference.full.device)]
            flat = kept.float().to(full.device).expand(len(chunk), -1).clone().requires_grad_(True)
            with torch.enable_grad():
                logits = self._run(flat, chunk)
            check_finite(logits, "the circuit")
            wanted, hinge_slope = _logit_gradients(logits.detach(), full, prompts)
            losses.append(kl_divergence(logits.detach(), full).cpu())
            directions = [wanted, *fisher_probes(logits.detach(), generator), HINGE_WEIGHT**0.5 * hinge_slope]
            rows_of = [torch.autograd.grad(logits, flat, v, retain_graph=True)[0].cpu()[:, nodes] for v in directions]
            slope += rows_of[0].sum(0) / len(rows)
            curves += [row / len(rows) ** 0.5 for row in rows_of[1:]]
        return Quadratic(nodes, kept[nodes], slope, torch.cat(curves), float(torch.cat(losses).mean()))

    def _run(self, flat: Tensor, rows: Tensor) -> Tensor:
        masks, stand_ins = self._masks(flat), self.constants or self.reference.stand_ins(rows)
        hooks = [*mask_hooks(masks, masks.__getitem__, stand_ins.__getitem__), *self._closed_blocks(flat, rows)]
        with temporary_hooks(self.reference.model, hooks):
            return self.reference.logits(self.reference.prompts[rows])

    def _closed_blocks(self, flat: Tensor, rows: Tensor) -> list[tuple[str, HookFn]]:
        """Under zero or mean ablation a block in which nothing is open writes its own stand-in, as it does in the circuit: 0, not its bias;
        its mean, not what a norm after it makes of the means in it. The gradient is as if it were open: what is in it can return."""
        ablation = self.reference.ablation
        if ablation.name not in ("zero", "mean"):
            return []
        closed = [key for key, below in self._blocks.items() if not bool((flat[..., below.to(flat.device)] > 0).any())]
        parts = [part for key in closed for part in ((GateKey("attn", key.layer), GateKey("mlp", key.layer))
                                                     if key.granularity == "layer" else (key,))]
        known = [part for part in parts if part in self.space.present and (ablation.name == "zero" or part.hook in ablation.constants)]
        hooks = list(dict.fromkeys(part.hook for part in known))
        stand_ins = ablation.values(self.reference.model, self.reference.prompts[rows], hooks) if hooks else {}
        return [(hook, partial(_written, value)) for hook, value in stand_ins.items()]

    @cached_property
    def _blocks(self) -> dict[GateKey, Tensor]:
        """The flat indices below each block and layer whose gate follows from them."""
        ids = self.gates(torch.arange(sum(self.sizes)))
        return {key: self._below(key, ids).flatten() for key in self.space.shapes
                if key.granularity in ("layer", "attn", "mlp") and self.space.covered(key)}

    def with_coarse(self, ablation: Ablation) -> Ablation:
        """Learned constants, and with them those of coarse nodes that follow from what is below: what they write where all of that is
        closed, so that closing them changes nothing."""
        if not self.constants:
            return ablation
        free = {key.hook for key in self.keys}
        hooks, model = [hook for hook in self.space.hooks if hook not in free], self.reference.model
        zeros = {hook: torch.zeros((), device=ablation.constants[hook].device) for hook in free}
        with temporary_hooks(model, mask_hooks(free, zeros.__getitem__, ablation.constants.__getitem__)):
            seen = capture_nodes(model, self.reference.prompts.clean[:1], hooks)
        return Ablation(ablation.name, {**ablation.constants, **{hook: value[0, 0].float() for hook, value in seen.items()}})

    def _masks(self, flat: Tensor) -> dict[str, Tensor]:
        """Masks by hook point for gates [node], or [batch node] for gates of each prompt's own."""
        lead = (len(flat), 1) if flat.ndim == 2 else ()
        masks = {}
        for key, piece in zip(self.keys, flat.split(self.sizes, -1), strict=True):  # each hook point has one free gate tensor
            shape = self.space.shapes[key]
            rank = 2 if key.hook.endswith("hook_z") else 1
            masks[key.hook] = piece.view(*lead, *shape, *[1] * (rank - len(shape)))
        return masks

    def snapshot(self, kept: Tensor, rows: Tensor, scores: Tensor | None = None, limit: float = math.inf) -> Snapshot:
        """A binary circuit, measured with the constants as they are now, and above the violation `limit` only as far as to know that."""
        measured = self.measure(kept.float().to(self.reference.full.device), rows, limit)
        return Snapshot(kept, self.budget.violation(measured), measured, self.ablation_now(), scores)

    def restore(self, ablation: Ablation) -> None:
        """Set the constants that are learned back to those of an earlier circuit."""
        for hook, value in self.constants.items():
            value.data.copy_(ablation.constants[hook])

    def flat(self, circuit: Circuit) -> Tensor:
        """A circuit as kept nodes [node] bool."""
        return torch.cat([circuit.live(*key).flatten() for key in self.keys])

    def units(self) -> list[Tensor]:
        """The flat indices below each head, block and layer that has a gate and all of whose nodes are gated."""
        ids = self.gates(torch.arange(self.n))
        return [below[i] if key.granularity == "head" else below.flatten() for key in self.space.shapes if key not in self.keys
                for below in [self._below(key, ids)] for i in range(len(below) if key.granularity == "head" else 1)]

    def _below(self, key: GateKey, ids: Gates) -> Tensor:
        if key in self.keys:
            return ids[key]
        parts = [self._below(child, ids) for child in self.space.children(key)]
        return parts[0] if len(parts) == 1 else torch.cat([part.flatten() for part in parts])

    def ablation_now(self) -> Ablation:
        """The ablation with its constants as they are learned so far."""
        kept = self.reference.ablation
        if not self.constants:
            return kept
        return Ablation(kept.name, {**kept.constants, **{hook: value.detach().clone() for hook, value in self.constants.items()}})


def _written(stand_in: Tensor, activation: Tensor, hook: Any) -> Tensor:
    """The stand-in, with the gradient of the activation."""
    return stand_in.to(activation) + activation - activation.detach()


def _learned(reference: Reference) -> dict[str, Tensor]:
    """The constants of "optimal" ablation as tensors to learn; none for the others."""
    if reference.ablation.name != "optimal":
        return {}
    return {hook: value.detach().clone().requires_grad_(True) for hook, value in reference.ablation.constants.items()}


def _worst(sums: Tensor, sizes: Tensor) -> float:
    """The highest mean of the groups that have prompts."""
    return float((sums[: len(sizes)] / sizes)[sizes > 0].max())


def _check_loss(loss: Tensor, n: int, step: int | None) -> None:
    if not isinstance(loss, Tensor) or loss.shape != (n,):
        shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"the loss must be a tensor [batch], one value for each of the {n} prompts; got {shape}.")
    if not torch.isfinite(loss).all():
        raise FloatingPointError(f"NaN or inf in the loss of the circuit{'' if step is None else f' at step {step}'}; nothing was changed.")


def _logit_gradients(logits: Tensor, full: Tensor, prompts: PromptPairs) -> tuple[Tensor, Tensor]:
    """Gradients to the logits [batch d_vocab]: of the KL + hinge, and of the logit difference where the hinge is near its kink."""
    leaf = logits.clone().requires_grad_(True)
    with torch.enable_grad():
        hinge = choice_hinge(leaf, full, prompts)
        (wanted,) = torch.autograd.grad((kl_divergence(leaf, full) + HINGE_WEIGHT * hinge).sum(), leaf)
        (slope,) = torch.autograd.grad(prompts.logit_diff(leaf).sum(), leaf)
    return wanted, slope * ((hinge > 0) & (hinge < 1)).unsqueeze(1)
