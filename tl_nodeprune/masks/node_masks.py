"""Trainable node masks on a model: attach, train, read, remove."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from tl_nodeprune.masks.ablation import Ablation, as_ablation
from tl_nodeprune.masks.gates import Gate, HardConcrete
from tl_nodeprune.nodes import (
    Attachment,
    Exit,
    GateKey,
    NodeSpace,
    Scope,
    Scoped,
    check_device,
    check_ready,
    check_types,
    combine,
    device_of,
    find_attachment,
    find_nodes,
    inactive,
    ledger_of,
    mask_hooks,
    spread,
)
from tl_nodeprune.prompts import PromptPairs


class NodeMasks(nn.Module):
    """One learnable gate per node, kept outside the model; `parameters()` are the gates' scores and nothing else.

    Made by `add_node_masks`. While attached every forward of the model uses the masks: their deterministic values, or a draw
    inside `sampling`. They stay until `remove`; `with model.add_node_masks() as masks:` takes them off at the end of the block, however
    it ends. `scores[f"{granularity}_{layer}"]` has the gate tensor's shape; `gate` turns scores into masks.
    """

    def __init__(self, space: NodeSpace, *, ablation: str | Ablation = "interchange", gate: Gate | None = None,
                 device: torch.device | str | None = None) -> None:
        check_types(NodeMasks.__init__, locals())
        if device is not None:
            check_device("device", device)
        super().__init__()
        self.space, self.gate = space, gate or HardConcrete()
        self.ablation = self.asked_ablation = as_ablation(ablation)  # the second stays as asked for, not fitted to any prompts here
        self.ablation.check_fits(space)
        self._hooks = frozenset(space.hooks)
        self.scores = nn.ParameterDict({
            gate_name(key): nn.Parameter(torch.full(shape, self.gate.open_score, device=device, dtype=torch.float32))
            for key, shape in space.shapes.items()
        })
        self._sampling = Scoped[tuple[torch.Generator | None] | None](None)
        self._stand_ins = Scoped[tuple[dict[str, Tensor], Tensor | None] | None](None)  # and the prompts that they are of, if of any
        self._attached: tuple[Any, Attachment] | None = None

    def __enter__(self) -> NodeMasks:
        """Take the masks off at the end of the `with` block. Raises RuntimeError where they are not attached, or entered before."""
        self._block().__enter__()
        return self

    def _block(self) -> Scope:
        return self._attached[1].block if self._attached and self.attached else Scope(lambda token: self.model, lambda token: None)

    __exit__ = Exit(_block)

    def __getstate__(self) -> dict[str, Any]:
        """A copy, or a pickle, is of the gates alone and not attached; the model is not copied with them."""
        return self.__dict__ | {"_attached": None}

    to_circuit: Callable[..., Any]
    set_to: Callable[..., Any]
    prune: Callable[..., Any]
    """Functions of `circuit` and `search` as methods: the package's `__init__` puts them on, with their signatures and docstrings."""

    def score(self, key: GateKey) -> nn.Parameter:
        """The scores of one gate tensor. Raises: KeyError where it is not gated."""
        if not isinstance(key, tuple):
            check_types(NodeMasks.score, locals())
        if key not in self.space.shapes:
            raise KeyError(f"key={key!r} is not gated by these masks; keys are such as {next(iter(self.space.shapes))!r}.")
        return cast(nn.Parameter, self.scores[gate_name(key)])

    def gate_values(self, key: GateKey) -> Tensor:
        """One gate tensor's masks now: deterministic, or a fresh draw inside `sampling`. Raises: KeyError where it is not gated."""
        score = self.score(key)
        sampling = self._sampling.now
        return self.gate.value(score) if sampling is None else self.gate.sample(score, sampling[0])

    def mask(self, hook: str) -> Tensor:
        """A hook point's mask now: the product of its granularities' gates, at the hook's own shape, differentiable.

        Raises: KeyError for a hook point that is not gated.
        """
        if not isinstance(hook, str) or hook not in self._hooks:
            raise KeyError(f"hook={hook!r} is not gated by these masks; gated are {', '.join(self.space.hooks)}.")
        return combine(self.space, hook, {key: self.gate_values(key) for key in self.space.at(hook)})

    def as_dict(self) -> dict[str, Tensor]:
        """The hook-keyed dictionary of masks now, detached."""
        with torch.no_grad():
            return {hook: self.mask(hook).clone() for hook in self.space.hooks}

    def expected_size(self) -> Tensor:
        """Expected number of live leaf nodes: sum over them of P(open) times P(open) of every gate above. Scalar, differentiable."""
        probability = {key: self.gate.probability(self.score(key)) for key in self.space.shapes}
        total = torch.zeros((), device=self.score(next(iter(probability))).device, dtype=torch.float32)
        for key in self.space.free():
            live = probability[key]
            for parent in self.space.ancestors(key):
                live = live * spread(probability[parent], live.ndim)
            total = total + live.sum()
        return total

    def sampling(self, generator: torch.Generator | None = None) -> Scope:
        """Inside, each forward draws its masks at random, one draw shared by batch and positions."""
        check_types(NodeMasks.sampling, locals())
        return self._sampling.at((generator,))

    def paired(self, prompts: PromptPairs) -> Scope:
        """Inside, forwards on `prompts.clean` take their stand-ins from these prompts (for "interchange": one run on the
        corrupted ones, here, without gradient). "mean" and "optimal" are fitted on the first prompts given and stay so.

        Raises: ValueError where the prompts do not fit the model; inside, for "interchange", for a forward on other prompts; RuntimeError
        where the masks are not attached, or the model is in training mode with dropout.
        """
        check_types(NodeMasks.paired, locals())
        check_ready(self.model)
        prompts.check_fits(self.model)
        with self.inactive():
            self.ablation = self.ablation.fit(self.model, prompts, self.space.hooks)
            values = self.ablation.values(self.model, prompts, self.space.hooks)
        return self._stand_ins.at((values, prompts.clean if self.ablation.name == "interchange" else None))

    def standing_in(self, values: dict[str, Tensor]) -> Scope:
        """Inside, closed nodes take these values, by hook name: [batch pos ...] as the forward, or without batch, or without both.

        Raises: ValueError for a hook point that these masks do not gate.
        """
        check_types(NodeMasks.standing_in, locals())
        for hook, value in values.items():
            if hook not in self._hooks or not isinstance(value, Tensor):
                raise ValueError(f"values[{hook!r}] is {type(value).__name__}; give tensors, for some of {', '.join(self.space.hooks)}.")
        return self._stand_ins.at((values, None))

    def inactive(self) -> Scope | nullcontext[None]:
        """Inside, the model runs as if no masks were attached."""
        return inactive(self._attached[0]) if self._attached else nullcontext()

    @property
    def attached(self) -> bool:
        return self._attached is not None and self._attached[1].live and self._attached[1].hooked

    @property
    def model(self) -> Any:
        """The model that the masks are attached to. Raises RuntimeError when they are not."""
        if not self.attached or self._attached is None:
            raise RuntimeError("these masks are not attached to a model (any more); call model.add_node_masks() and use what it returns.")
        return self._attached[0]

    def attach(self, model: Any) -> NodeMasks:
        """Hang the masks on a model and freeze its weights, until `remove`. Raises RuntimeError where masks are attached already."""
        check_types(NodeMasks.attach, locals())
        attachment = self._attachment(model)
        attachment.put_on()
        return attachment.keep(self)

    def on(self, model: Any) -> Scope:
        """The same for the length of a `with` block."""
        check_types(NodeMasks.on, locals())
        return self._attachment(model).on()

    def _attachment(self, model: Any) -> Attachment:
        _check_free(model)
        check_ready(model)
        attachment = Attachment(model, lambda: mask_hooks(self.space.hooks, self._mask_in_forward, self._stand_in), owner=self,
                                tokens=lambda: stand_ins[1] if (stand_ins := self._stand_ins.now) else None, freeze=True)
        self._attached = (model, attachment)
        return attachment

    def remove(self) -> None:
        """Take the masks off; weights get their requires_grad back. Does nothing the second time."""
        if self._attached is not None:
            self._attached[1].remove()
            self._attached = None

    def _mask_in_forward(self, hook: str) -> Tensor:
        mask = self.mask(hook)
        if self._stand_ins.now is None and bool((mask == 1).all()):
            return mask.detach()  # nothing to mix in: an open gate then lets the activation through untouched
        return mask

    def _stand_in(self, hook: str) -> Tensor:
        if (stand_ins := self._stand_ins.now) is not None:
            if hook not in stand_ins[0]:
                raise ValueError(f"{hook} has closed gates, and the values given to `standing_in` have none for it.")
            return stand_ins[0][hook]
        if self.ablation.name == "zero":
            return torch.zeros((), device=self.score(self.space.at(hook)[0]).device)
        if self.ablation.name == "optimal" and self.ablation.fitted:
            return self.ablation.constants[hook]
        raise RuntimeError(
            f"{hook} has closed gates and nothing stands in for them: {self.ablation.name!r} ablation needs the prompts. "
            "Run inside `with masks.paired(prompts):`, or use ablation=\"zero\"."
        )


def add_node_masks(model: Any, granularities: str | Iterable[str] | None = None, layers: int | Iterable[int] | None = None,
                   ablation: str | Ablation = "interchange", *, gate: Gate | None = None) -> NodeMasks:
    """Hang a gate on every node of a HookedTransformer or TransformerBridge, all open: the model's outputs stay bit-identical.

    model: weights frozen while masks are attached.
    granularities: some of "layer", "attn", "mlp", "head", "attn_neuron", "mlp_neuron", "mlp_out"; None: all that the model has.
    layers: numbers of layers; negative ones count from the end; None: all.
    ablation: "interchange", "mean", "zero" or "optimal", see `Ablation`.
    gate: how scores become masks; None: HardConcrete.

    Returns the masks; `remove_node_masks(model)` takes them off, or a block does: `with model.add_node_masks() as masks:`.
    Asked again for the same nodes under the same ablation, as by a cell of a notebook that is run again, it takes the
    earlier masks off, with a warning, and gives new ones.
    Raises: ValueError for a granularity or layer that is unknown or that the model lacks, and for a model without one stack of blocks that
    add to the residual stream, or whose forward fails on three tokens; RuntimeError where other masks or a circuit are attached already,
    another thread is at work on the model, it is in training mode with dropout or gradient checkpointing, or in `torch.inference_mode()`;
    TypeError for what is not a TransformerLens model. Nothing is attached then.
    """
    check_types(add_node_masks, locals())
    ledger_of(model).clear()
    earlier = found.owner if (found := find_attachment(model)) is not None else None
    if not isinstance(earlier, NodeMasks):
        return make_node_masks(model, granularities, layers, ablation, gate=gate).attach(model)
    with earlier.inactive():
        new = _masks_for(model, granularities, layers, ablation, gate)
    if (new.space.shapes, new.ablation.name) == (earlier.space.shapes, earlier.asked_ablation.name):
        earlier.remove()
        warnings.warn("masks over the same nodes were attached to this model already; these new ones take their place.", stacklevel=2)
    return new.attach(model)


def make_node_masks(model: Any, granularities: str | Iterable[str] | None = None, layers: int | Iterable[int] | None = None,
                    ablation: str | Ablation = "interchange", *, gate: Gate | None = None) -> NodeMasks:
    """What `add_node_masks` attaches, not attached. Raises what that raises, and RuntimeError where any masks are attached."""
    _check_free(model)
    return _masks_for(model, granularities, layers, ablation, gate)


def _masks_for(model: Any, granularities: str | Iterable[str] | None, layers: int | Iterable[int] | None, ablation: str | Ablation,
               gate: Gate | None) -> NodeMasks:
    chosen = as_ablation(ablation)
    check_ready(model, gradient=True)
    space = find_nodes(model).restrict(granularities, layers)
    return NodeMasks(space, ablation=chosen, gate=gate, device=device_of(model))


def remove_node_masks(model: Any) -> None:
    """Take the masks of `add_node_masks` off, and what calls that were interrupted have left; no hook of this library is left. Raises
    RuntimeError where there are none."""
    check_types(remove_node_masks, locals())
    attachment, cleared = find_attachment(model), ledger_of(model).clear()
    if attachment is not None and isinstance(attachment.owner, NodeMasks):
        attachment.owner.remove()
    elif attachment is not None or not cleared:
        raise RuntimeError("this model has no node masks to remove; model.add_node_masks() attaches them.")


def masks_off(model: Any) -> Scope:
    """Inside, masks attached to the model do nothing. Raises RuntimeError where a circuit is applied to it, or another thread is at work
    on it."""
    attachment = find_attachment(model)
    if attachment is not None and not isinstance(attachment.owner, NodeMasks):
        raise RuntimeError("a circuit is applied to this model; leave its `with` block first.")
    return inactive(model)


def _check_free(model: Any) -> None:
    ledger_of(model).clear()
    if (attachment := find_attachment(model)) is not None:
        what = "node masks are" if isinstance(attachment.owner, NodeMasks) else "a circuit is"
        raise RuntimeError(f"{what} attached to this model already; call model.remove_node_masks() or leave the circuit's `with` block "
                           "first. Masks of `with model.add_node_masks() as masks:` come off at the end of the block by themselves.")


def gate_name(key: GateKey) -> str:
    """A gate tensor's name in `NodeMasks.scores`."""
    granularity, layer = key
    return f"{granularity}_{layer}"
