"""Everything that touches TransformerLens hook points: probing, capturing, mixing, attaching, slicing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tl_nodeprune.nodes import GRANULARITIES, HOOKS, GateKey, NodeSpace, layer_of

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
        return mix(activation, stream[0] + added.to(stream[0]), mask)

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


def answer_logits(model: Any, tokens: Tensor, positions: Tensor, sliced: bool = True) -> Tensor:
    """Logits [batch d_vocab] at one position per prompt, float32.

    sliced: run the unembedding at those positions only; equal to the full run's logits (see `can_slice`).
    """
    if not sliced:
        rows = torch.arange(tokens.shape[0], device=tokens.device)
        return model(tokens)[rows, positions].float()  # type: ignore[no-any-return]
    with temporary_hooks(model, [slice_hook(model, positions)]):
        return model(tokens)[:, 0].float()  # type: ignore[no-any-return]


def can_slice(model: Any, tokens: Tensor, positions: Tensor) -> bool:
    """Whether cutting the residual before the unembedding leaves this model's logits as they are: tried on one prompt."""
    one, at = tokens[:1], positions[:1]
    with torch.no_grad():
        whole = answer_logits(model, one, at, sliced=False)
        try:
            cut = answer_logits(model, one, at)
        except (RuntimeError, ValueError, IndexError):
            return False
    return cut.shape == whole.shape and torch.allclose(cut, whole, rtol=1e-4, atol=1e-4, equal_nan=True)


def _shapes_in_layer(layer: int, seen: Mapping[str, Tensor], points: Mapping[str, Any]) -> dict[GateKey, tuple[int, ...]]:
    def get(short: str) -> Tensor | None:
        return seen.get(f"blocks.{layer}.{short}")

    z, post, out = get("attn.hook_z"), get("mlp.hook_post"), get("hook_mlp_out")
    shapes: dict[str, tuple[int, ...]] = {"layer": ()}
    if get("hook_attn_out") is not None:
        shapes["attn"] = ()
    if z is not None and z.ndim == 4:
        shapes |= {"head": (z.shape[2],), "attn_neuron": (z.shape[2], z.shape[3])}
    if out is not None:
        shapes |= {"mlp": (), "mlp_out": (out.shape[-1],)}
    # Mixtral's hook_post is the very hook point of hook_mlp_out: no neurons there
    shared = points.get(f"blocks.{layer}.mlp.hook_post") is points.get(f"blocks.{layer}.hook_mlp_out")
    if post is not None and post.ndim == 3 and not shared:
        shapes["mlp_neuron"] = (post.shape[-1],)
    return {GateKey(name, layer): shapes[name] for name in GRANULARITIES if name in shapes}


def _check_additive(layer: int, seen: Mapping[str, Tensor]) -> None:
    zero = torch.zeros((), device=seen[f"blocks.{layer}.hook_resid_pre"].device)
    pre, attn, mlp, post = (seen.get(f"blocks.{layer}.{name}", zero).float()
                            for name in ("hook_resid_pre", "hook_attn_out", "hook_mlp_out", "hook_resid_post"))
    if not torch.isfinite(post).all():
        return  # a broken model is named where its logits are looked at
    if not torch.allclose(pre + attn + mlp, post, rtol=1e-2, atol=1e-2 * float(post.abs().max())):
        raise ValueError(
            f"block {layer} does not add its attention and MLP outputs to the residual stream (a post-norm model such as "
            "BERT?), so they are not nodes. Supported: models with resid_pre + attn_out + mlp_out = resid_post."
        )


def find_nodes(model: Any) -> NodeSpace:
    """Every node of a HookedTransformer or TransformerBridge, from one probe forward of two tokens.

    Raises: TypeError where `model` is no TransformerLens model; ValueError where it has no single stack of `blocks`
    or its blocks do not add to the residual stream.
    """
    if not hasattr(model, "hook_dict") or not hasattr(model, "cfg"):
        raise TypeError(f"expected a HookedTransformer or TransformerBridge, got {type(model).__name__}.")
    n_layers, table = int(model.cfg.n_layers), model.hook_dict
    shorts = ("hook_resid_pre", *dict.fromkeys(HOOKS.values()))
    names = [name for layer in range(n_layers) for s in shorts if (name := f"blocks.{layer}.{s}") in table]
    if f"blocks.{n_layers - 1}.hook_resid_post" not in names:
        raise ValueError(f"{type(model).__name__} has no blocks.{n_layers - 1}.hook_resid_post; only decoder-only models "
                         "with one stack of `blocks` have nodes here.")
    tokens = torch.zeros((1, 2), dtype=torch.long, device=device_of(model))
    seen = capture(model, tokens, names)
    shapes: dict[GateKey, tuple[int, ...]] = {}
    for layer in range(n_layers):
        _check_additive(layer, seen)
        shapes |= _shapes_in_layer(layer, seen, {name: table[name] for name in names})
    return NodeSpace(
        shapes, shapes, d_model=seen["blocks.0.hook_resid_post"].shape[-1], n_layers=n_layers,
        kv_heads=int(getattr(model.cfg, "n_key_value_heads", None) or model.cfg.n_heads),
        gated_mlp=bool(getattr(model.cfg, "gated_mlp", False)), model_name=str(getattr(model.cfg, "model_name", "")),
    )


def device_of(model: Any) -> torch.device:
    """Where a model takes its tokens."""
    return next(iter(model.parameters())).device  # type: ignore[no-any-return]


def check_ready(model: Any) -> None:
    """Raises RuntimeError where the model is in training mode with dropout: no two forwards would agree."""
    rates = ("p", "attention_dropout", "attn_dropout", "dropout")
    dropouts = [name for name, module in model.named_modules()
                if module.training and any(_rate(module, attribute) > 0 for attribute in rates)]
    if dropouts:
        raise RuntimeError(f"the model is in training mode with dropout (at {dropouts[0]} and {len(dropouts) - 1} more places); "
                           "call model.eval() first.")


def _rate(module: Any, attribute: str) -> float:
    value = getattr(module, attribute, 0.0) if not isinstance(module, torch.nn.ModuleDict) else 0.0
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else 0.0
