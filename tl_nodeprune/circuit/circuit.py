"""A circuit: which nodes stay, as a mapping from hook name to 0/1 mask, and the ablation that it was found under."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tl_nodeprune.circuit import files
from tl_nodeprune.circuit import format as circuit_files
from tl_nodeprune.circuit.about import About
from tl_nodeprune.circuit.live_nodes import LiveNodes
from tl_nodeprune.circuit.view import carried, seen_at
from tl_nodeprune.masks import Ablation, as_ablation
from tl_nodeprune.nodes import (
    Attachment,
    GateKey,
    Gates,
    HookFn,
    NodeSpace,
    Scope,
    check_list,
    check_node,
    check_ready,
    check_types,
    find_attachment,
    find_nodes,
    ledger_of,
    mask_hooks,
    node_name,
)
from tl_nodeprune.prompts import PromptPairs


class Circuit(LiveNodes):
    """A frozen set of nodes. As a Mapping: hook name -> mask, 1 = kept, 0 = pruned, float32, at the hook's own shape.

    Always consistent: no live child under a closed parent, no live parent with nothing live below.
    Leaf nodes are those that do not follow from gates below them: nothing there is gated, or not everything; an MLP is none where its
    neurons or its output dims are gated. `&`, `|`, `-`, `~` work on nodes, and like `==`, `<=`, `<` and `iou` look at nodes only; the
    ablation stays that of the left circuit. `a - b` keeps what is live in a and not in b, `a <= b` says that all of a is live in b.
    Circuits over other nodes raise ValueError, but are unequal; `at` brings both to the same ones. `~` keeps exactly the finest nodes that
    were pruned; a gate above something that is not gated (a layer whose MLP is not) stays as it is, and so does what is below a closed
    one.
    """

    about: About
    """What is known of where it comes from; of circuits made out of others nothing."""

    def __init__(self, space: NodeSpace, gates: Gates, ablation: Ablation = Ablation(), about: About = About()) -> None:  # noqa: B008 (frozen)
        check_types(Circuit.__init__, locals())
        super().__init__(space, gates)
        ablation.check_fits(space)
        self.ablation, self.about = ablation.cpu(), about

    @classmethod
    def full(cls, space: NodeSpace, ablation: Ablation = Ablation()) -> Circuit:  # noqa: B008
        """Every node kept."""
        check_types(Circuit.full, locals())
        return cls(space, {key: torch.ones(shape, dtype=torch.float32) for key, shape in space.shapes.items()}, ablation)

    @classmethod
    def empty(cls, space: NodeSpace, ablation: Ablation = Ablation()) -> Circuit:  # noqa: B008
        """No node kept: the ablated run."""
        check_types(Circuit.empty, locals())
        return cls(space, {key: torch.zeros(shape, dtype=torch.float32) for key, shape in space.shapes.items()}, ablation)

    @classmethod
    def from_nodes(cls, model: Any, nodes: Mapping[str, Sequence[tuple[int, ...]]], ablation: str | Ablation = "interchange") -> Circuit:
        """The circuit that keeps these nodes, and no other of the granularities named: {"head": [(9, 9), (10, 0)], "mlp": [(0,)]}, nodes as
        (layer, *index), as `nodes` gives them. What is of other granularities is not gated.

        Raises: ValueError for nodes that are empty, that the model lacks, or that can't be kept: below one of a granularity named that is
        not listed, or above nothing that is; TypeError for what is no model or no nodes.
        """
        check_types(Circuit.from_nodes, locals())
        if not nodes:
            raise ValueError('nodes is empty; give some of one granularity or more, such as {"head": [(0, 1)]}.')
        space = find_nodes(model).restrict(nodes)
        gates = {key: torch.zeros(shape, dtype=torch.float32) for key, shape in space.shapes.items()}
        for granularity, kept in nodes.items():
            for node in check_list(f"nodes[{granularity!r}]", kept):
                layer, *index = check_node(f"nodes[{granularity!r}]", node)
                gate = gates.get(GateKey(granularity, layer))
                if gate is None or len(index) != gate.ndim or not all(0 <= i < n for i, n in zip(index, gate.shape, strict=True)):
                    there = list(gate.shape) if gate is not None else "none"
                    raise ValueError(f"nodes[{granularity!r}] holds {tuple(node)}, and the model has {there} in that layer; give "
                                     "(layer, *index).")
                gate[tuple(index)] = 1
        circuit = cls(space, gates, as_ablation(ablation))
        for key, gate in gates.items():
            if len(lost := (gate.bool() & ~circuit.live(*key)).nonzero()):
                raise ValueError(f"nodes: {node_name(*key, *lost[0].tolist())} can't be kept, since all above it, or all below, is cut: "
                                 f"{', '.join(nodes)} are named. List what it is a part of and what it consists of, or leave those "
                                 "granularities out.")
        return circuit

    @classmethod
    def from_masks(cls, model: Any, masks: Mapping[str, Tensor], ablation: str | Ablation = "interchange") -> Circuit:
        """The circuit of a dictionary hook name -> mask of 0 and 1, such as `dict(circuit)`; hook points that it lacks are not gated. Nodes
        are those of the mask's shape, [head] for heads; at the hook's own shape the finest there, which `at` turns into others:
        `Circuit.from_masks(model, dict(circuit)).at(circuit.space.granularities) == circuit`.

        Raises: ValueError for masks that are empty, of other values, or of another shape than the model's; TypeError for what is no model
        or no masks.
        """
        check_types(Circuit.from_masks, locals())
        space = find_nodes(model)
        if not masks:
            raise ValueError(f"masks is empty; give a mask at one hook point or more of {', '.join(space.hooks)}.")
        gates = {}
        for hook, mask in masks.items():
            there = {space.shapes[key]: key for key in (space.at(hook) if hook in space.hooks else ())}
            if not isinstance(mask, Tensor) or tuple(mask.shape) not in there:
                given = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
                has = " or ".join(str(list(shape)) for shape in there)
                raise ValueError(f"masks[{hook!r}] is {given}; this model has {f'a mask {has}' if there else 'no node'} there.")
            gates[there[tuple(mask.shape)]] = mask
        return cls(replace(space, shapes={key: space.shapes[key] for key in gates}), gates, as_ablation(ablation))

    def __repr__(self) -> str:
        counts = ", ".join(f"{live}/{self.space.totals()[name]} {name}" for name, live in self.count().items())
        return f"Circuit({counts}; ablation={self.ablation.name!r})"

    def __str__(self) -> str:
        """In a line, then what is known about it."""
        return "\n".join(filter(None, (repr(self), str(self.about))))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Circuit) or set(self._live) != set(other._live):
            return False
        return all(torch.equal(self._live[key], other._live[key]) for key in self._live)

    __hash__ = None  # type: ignore[assignment]

    def __invert__(self) -> Circuit:
        """The complement at leaf level; a gate above things that are not gated themselves stays as it is."""
        leaves = set(self.space.finest())
        gates = {key: ~live if key in leaves else live | self.space.covered(key) for key, live in self._live.items()}
        return Circuit(self.space, gates, self.ablation)

    def __and__(self, other: Circuit) -> Circuit:
        return self._join(other, lambda mine, its, key: mine & its)

    def __or__(self, other: Circuit) -> Circuit:
        return self._join(other, lambda mine, its, key: mine | its)

    def __sub__(self, other: Circuit) -> Circuit:
        leaves = set(self.space.finest())
        return self._join(other, lambda mine, its, key: mine & ~its if key in leaves else mine)

    def _join(self, other: Circuit, rule: Callable[[Tensor, Tensor, GateKey], Tensor]) -> Circuit:
        if not isinstance(other, Circuit):
            return NotImplemented
        self._check_same_nodes(other)
        return Circuit(self.space, {key: rule(live, other._live[key], key) for key, live in self._live.items()}, self.ablation)

    def at(self, granularities: str | Iterable[str], layers: int | Iterable[int] | None = None) -> Circuit:
        """The same circuit over the nodes of other granularities, so that circuits of several can be compared: `a.at("head")`,
        `a.at(("head", "mlp"))`.

        A coarser node is kept where anything live is below it, a finer one where what is above it is kept; where nothing of either is
        gated, all are kept. The masks of a coarser circuit keep more, so it has a KL of its own. Constants of the ablation go with it.
        layers: None: those that have gates here; of others all nodes are kept.

        Raises: ValueError for a granularity or layer that the model lacks, and an ablation with constants that lacks those of a hook point
        where nodes are now cut; `under` gives it another first.
        """
        check_types(Circuit.at, locals())
        space, live = seen_at(self.space, self._live, granularities, layers)
        return Circuit(space, live, carried(self.ablation, space, live))

    def under(self, ablation: str | Ablation) -> Circuit:
        """The same nodes with another stand-in for the pruned ones; "mean" and "optimal" need an Ablation that is fitted."""
        check_types(Circuit.under, locals())
        return Circuit(self.space, self._live, as_ablation(ablation))

    def with_about(self, about: About) -> Circuit:
        """The same circuit, with something else known about it, as `circuit.with_about(replace(circuit.about, task="IOI"))`."""
        check_types(Circuit.with_about, locals())
        same = copy(self)
        same.about = about
        return same

    def check_fits(self, model: Any) -> None:
        """Raises ValueError where the model lacks nodes of this circuit or has them in another shape; warns where only its name differs."""
        check_types(Circuit.check_fits, locals())
        self.space.check_fits(find_nodes(model), "this circuit was found on")

    def fwd_hooks(self, model: Any, prompts: PromptPairs) -> list[tuple[str, HookFn]]:
        """Hooks for `model.run_with_hooks(prompts.clean, fwd_hooks=...)`; closed nodes take their stand-in for these prompts.

        On other prompts of the same shape they are wrong, and can't tell; `applied` can. Where corrupted prompts are missing (the same as
        the clean ones) interchange ablation changes nothing.

        Raises: RuntimeError where masks or a circuit are attached or the model is in training mode with dropout; ValueError where circuit
        or prompts do not fit the model, or constants of the ablation do not fit the prompts.
        """
        check_types(Circuit.fwd_hooks, locals())
        self._check_use(model, prompts)
        return self.hooks_on(model, prompts)

    def hooks_on(self, model: Any, prompts: PromptPairs) -> list[tuple[str, HookFn]]:
        """`fwd_hooks` without its checks, for use in loops."""
        closed = [hook for hook, mask in self._masks.items() if not bool((mask == 1).all())]
        stand_ins = self.ablation.values(model, prompts, closed)
        masks = {hook: self._masks[hook].to(prompts.clean.device) for hook in closed}
        return mask_hooks(closed, masks.__getitem__, stand_ins.__getitem__)

    def applied(self, model: Any, prompts: PromptPairs) -> Scope:
        """Inside, every forward of the model on `prompts.clean` runs the circuit only; afterwards no hook is left.

        Raises: what `fwd_hooks` raises; inside, ValueError for a forward on other prompts, whose stand-ins these would not be.
        """
        check_types(Circuit.applied, locals())
        tokens = (lambda: prompts.clean) if self.ablation.name == "interchange" else None
        return Attachment(model, partial(self.fwd_hooks, model, prompts), owner=self, tokens=tokens).on()

    def _check_use(self, model: Any, prompts: PromptPairs) -> None:
        ledger_of(model).clear()
        if find_attachment(model) is not None:
            raise RuntimeError("node masks or a circuit are attached to this model already; call model.remove_node_masks() "
                               "or leave the other circuit's `with` block first.")
        check_ready(model)
        self.check_fits(model)
        prompts.check_fits(model)

    def save(self, path: str | Path, *, task: str = "", notes: str = "") -> None:
        """Write as safetensors: the gates, the ablation's constants, the nodes' description, what is known about the circuit, and a
        checksum over all of it. All or nothing. task, notes: what it is for, and what else a reader must know, in place of what `about`
        has.

        Raises: OSError where the file cannot be written, FileNotFoundError where its folder does not exist, FileExistsError at a symbolic
        link, a device or a pipe; ValueError for an empty name, or constants that are not finite or do not fit the nodes, or text that is
        too long.
        """
        check_types(Circuit.save, locals())
        about = replace(self.about, task=task or self.about.task, notes=notes or self.about.notes)
        files.write(files.check_target(path), circuit_files.pack(self.space, self._live, self.ablation, about))

    @classmethod
    def load(cls, path: str | Path) -> Circuit:
        """Read what `save` wrote, into memory of its own.

        Raises: FileNotFoundError; OSError where it cannot be read; ValueError for a file that is damaged in any bit or is not a circuit.
        """
        check_types(Circuit.load, locals())
        return cls(*circuit_files.unpack(files.as_path(path)))
