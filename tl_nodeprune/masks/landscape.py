"""What a search moves over: losses and gradients of circuits, given as flat vectors of gates, against the full model computed once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_nodeprune.masks.ablation import Ablation
from tl_nodeprune.masks.constants import RATE as CONSTANTS_RATE
from tl_nodeprune.masks.losses import LossFn, choice_hinge, kl_divergence
from tl_nodeprune.masks.reference import Reference
from tl_nodeprune.nodes import GateKey, Gates, HookFn, NodeSpace, capture_nodes, check_finite, device_of, mask_hooks, temporary_hooks

HINGE_WEIGHT = 0.2
STEP_COST = 3  # forwards that a forward with its backward takes
TRIED, UNLIKE = 4, 0.05  # prompts on which bfloat16 is tried; how far their losses may be from float32's, as a share of these


class Losses(NamedTuple):
    """Of circuits on prompts, [prompt] or [circuit prompt]. wrong: whether the circuit chooses between answer and wrong answer unlike the
    full model; hinge: `choice_hinge`, logits, 0 for a loss of one's own."""

    loss: Float[Tensor, "*circuit prompt"]
    wrong: Float[Tensor, "*circuit prompt"]
    hinge: Float[Tensor, "*circuit prompt"]


class Landscape:
    """Losses and gradients of circuits, given as one flat vector of gates [node] over all gate tensors that decide (`NodeSpace.free`).
    A coarse gate that is covered follows what is below it."""

    def __init__(self, space: NodeSpace, reference: Reference, loss: LossFn = kl_divergence) -> None:
        self.space, self.reference, self.loss = space, reference, loss
        self.keys: list[GateKey] = space.free()
        self.sizes = [int(torch.Size(space.shapes[key]).numel()) for key in self.keys]
        self.n, self.n_prompts, self.device = sum(self.sizes), len(reference.prompts), device_of(reference.model)
        self.constants = _learned(reference)
        self.passed: Callable[[int], object] = lambda units: None  # hears of each pass, in forwards of one prompt
        self.half = False  # gradients with matrix products in bfloat16
        self._optimizer = torch.optim.Adam(list(self.constants.values()), lr=CONSTANTS_RATE) if self.constants else None

    def gates(self, flat: Tensor) -> Gates:
        """A flat vector as gate tensors; covered coarse gates open."""
        pieces = {key: piece.view(self.space.shapes[key]) for key, piece in zip(self.keys, flat.split(self.sizes), strict=True)}
        return {key: pieces.get(key, torch.ones(shape, device=flat.device, dtype=torch.float32))
                for key, shape in self.space.shapes.items()}

    def losses(self, flats: Float[Tensor, "circuit node"], rows: Int[Tensor, "row"]) -> Losses:
        """Run circuits on some of the prompts, many in one forward: each [circuit row], without gradient."""
        n, found = len(rows), []
        pairs = torch.arange(len(flats) * n)
        with torch.no_grad():
            for some in self.reference.chunks(pairs):
                which, at = some // n, rows[some % n]
                one = bool((which == which[0]).all())
                flat = flats[which[0]] if one else flats[which.to(flats.device)]
                losses, _ = self._judged(self.logits(flat.to(self.device), at), at)
                check_finite(losses.loss, "the loss of the circuit")
                self.passed(len(at))
                found.append(losses)
        return Losses(*(torch.cat(part).view(len(flats), n) for part in zip(*found, strict=True)))

    def gradient(self, flat: Float[Tensor, "row node"], rows: Int[Tensor, "row"], step: int) -> tuple[Losses, Float[Tensor, "row node"]]:
        """The losses of each prompt under gates of its own, and the gradient of each prompt's loss + hinge to its gates.

        Raises FloatingPointError for NaN or inf in either.
        """
        chunks = zip(flat.split(self.reference.batch_size), self.reference.chunks(rows), strict=True)
        parts = [self._part(part, some) for part, some in chunks]
        losses = Losses(*(torch.cat(values) for values in zip(*(found for found, _, _ in parts), strict=True)))
        grad = torch.cat([gradient for _, gradient, _ in parts])
        if self._optimizer:
            for i, constant in enumerate(self.constants.values()):
                its = [constants[i] for _, _, constants in parts if constants[i] is not None]
                constant.grad = torch.stack(its).sum(0) / len(rows) if its else None
            self._optimizer.step()
        self.passed(STEP_COST * len(rows))
        if not torch.isfinite(losses.loss.sum() + grad.sum()):  # the step's one look from the host
            where = "loss of the circuit" if not torch.isfinite(losses.loss).all() else "gradient of the loss"
            raise FloatingPointError(f"NaN or inf in the {where} at step {step}; nothing was changed. In half precision try float32. Is "
                                     "the loss smooth where the circuit is the full model (a square root of 0 is not)?")
        return losses, grad

    def try_half(self) -> None:
        """Take matrix products of gradients in bfloat16 from now on, if this machine multiplies such matrices itself and the losses of a
        few prompts are then those of float32, nearly."""
        if not _fast_at_half(self.device) or any(p.dtype != torch.float32 for p in self.reference.model.parameters()):
            return
        rows = torch.arange(min(TRIED, self.n_prompts, self.reference.batch_size))
        flat = torch.linspace(0.2, 0.8, len(rows), dtype=torch.float32)[:, None].expand(-1, self.n)
        with torch.no_grad():
            exact = self._judged(self.logits(flat, rows), rows)[0].loss
            try:
                near = self._judged(self.logits(flat, rows, half=True), rows)[0].loss
            except (RuntimeError, TypeError, ValueError, NotImplementedError):  # a model whose own code takes one dtype only
                return
        self.half = bool(((near - exact).abs() <= UNLIKE * exact.abs().mean()).all())

    def _part(self, flat: Tensor, rows: Tensor) -> tuple[Losses, Tensor, list[Tensor]]:
        """Losses and gradients of one forward: to the gates [row node], and summed over prompts to the learned constants."""
        leaf = flat.detach().to(self.device).clone().requires_grad_(True)
        with torch.enable_grad():
            losses, wanted = self._judged(self.logits(leaf, rows, half=self.half), rows)
            if not losses.loss.requires_grad:
                raise ValueError("the loss has no gradient (a count or an argmax?); a search needs a differentiable one.")
            grad, *constants = torch.autograd.grad(wanted.sum(), [leaf, *self.constants.values()], allow_unused=True)
        return Losses(*(value.detach() for value in losses)), grad, constants

    def _judged(self, logits: Tensor, rows: Tensor) -> tuple[Losses, Tensor]:
        """Losses of logits [row d_vocab] at the prompts `rows`, and what a search lowers: the loss, for KL with the hinge."""
        prompts, full = self.reference.prompts[rows], self.reference.full[rows.to(self.reference.full.device)]
        loss = self.loss(logits, full, prompts)
        _check_loss(loss, len(rows))
        wrong = (prompts.logit_diff(logits.detach()) * prompts.logit_diff(full) < 0).to(loss)
        if self.loss is not kl_divergence:
            return Losses(loss, wrong, torch.zeros_like(wrong)), loss
        hinge = choice_hinge(logits, full, prompts)
        return Losses(loss, wrong, hinge), loss + HINGE_WEIGHT * hinge

    def logits(self, flat: Tensor, rows: Tensor, *, half: bool = False) -> Tensor:
        """The answer logits [row d_vocab] under gates [node] or [row node]. half: with matrix products in bfloat16."""
        stand_ins, also = self.constants or self.reference.stand_ins(rows), self._closed_blocks(flat, rows)
        with torch.autocast(self.device.type, torch.bfloat16) if half else nullcontext():
            return self.reference.logits(rows, self._masks(flat), stand_ins, also=also)

    def _masks(self, flat: Tensor) -> dict[str, Tensor]:
        """Masks by hook point for gates [node], or [row node] for gates of each prompt's own."""
        lead = (len(flat), 1) if flat.ndim == 2 else ()
        masks = {}
        for key, piece in zip(self.keys, flat.split(self.sizes, -1), strict=True):  # each hook point has one free gate tensor
            shape = self.space.shapes[key]
            rank = 2 if key.hook.endswith("hook_z") else 1
            masks[key.hook] = piece.reshape(*lead, *shape, *[1] * (rank - len(shape)))
        return masks

    def _closed_blocks(self, flat: Tensor, rows: Tensor) -> list[tuple[str, HookFn]]:
        """Under zero or mean ablation a block in which nothing is open writes its own stand-in, as it does in the circuit: 0, not its bias;
        its mean, not what a norm after it makes of the means in it. The gradient is as if it were open: what is in it can return."""
        ablation = self.reference.ablation
        if ablation.name not in ("zero", "mean"):
            return []
        closed: dict[str, Tensor] = {}
        for key, below in self._blocks.items():
            shut = (flat.detach()[..., below.to(flat.device)] <= 0).all(-1)
            for part in (GateKey("attn", key.layer), GateKey("mlp", key.layer)) if key.granularity == "layer" else (key,):
                if part in self.space.present and (ablation.name == "zero" or part.hook in ablation.constants):
                    closed[part.hook] = closed[part.hook] | shut if part.hook in closed else shut
        stand_ins = ablation.values(self.reference.model, self.reference.prompts[rows], list(closed)) if closed else {}
        return [(hook, partial(_written, value, closed[hook])) for hook, value in stand_ins.items()]

    @cached_property
    def _blocks(self) -> dict[GateKey, Tensor]:
        """The flat indices below each block and layer whose gate follows from them."""
        ids = self.gates(torch.arange(self.n))
        return {key: self._below(key, ids).flatten() for key in self.space.shapes
                if key.granularity in ("layer", "attn", "mlp") and self.space.covered(key)}

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

    def without_moot(self, kept: Bool[Tensor, "node"]) -> Bool[Tensor, "node"]:
        """Less what has no effect: output dims of an MLP with no neuron kept, neurons of one with no output dim."""
        kept = kept.clone()
        gates = self.gates(kept)  # views into `kept`
        for layer in self.space.layers:
            neurons, outs = (gates.get(GateKey(name, layer)) for name in ("mlp_neuron", "mlp_out"))
            if neurons is not None and outs is not None and not (neurons.any() and outs.any()):
                neurons.zero_()
                outs.zero_()
        return kept

    def constants_state(self) -> dict[str, Tensor]:
        """Learned constants and what their optimizer keeps, as tensors by name."""
        if not self._optimizer:
            return {}
        kept = self._optimizer.state_dict()["state"]
        adam = {f"adam/{i}/{name}": value for i, of in kept.items() for name, value in of.items()}
        return {f"constant/{hook}": value.detach() for hook, value in self.constants.items()} | adam

    def load_constants(self, saved: dict[str, Tensor]) -> None:
        """Set them to what `constants_state` gave."""
        for hook, value in self.constants.items():
            value.data.copy_(saved[f"constant/{hook}"])
        if self._optimizer and (adam := {name: value for name, value in saved.items() if name.startswith("adam/")}):
            found: dict[int, dict[str, Tensor]] = {}
            for name, value in adam.items():
                found.setdefault(int(name.split("/")[1]), {})[name.split("/")[2]] = value
            self._optimizer.load_state_dict(self._optimizer.state_dict() | {"state": found})

    def ablation_now(self) -> Ablation:
        """The ablation with its constants as they are learned so far."""
        kept = self.reference.ablation
        if not self.constants:
            return kept
        return Ablation(kept.name, {**kept.constants, **{hook: value.detach().clone() for hook, value in self.constants.items()}})

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


def _fast_at_half(device: torch.device) -> bool:
    """Whether a device multiplies matrices of bfloat16 itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    able = torch.cpu.get_capabilities() if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities") else {}
    return any(able.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def circuits_of(kept: Sequence[Tensor]) -> Float[Tensor, "circuit node"]:
    """Kept nodes [node] bool of several circuits as flat gates."""
    return torch.stack(list(kept)).float()


def _written(stand_in: Tensor, shut: Tensor, activation: Tensor, hook: Any) -> Tensor:
    """Where a block is shut, its stand-in with the gradient of the activation."""
    written = stand_in.to(activation) + activation - activation.detach()
    return torch.where(shut.view(-1, *[1] * (activation.ndim - 1)), written, activation)


def _learned(reference: Reference) -> dict[str, Tensor]:
    """The constants of "optimal" ablation as tensors to learn; none for the others."""
    if reference.ablation.name != "optimal":
        return {}
    return {hook: value.detach().clone().requires_grad_(True) for hook, value in reference.ablation.constants.items()}


def _check_loss(loss: Tensor, n: int) -> None:
    if not isinstance(loss, Tensor) or loss.shape != (n,):
        shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"the loss must be a tensor [batch], one value for each of the {n} prompts; got {shape}.")
