"""What this library puts on a model: entered in a ledger before it acts, and taken off by one routine, now or by a later call."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from threading import get_ident
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformer_lens.hook_points import LensHandle

from tl_nodeprune.nodes.checks import check_model, reraise_memory
from tl_nodeprune.nodes.scope import Scope, Token

T = TypeVar("T")
HookFn = Callable[..., Tensor | None]
Hooks = Sequence[tuple[str, HookFn]]
_SLOT = "_tl_nodeprune"  # a plain attribute of the stack of blocks, which a shallow copy of the model has in common with it


def _over() -> None:
    """The token of a block that has ended."""


class Ledger:
    """What is on one model now, in the order in which it came. causal: see `probe.check_causal`."""

    def __init__(self, of_copy: bool = False) -> None:
        self.entries: list[Attachment] = []
        self.causal: bool | None = None
        self._of_copy = of_copy  # of a model with masks: it has none, but may be asked to remove them

    def enter(self, new: Attachment) -> None:
        """Raises RuntimeError where another thread is at work on the model."""
        self.clear()
        self.entries.append(new)
        for other in self.entries[: self.entries.index(new)]:
            if other.live and not other.kept and other.thread != new.thread:
                raise RuntimeError("another thread is at work on this model, and hooks are common to all threads. Let one finish before "
                                   "the next begins, or give each thread a model of its own.")

    def clear(self) -> bool:
        """Take off what calls that were interrupted have left, and masks whose hooks the user reset. Whether there was any."""
        left = [entry for entry in self.entries if not entry.live or entry.kept and not entry.hooked]
        for entry in left:
            entry.remove()
        any_left, self._of_copy = bool(left) or self._of_copy, False
        return any_left

    def __deepcopy__(self, memo: dict[int, Any]) -> Ledger:
        """A copy of the model is the plain model: nothing of ours is on it, its weights want gradients as they did."""
        for entry in self.entries:
            for parameter in entry.frozen:
                copy.deepcopy(parameter, memo).requires_grad_(True)
            for module in entry.modules:
                _take_off(entry, module, lambda table: copy.deepcopy(table, memo))
        return Ledger(any(entry.kept for entry in self.entries))

    def __reduce__(self) -> tuple[Any, ...]:
        """Nothing of it is pickled, so that what is read back does not need this library."""
        return bool, ()


class Attachment:
    """Hooks on a model that act together, until `remove` or for the block of `on()`; with an owner they are permanent ones.

    Permanent hooks run before every other hook, also later ones. So a patch at a masked hook point overrides the mask, and a patch of
    hook_resid_pre does not reach what a closed layer passes on. Temporary ones run after those already there, in their own thread only.

    fns: hook functions by name, asked for as the hooks are put on. tokens: prompts [batch pos] whose stand-ins these are, if any: a forward
    on others of this shape raises ValueError. freeze: no weight of the model wants a gradient until `remove`. pause: permanent hooks let
    everything pass.
    """

    def __init__(self, model: Any, fns: Callable[[], Hooks] = list, *, owner: object = None,
                 tokens: Callable[[], Tensor | None] | None = None, freeze: bool = False, pause: bool = False) -> None:
        self.model, self.ledger, self.owner, self.pause, self.thread = model, ledger_of(model), owner, pause, get_ident()
        self._fns, self._tokens, self._freeze = fns, tokens, freeze
        self._token: Token = _over
        self._kept: dict[bool, Any] = {}
        self.modules: list[Any] = []
        self.frozen: list[Any] = []
        self.block = Scope(self._until, lambda token: self.remove())
        """What is on already, from here on for the length of a `with` block alone."""

    def on(self) -> Scope:
        """On the model for the length of a `with` block."""
        return Scope(self.put_on, lambda token: self.remove())

    def put_on(self, token: Token = _over) -> None:
        """Put everything on; it acts as long as `token` gives something, or from `keep` on. Nothing is left where this raises."""
        fns, self.thread = self._fns(), get_ident()
        points = hook_points(self.model, [name for name, _ in fns])
        checked = [self.model.embed] if self._tokens else []
        try:
            self.modules, self._token = [*points.values(), *checked], token
            self.ledger.enter(self)
            self.frozen = [p for p in self.model.parameters() if p.requires_grad] if self._freeze else []
            for name, fn in fns:
                self._hook(points[name], fn)
            for module in checked:
                module.register_forward_pre_hook(_Hook(self, module, self._check))
            for parameter in self.frozen:
                parameter.requires_grad_(False)
        except BaseException:
            self.remove()
            raise

    def keep(self, result: T) -> T:
        """From here on it acts until `remove`. One expression, so that no interrupt can come between acting and the caller's result."""
        return self._kept.setdefault(True, result)  # type: ignore[no-any-return]

    def _until(self, token: Token) -> None:
        self._token = token
        self._kept = {}

    def _hook(self, point: Any, fn: HookFn) -> None:
        def act(point: Any, args: Any, activation: Tensor) -> Tensor | None:
            if (conversion := point.hook_conversion) is None:
                return fn(activation, hook=point)
            found = fn(conversion.convert(activation), hook=point)
            return None if found is None else conversion.revert(found)

        # not by point.add_hook: its closure can't be told from a user's, and acts on copies of the model
        permanent, hook = self.owner is not None, _Hook(self, point, act)
        handle = LensHandle(point.register_forward_hook(hook, prepend=permanent), permanent, user_hook=hook)
        point.fwd_hooks.insert(0 if permanent else len(point.fwd_hooks), handle)

    def _check(self, embed: Any, args: tuple[Any, ...]) -> None:
        tokens = self._tokens() if self._tokens and self.hooked else None
        if tokens is None or not args or args[0].shape != tokens.shape or torch.equal(run := args[0].to(tokens.device), tokens):
            return
        first = int((run != tokens).any(1).nonzero()[0])
        raise ValueError(f"this forward runs on other prompts than the stand-ins are of (the first is prompt {first}). "
                         "Use masks.paired(batch) or circuit.applied(model, batch) with the batch that you run.")

    @property
    def kept(self) -> bool:
        return bool(self._kept)

    @property
    def live(self) -> bool:
        """Whether it was kept and not removed, or its block still runs."""
        return self.kept or self._token() is not None

    @property
    def hooked(self) -> bool:
        """Whether any hook is there still; `model.reset_hooks(including_permanent=True)` takes them off too."""
        return any(_is_of(self, hook) for module in self.modules for hook in module._forward_hooks.values())

    @property
    def active(self) -> bool:
        """Whether nothing in this thread pauses it."""
        return not any(entry.pause and entry.live and entry.thread == get_ident() for entry in self.ledger.entries)

    @property
    def acts(self) -> bool:
        return self.live and (self.thread == get_ident() if self.owner is None else self.active)

    def remove(self) -> None:
        """Take everything off; frozen weights get their requires_grad back. May be broken off anywhere and called again, and does nothing
        once it is done."""
        self._token, self._kept = _over, {}
        if self not in self.ledger.entries:
            return
        for parameter in self.frozen:
            parameter.requires_grad_(True)
        for module in self.modules:
            _take_off(self, module)
        self.ledger.entries.remove(self)


class _Hook:
    """A torch hook on one module that acts while its attachment does, and never on a copy of the module."""

    def __init__(self, attachment: Attachment, module: Any, act: Callable[..., Any]) -> None:
        self.attachment, self.module, self.act = attachment, module, act

    def __call__(self, module: Any, *given: Any) -> Any:
        if module is not self.module or not self.attachment.acts:
            return None
        if torch._C._current_graph_task_id() != -1:  # what torch.utils.checkpoint itself asks
            raise RuntimeError("gradient checkpointing runs the model again in the backward pass, where masks may be others than in the "
                               "forward. Switch it off: model.original_model.gradient_checkpointing_disable(), or model.eval().")
        return self.act(module, *given)

    def __reduce__(self) -> tuple[Any, ...]:
        return _copied, (self.attachment.frozen,)


def _copied(frozen: list[Any]) -> Callable[..., None]:
    """What a copy of a model has in place of a `_Hook`. frozen: the copies of the weights, which are free."""
    for parameter in frozen:
        parameter.requires_grad_(True)
    return _nothing


def _nothing(*given: object) -> None:
    """A hook without effect."""


def _is_of(attachment: Attachment, hook: object) -> bool:
    return isinstance(hook, _Hook) and hook.attachment is attachment


def _take_off(attachment: Attachment, module: Any, of: Callable[[Any], Any] = lambda table: table) -> None:
    """Take an attachment's hooks off a module. of: from the module's own tables to those to clean, as those of a copy."""
    handles = getattr(module, "fwd_hooks", [])
    ours = {handle.hook.id for handle in handles if _is_of(attachment, handle.user_hook)}
    of(handles)[:] = [handle for handle in of(handles) if handle.hook.id not in ours]
    for table in (module._forward_hooks, module._forward_pre_hooks):
        for key in [key for key, hook in table.items() if _is_of(attachment, hook)]:
            of(table).pop(key, None)


def ledger_of(model: Any) -> Ledger:
    """What is on a model. Raises TypeError for what is not a TransformerLens model."""
    place = getattr(getattr(model, "blocks", model), "__dict__", {})
    if isinstance(found := place.get(_SLOT), Ledger):
        return found
    check_model(model)
    if found is not None:  # of a pickled model
        place.pop(_SLOT, None)
    return place.setdefault(_SLOT, Ledger())  # type: ignore[no-any-return]  # not under a lock: an interrupt may leave one locked


def find_attachment(model: Any) -> Attachment | None:
    """The masks or the circuit that are on the model now, if any."""
    return next((entry for entry in ledger_of(model).entries if entry.owner is not None and entry.live and entry.hooked), None)


def hooks_of_others(model: Any) -> str:
    """The first few hook points that have hooks of somebody else's, such as the user's; empty where none has."""
    def is_others(hook: object) -> bool:
        return not isinstance(hook, _Hook) and not str(getattr(hook, "__module__", "")).startswith("transformer_lens.")

    points = dict(model.hook_dict).items()
    return ", ".join([name for name, point in points if any(is_others(handle.user_hook) for handle in point.fwd_hooks)][:3])


def failed(model: Any, tokens: Tensor, why: str, error: Exception) -> ValueError:
    """The error to raise where a model's forward fails on tokens that this library looks at it with: it names a user's own hooks. Raises
    the error itself where memory ran out."""
    reraise_memory(error)
    theirs = hooks_of_others(model)
    hint = (f"There are hooks of your own on it, at {theirs}: make them work for prompts of any length, or take them off for this call "
            "(model.reset_hooks())." if theirs else "Does `model(tokens)` run?")
    return ValueError(f"this model's forward fails on {tokens.shape[-1]} tokens, so {why}: {type(error).__name__}: {error}. {hint}")


def inactive(model: Any) -> Scope:
    """The model as if no masks and no circuit were attached, for as long as the block lasts. Raises RuntimeError where another thread is at
    work on the model."""
    return Attachment(model, pause=True).on()


def temporary_hooks(model: Any, fns: Hooks) -> Scope:
    """Hooks that run after those already there and are gone afterwards, whatever happens inside."""
    return Attachment(model, lambda: fns).on()


def hook_points(model: Any, names: Iterable[str]) -> dict[str, Any]:
    """Hook points by name; the dictionary is read once, since a bridge rebuilds it at each access.

    Raises: ValueError that names the missing hook point and similar ones.
    """
    names = list(names)
    table = model.hook_dict if names else {}
    points = {}
    for name in names:
        if name not in table:
            near = sorted(n for n in table if n.endswith(name.split(".")[-1]))[:4]
            raise ValueError(f"this model has no hook point {name!r}. Similar: {', '.join(near) or 'none'}.")
        points[name] = table[name]
    return points
