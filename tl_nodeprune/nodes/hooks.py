"""What the functions at hook points do: capture, mix by a mask, cut out the answer positions (`attachment` puts them on a model)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tl_nodeprune.nodes.attachment import HookFn, temporary_hooks
from tl_nodeprune.nodes.checks import check_logits
from tl_nodeprune.nodes.space import HOOKS, layer_of

Fetch = Callable[[str], Tensor]


class Mix(torch.autograd.Function):
    """`mask * clean + (1 - mask) * ablated`, exact at 0 and 1; saves one tensor for backward, clean - ablated."""

    @staticmethod
    def forward(ctx: Any, clean: Tensor, ablated: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(mask, clean - ablated if mask.requires_grad else None)
        ctx.ablated_shape = ablated.shape
        return mask * clean + (1 - mask) * ablated

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (grad,) = grads
        mask, difference = ctx.saved_tensors
        wants_clean, wants_ablated, wants_mask = ctx.needs_input_grad
        return (
            grad * mask if wants_clean else None,
            (grad * (1 - mask)).sum_to_size(ctx.ablated_shape) if wants_ablated else None,
            (grad * difference).sum_to_size(mask.shape) if wants_mask else None,
        )


def mix(clean: Tensor, ablated: Tensor, mask: Tensor) -> Tensor:
    """A node's output under its mask (1 = kept): `mask * clean + (1 - mask) * ablated`, in the activation's dtype.

    clean: [batch pos ...]; ablated: broadcasts to clean; mask: the trailing dims of clean.
    """
    return Mix.apply(clean, ablated.to(clean), mask.to(clean))  # type: ignore[no-any-return]


def capture(model: Any, tokens: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """Activations at hook points in one forward without gradient, detached. Hooks on the model act as they are."""
    seen: dict[str, Tensor] = {}

    def keeper(name: str) -> HookFn:
        def keep(activation: Tensor, hook: Any) -> None:
            seen[name] = activation.detach()
        return keep

    with torch.no_grad(), temporary_hooks(model, [(name, keeper(name)) for name in names]):
        model(tokens)
    return seen


def capture_nodes(model: Any, tokens: Tensor, hooks: Sequence[str]) -> dict[str, Tensor]:
    """What each gated hook point adds in one forward: its activation, and for a layer resid_post - resid_pre."""
    pre = [resid_pre(hook) for hook in hooks if is_layer(hook)]
    seen = capture(model, tokens, [*hooks, *pre])
    return {hook: seen[hook] - seen[resid_pre(hook)] if is_layer(hook) else seen[hook] for hook in hooks}


def is_layer(hook: str) -> bool:
    """Whether a hook point is a block's end, where a mask gates what the block adds."""
    return hook.endswith(HOOKS["layer"])


def resid_pre(hook: str) -> str:
    """The hook point where the block of `hook` starts."""
    return f"blocks.{layer_of(hook)}.hook_resid_pre"


def mask_hooks(hooks: Iterable[str], mask_of: Fetch, ablated_of: Fetch) -> list[tuple[str, HookFn]]:
    """Hook functions that apply masks, as `run_with_hooks(fwd_hooks=...)` and `Attachment` take them.

    mask_of: the mask at a hook point now; one that is all 1 and needs no gradient leaves the activation untouched.
    ablated_of: what stands in at a hook point (for a layer: what the block adds when ablated); asked only if needed.
    """
    fns: list[tuple[str, HookFn]] = []
    for name in hooks:
        if is_layer(name):
            fns += _layer_hooks(name, mask_of, ablated_of)
        else:
            fns.append((name, _node_hook(name, mask_of, ablated_of)))
    return fns


def _node_hook(name: str, mask_of: Fetch, ablated_of: Fetch) -> HookFn:
    def apply_mask(activation: Tensor, hook: Any) -> Tensor | None:
        mask = mask_of(name)
        return None if _is_open(mask) else mix(activation, _fitting(ablated_of(name), activation, name), mask)
    return apply_mask


def _layer_hooks(name: str, mask_of: Fetch, ablated_of: Fetch) -> list[tuple[str, HookFn]]:
    stream: list[Tensor] = []

    def remember(activation: Tensor, hook: Any) -> None:
        stream[:] = [activation]

    def apply_mask(activation: Tensor, hook: Any) -> Tensor | None:
        mask = mask_of(name)
        if _is_open(mask):
            stream.clear()
            return None
        added = _fitting(ablated_of(name), activation, name)
        return mix(activation, (before := stream.pop()) + added.to(before), mask)

    return [(resid_pre(name), remember), (name, apply_mask)]


def _is_open(mask: Tensor) -> bool:
    return not (mask.requires_grad and torch.is_grad_enabled()) and bool((mask == 1).all())


def _fitting(ablated: Tensor, activation: Tensor, name: str) -> Tensor:
    """The stand-in, if it is for as many prompts and positions as the activation, or for any (then it lacks these dims)."""
    lead = ablated.shape[: max(ablated.ndim - activation.ndim + 2, 0)]
    want = activation.shape[2 - len(lead):2]
    if lead != want:
        raise ValueError(
            f"{name}: the ablated run is for [batch pos] ending in {tuple(lead)}, but this forward has {tuple(activation.shape[:2])}. "
            "Masks and circuits under this ablation need the prompts they were paired with, in the same order: "
            "use masks.paired(batch) or circuit.applied(model, batch) with the batch that you run."
        )
    return ablated


def slice_hook(model: Any, positions: Tensor) -> tuple[str, HookFn]:
    """A hook that cuts the stream to one position per prompt before the unembedding, which then runs there only.

    positions: [batch]. The logits come out as [batch 1 d_vocab]. On a bridge the cut is at the unembedding itself, since some
    Hugging Face models (GPT-2) reshape the stream to the input's shape after the last block.
    """
    def cut(activation: Tensor, hook: Any) -> Tensor:
        rows = torch.arange(activation.shape[0], device=activation.device)
        return activation[rows, positions.to(activation.device)].unsqueeze(1)

    name = "unembed.hook_in" if "unembed.hook_in" in model.hook_dict else f"blocks.{int(model.cfg.n_layers) - 1}.hook_resid_post"
    return name, cut


def answer_logits(model: Any, tokens: Tensor, positions: Tensor, sliced: bool = True, *, of: str = "the full model") -> Tensor:
    """Logits [batch d_vocab] at one position per prompt, float32.

    sliced: run the unembedding at those positions only; equal to the full run's logits (see `can_slice`). of: whose they are.
    Raises: FloatingPointError for NaN or inf, unless a gradient is wanted: a step of training looks at its loss and gradient together.
    """
    if sliced:
        with temporary_hooks(model, [slice_hook(model, positions)]):
            logits = model(tokens)[:, 0].float()
    else:
        logits = model(tokens)[torch.arange(tokens.shape[0], device=tokens.device), positions].float()
    if not torch.is_grad_enabled():
        check_logits(logits, of)
    return logits  # type: ignore[no-any-return]
