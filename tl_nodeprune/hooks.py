"""Everything that touches TransformerLens hook points: capturing, mixing, attaching, slicing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tl_nodeprune.checks import check_logits
from tl_nodeprune.nodes import HOOKS, layer_of

HookFn = Callable[..., Tensor | None]
Fetch = Callable[[str], Tensor]
_SLOT = "_tl_nodeprune"  # attribute of a HookPoint where an attachment leaves word of itself; `ctx` would not do, reset_hooks() empties it


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


class Attachment:
    """Permanent hooks on a model that come off again together. `fns` run before every other hook, also later ones.

    So a patch at a masked hook point overrides the mask, and a patch of hook_resid_pre does not reach what a closed layer passes on.

    active: while False the hooks let everything pass. freeze: no weight of the model wants a gradient until `remove`.
    """

    def __init__(self, model: Any, fns: Sequence[tuple[str, HookFn]], owner: object, *, freeze: bool = False) -> None:
        self.owner = owner
        self.active = True
        self._tokens: Tensor | None = None
        self._handles: list[tuple[Any, Any]] = []
        self._frozen: list[Any] = []
        points = hook_points(model, [name for name, _ in fns])
        try:
            for name, fn in fns:
                point = points[name]
                point.add_hook(self._while_active(fn), is_permanent=True, prepend=True)  # returns None before TransformerLens 4
                self._handles.append((point, point.fwd_hooks[0]))
                setattr(point, _SLOT, self)
            self._frozen = [p for p in model.parameters() if p.requires_grad] if freeze else []
            for parameter in self._frozen:
                parameter.requires_grad_(False)
        except BaseException:
            self.remove()
            raise

    def _while_active(self, fn: HookFn) -> HookFn:
        def run(activation: Tensor, hook: Any) -> Tensor | None:
            return fn(activation, hook=hook) if self.active else None
        return run

    @contextmanager
    def only_on(self, model: Any, tokens: Tensor) -> Iterator[None]:
        """Inside, a forward on other tokens [batch pos] of this shape raises ValueError: the stand-ins of one prompt are no other's.
        Nested, the innermost counts."""
        def check(module: Any, args: tuple[Any, ...]) -> None:
            run = args[0].to(tokens.device) if self.active and args and args[0].shape == tokens.shape else tokens
            if self._tokens is tokens and not torch.equal(run, tokens):
                first = int((run != tokens).any(1).nonzero()[0])
                raise ValueError(f"this forward runs on other prompts than the stand-ins are of (the first is prompt {first}). "
                                 "Use masks.paired(batch) or circuit.applied(model, batch) with the batch that you run.")

        before, self._tokens = self._tokens, tokens
        handle = model.embed.register_forward_pre_hook(check)
        try:
            yield
        finally:
            handle.remove()
            self._tokens = before

    @property
    def alive(self) -> bool:
        """False once removed, also by `model.reset_hooks(including_permanent=True)`."""
        return any(handle in point.fwd_hooks for point, handle in self._handles)

    def remove(self) -> None:
        """Take every hook off; frozen weights get their requires_grad back. Does nothing the second time."""
        for point, handle in self._handles:
            handle.hook.remove()
            if handle in point.fwd_hooks:
                point.fwd_hooks.remove(handle)
            if getattr(point, _SLOT, None) is self:
                delattr(point, _SLOT)
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._handles, self._frozen = [], []


def find_attachment(model: Any, *, dead_too: bool = False) -> Attachment | None:
    """The hooks of this library that are on the model now, if any.

    dead_too: else those that `reset_hooks(including_permanent=True)` took off and nobody removed, so that weights are still frozen.
    """
    slots = (getattr(point, _SLOT, None) for point in dict(model.hook_dict).values())
    found = list(dict.fromkeys(slot for slot in slots if isinstance(slot, Attachment)))
    return next((one for one in found if one.alive), found[0] if found and dead_too else None)


def remove_dead(model: Any) -> None:
    """Give back what hooks of this library hold that `reset_hooks(including_permanent=True)` took off, such as frozen weights."""
    attachment = find_attachment(model, dead_too=True)
    if attachment is not None and not attachment.alive:
        attachment.remove()


@contextmanager
def inactive(attachment: Attachment | None) -> Iterator[None]:
    """The model as if nothing were attached, for as long as the block lasts."""
    before = attachment.active if attachment else True
    try:
        if attachment:
            attachment.active = False
        yield
    finally:
        if attachment:
            attachment.active = before


def hook_points(model: Any, names: Iterable[str]) -> dict[str, Any]:
    """Hook points by name; the dictionary is read once, since a bridge rebuilds it at each access.

    Raises: ValueError that names the missing hook point and similar ones.
    """
    table = model.hook_dict
    points = {}
    for name in names:
        if name not in table:
            near = sorted(n for n in table if n.endswith(name.split(".")[-1]))[:4]
            raise ValueError(f"this model has no hook point {name!r}. Similar: {', '.join(near) or 'none'}.")
        points[name] = table[name]
    return points


@contextmanager
def temporary_hooks(model: Any, fns: Sequence[tuple[str, HookFn]]) -> Iterator[None]:
    """Hooks that run after those already there and are gone afterwards, whatever happens inside."""
    points = hook_points(model, [name for name, _ in fns])
    added: list[tuple[Any, Any]] = []
    try:
        for name, fn in fns:
            points[name].add_hook(fn)
            added.append((points[name], points[name].fwd_hooks[-1]))
        yield
    finally:
        for point, handle in added:
            handle.hook.remove()
            if handle in point.fwd_hooks:
                point.fwd_hooks.remove(handle)


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
