"""What takes a pruned node's place: one object for the search, the evaluation and `circuit.applied`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tl_nodeprune.nodes import NodeSpace, capture_nodes, check_finite, check_ready, check_types
from tl_nodeprune.prompts import PromptPairs

ABLATIONS: tuple[str, ...] = ("interchange", "mean", "zero", "optimal")
FITTED: tuple[str, ...] = ("mean", "optimal")
"""Those that have constants."""


@dataclass(frozen=True, eq=False)
class Ablation:
    """Where the stand-in of a closed node comes from.

    name: "interchange": the node's activation on the paired corrupted prompt; "mean": its mean over the clean prompts that
        it was fitted on, per position; "zero": 0; "optimal": one constant per node (arXiv:2409.09951),
        learned by `prune`'s own search, the mean before that.
    constants: by hook name; "mean" [pos ...], "optimal" [...] without batch and pos; empty for the others, and before `fit`.
        For hook_resid_post it stands for what the block adds.

    Raises: ValueError for an unknown name, and for constants that are not finite or that its name has no use for; TypeError for what are
    no tensors of floats.
    """

    name: str = "interchange"
    constants: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_types(Ablation, vars(self))
        for hook, value in self.constants.items():
            if not isinstance(value, Tensor) or not value.is_floating_point():
                given = value.dtype if isinstance(value, Tensor) else type(value).__name__
                raise TypeError(f"constants[{hook!r}] must be a tensor of floats, got {given}.")
            if value.numel() and not torch.stack(value.detach().aminmax()).isfinite().all():  # takes no memory
                raise ValueError(f"constants[{hook!r}] holds NaN or inf; give finite numbers.")
        if self.name not in ABLATIONS:
            raise ValueError(f"unknown ablation {self.name!r}; allowed: {', '.join(ABLATIONS)}.")
        if self.constants and self.name not in FITTED:
            raise ValueError(f"constants are given, and {self.name!r} ablation has none; leave them out, or take {' or '.join(FITTED)}.")

    def __eq__(self, other: object) -> bool:
        """The same name and the same constants."""
        if not isinstance(other, Ablation) or self.name != other.name or set(self.constants) != set(other.constants):
            return False
        return all(torch.equal(value.cpu(), other.constants[hook].cpu()) for hook, value in self.constants.items())

    def __hash__(self) -> int:
        return hash(self.name)

    @property
    def fitted(self) -> bool:
        """Whether it can serve without being fitted first."""
        return self.name not in FITTED or bool(self.constants)

    def check_fits(self, space: NodeSpace) -> None:
        """Raises ValueError where it is fitted and a hook point that is gated has no constant, or one of another shape."""
        check_types(Ablation.check_fits, locals())
        if self.fitted:
            check_constants(self.name, {hook: tuple(value.shape) for hook, value in self.constants.items()}, space)

    def fit(self, model: Any, prompts: PromptPairs, hooks: Sequence[str], *, batch_size: int = 64) -> Ablation:
        """With constants from the clean prompts, float32: for "optimal" the mean over positions too, to start learning from.

        Of the model as it runs: masks that are attached are to be off (`masks.inactive()`).
        Raises: ValueError where the prompts do not fit the model, or it has no such hook point; FloatingPointError for NaN or inf;
        RuntimeError in training mode with dropout.
        """
        check_types(Ablation.fit, locals())
        check_ready(model)
        prompts.check_fits(model)
        if not len(hooks):
            raise ValueError("hooks is empty; give the names of one hook point or more, such as `circuit.space.hooks`.")
        if self.fitted:
            return self
        sums, count = _position_sums(model, prompts, hooks, batch_size)
        for hook, total in sums.items():
            check_finite(total, f"the activations at {hook}")
        if self.name == "optimal":
            return Ablation(self.name, {hook: (s.sum(0) / count.sum()) for hook, s in sums.items()})
        reach = prompts.reach  # padding that all prompts end in has no mean
        return Ablation(self.name, {hook: s[:reach] / count[:reach].clamp(min=1).view(-1, *[1] * (s.ndim - 1)) for hook, s in sums.items()})

    def cpu(self) -> Ablation:
        """With its constants on the CPU."""
        return Ablation(self.name, {hook: value.detach().cpu() for hook, value in self.constants.items()})

    def values(self, model: Any, prompts: PromptPairs, hooks: Sequence[str], *, batch_size: int = 64) -> dict[str, Tensor]:
        """The stand-ins for these prompts, by hook name; each broadcasts to the hook's activation [batch pos ...].

        Raises: ValueError where "mean" was fitted on shorter prompts, or constants for a hook are missing.
        """
        if self.name == "interchange":
            runs = [capture_nodes(model, batch.corrupted, hooks) for batch in prompts.batches(batch_size)]
            return {hook: torch.cat([run[hook] for run in runs]) for hook in hooks}
        if self.name == "zero":
            return {hook: torch.zeros((), device=prompts.clean.device) for hook in hooks}
        missing = [hook for hook in hooks if hook not in self.constants]
        if missing:
            raise ValueError(f"ablation {self.name!r} has no constant for {missing[0]!r}; fit it on this model's prompts first.")
        if self.name == "optimal":
            return {hook: self.constants[hook].to(prompts.clean.device) for hook in hooks}
        return {hook: self._means_to(hook, prompts) for hook in hooks}

    def _means_to(self, hook: str, prompts: PromptPairs) -> Tensor:
        means, width = self.constants[hook], prompts.clean.shape[1]
        if len(means) < prompts.reach:
            raise ValueError(f"mean ablation was fitted on prompts of {len(means)} tokens, these have {prompts.reach}; "
                             "fit it on prompts at least as long, or use another ablation.")
        padding = means.new_zeros(max(width - len(means), 0), *means.shape[1:])
        return torch.cat([means[:width], padding]).to(prompts.clean.device)


def check_constants(name: str, shapes: Mapping[str, tuple[int, ...]], space: NodeSpace) -> None:
    """Raises ValueError where an ablation with constants of these shapes lacks one at a hook point that is gated, or has it in another
    shape or for prompts of another length than elsewhere."""
    hooks = space.hooks if name in FITTED else ()
    for hook in hooks:
        if hook not in shapes:
            raise ValueError(f"{name!r} ablation has no constant for {hook!r}, which is gated; fit it first, on this model's prompts: "
                             f"Ablation({name!r}).fit(model, prompts, circuit.space.hooks).")
        first = shapes[hooks[0]][:1] if name == "mean" else ()
        if shapes[hook] != first + space.activation(hook) or not all(first):
            raise ValueError(f"constants[{hook!r}] is {list(shapes[hook])}, and {name!r} ablation of these nodes needs "
                             f"{'one per position, ' if first else ''}{list(first + space.activation(hook))}.")


def as_ablation(given: str | Ablation) -> Ablation:
    """An Ablation from its name; one that is there already as it is."""
    return given if isinstance(given, Ablation) else Ablation(given)


def _position_sums(model: Any, prompts: PromptPairs, hooks: Sequence[str], batch_size: int) -> tuple[dict[str, Tensor], Tensor]:
    """Sums over prompts of each hook's activation per position, padding left out, and how many prompts reach each position."""
    sums: dict[str, Tensor] = {}
    for batch in prompts.batches(batch_size):
        real = batch.attention_mask
        assert real is not None
        for hook, activation in capture_nodes(model, batch.clean, hooks).items():
            shaped = real.view(*real.shape, *[1] * (activation.ndim - 2)).to(activation.device)
            sums[hook] = sums.get(hook, 0) + (activation.float() * shaped).sum(0)
    assert prompts.attention_mask is not None
    return sums, prompts.attention_mask.sum(0)
