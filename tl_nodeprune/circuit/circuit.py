"""A circuit: which nodes stay, as a mapping from hook name to 0/1 mask, and the ablation that it was found under."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from tl_nodeprune.circuit import files
from tl_nodeprune.circuit import format as circuit_files
from tl_nodeprune.circuit.about import About
from tl_nodeprune.circuit.view import carried, common, seen_at
from tl_nodeprune.masks import Ablation, as_ablation
from tl_nodeprune.nodes import (
    HOOKS,
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
    combine,
    count_parameters,
    find_attachment,
    find_nodes,
    ledger_of,
    mask_hooks,
    settle,
)
from tl_nodeprune.prompts import PromptPairs


class Circuit(Mapping[str, Tensor]):
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
        if set(gates) != set(space.shapes):
            raise ValueError(f"gates are given for {len(gates)} tensors, the nodes have {len(space.shapes)}.")
        for key, gate in gates.items():
            if not isinstance(gate, Tensor):
                raise TypeError(f"gates must be tensors; {key.granularity} of layer {key.layer} is {type(gate).__name__}.")
            if tuple(gate.shape) != space.shapes[key]:
                raise ValueError(f"gates: {key.granularity} of layer {key.layer} is {tuple(gate.shape)}, expected {space.shapes[key]}.")
            if not ((gate == 0) | (gate == 1)).all():
                raise ValueError(f"gates of {key.granularity} of layer {key.layer} hold other values than 0 (pruned) and 1 (kept).")
        self.space, self.ablation, self.about = space, ablation.cpu(), about
        self._live = settle(space, {key: gate.detach().cpu().bool() for key, gate in gates.items()})
        self._masks = {hook: combine(space, hook, self._live).float().contiguous() for hook in space.hooks}

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

        Raises: ValueError for nodes that are empty or that the model lacks; TypeError for what is no model or no nodes.
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
        return cls(space, gates, as_ablation(ablation))

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

    def __getitem__(self, hook: str) -> Tensor:
        if hook not in self._masks:
            raise KeyError(f"{hook!r} is not gated in this circuit; gated are {', '.join(self._masks)}.")
        return self._masks[hook].clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    @property
    def masks(self) -> dict[str, Tensor]:
        """A plain dictionary, hook name -> mask [the hook's shape without batch and pos], yours to change."""
        return {hook: mask.clone() for hook, mask in self._masks.items()}

    def folded(self) -> dict[str, Tensor]:
        """The masks without those of layers, which are folded into the masks of the blocks below: hook name -> mask.

        With these `out = m * clean + (1 - m) * ablated` holds as it stands at every hook point; at hook_resid_post it would be of what the
        block adds. Raises: ValueError where a layer that is pruned has no hook points of its attention and MLP to fold it into.
        """
        masks = {hook: mask for hook, mask in self.masks.items() if not hook.endswith(HOOKS["layer"])}
        for layer in (key for key in self._live if key.granularity == "layer"):
            below = {child.hook: self.space.width(child.hook) for name in ("attn", "mlp")
                     if (child := GateKey(name, layer.layer)) in self.space.present}
            if not below and not self._live[layer]:
                raise ValueError(f"layer {layer.layer} is pruned, and this model has no {HOOKS['attn']} or {HOOKS['mlp']} there.")
            masks |= {hook: masks.get(hook, torch.ones(width)) * self._live[layer] for hook, width in below.items()}
        return masks

    def live(self, granularity: str, layer: int) -> Tensor:
        """Which nodes of one granularity in one layer are live: bool, shaped as the gate tensor. Raises KeyError where it has no gate."""
        check_types(Circuit.live, locals())
        key = GateKey(granularity, layer)
        if key not in self._live:
            raise KeyError(f"granularity {granularity!r} is not gated in layer {layer}; gated are {', '.join(self.space.granularities)} "
                           f"in layers {self.space.layers}.")
        return self._live[key].clone()

    def nodes(self, granularity: str) -> list[tuple[int, ...]]:
        """The live nodes of a granularity as (layer, *index): (9,) an attention block, (9, 6) a head, (9, 6, 13) a dim of it.

        Raises: KeyError for a granularity that is not gated.
        """
        check_types(Circuit.nodes, locals())
        if granularity not in self.space.granularities:
            raise KeyError(f"granularity {granularity!r} is not gated in this circuit; gated are {', '.join(self.space.granularities)}.")
        keys = [key for key in self._live if key.granularity == granularity]
        return [(key.layer, *map(int, row)) for key in sorted(keys, key=lambda k: k.layer) for row in self._live[key].nonzero()]

    def count(self) -> dict[str, int]:
        """How many nodes are live, by granularity."""
        counts = {name: 0 for name in self.space.granularities}
        for key, live in self._live.items():
            counts[key.granularity] += int(live.sum())
        return counts

    @property
    def size(self) -> int:
        """How many leaf nodes are live: those that do not follow from gates below them, as nothing, or not everything, there is gated."""
        return sum(int(self._live[key].sum()) for key in self.space.free())

    @property
    def size_total(self) -> int:
        """How many leaf nodes there are."""
        return self.space.free_total()

    @property
    def sparsity(self) -> float:
        """Share of leaf nodes pruned, 0 to 1."""
        return 1 - self.size / self.size_total

    @property
    def parameters(self) -> int:
        """Weight-matrix entries of attention and MLPs that the live nodes need; see `nodes.count_parameters`."""
        return count_parameters(self.space, self._live)

    @property
    def parameters_total(self) -> int:
        """The same for the full model."""
        return count_parameters(self.space, {key: torch.ones(shape, dtype=torch.bool) for key, shape in self.space.shapes.items()})

    def summary(self) -> pd.DataFrame:
        """Live nodes per layer (rows) and granularity (columns), then the sum, how many there are, and the share live."""
        table = pd.DataFrame(0, index=[str(layer) for layer in self.space.layers], columns=list(self.space.granularities), dtype=object)
        for key, live in self._live.items():
            table.loc[str(key.layer), key.granularity] = int(live.sum())
        live_row, of = table.sum(), pd.Series(self.space.totals())
        table.loc["live"], table.loc["of"] = live_row, of
        table.loc["share"] = [f"{a / b:.1%}" for a, b in zip(live_row, of[table.columns], strict=True)]
        return table.rename_axis("layer")

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

    def __le__(self, other: Circuit) -> bool:
        if not isinstance(other, Circuit):
            return NotImplemented
        self._check_same_nodes(other)
        return all(bool((live <= other._live[key]).all()) for key, live in self._live.items())

    def __lt__(self, other: Circuit) -> bool:
        return self <= other and self != other

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

    def iou(self, other: Circuit) -> float:
        """Intersection over union of the live leaf nodes, 0 to 1; 1 where both are empty."""
        check_types(Circuit.iou, locals())
        self._check_same_nodes(other)
        pairs = [(self._live[key], other._live[key]) for key in self.space.free()]
        union = sum(int((a | b).sum()) for a, b in pairs)
        return sum(int((a & b).sum()) for a, b in pairs) / union if union else 1.0

    def _check_same_nodes(self, other: Circuit) -> None:
        mine, its = self.space, other.space
        if mine.shapes == its.shapes:
            return
        if mine.present != its.present:
            shapes = " and ".join(f"{one.model_name or 'unnamed'} of {one.n_layers} layers, d_model {one.d_model}" for one in (mine, its))
            raise ValueError(f"the two circuits are over different nodes, of models of other shapes: {shapes}; compare circuits of one.")
        level = common(mine, its)
        asked = f"({level[0]!r}" if len(level) == 1 else f"({level}"
        if mine.layers != its.layers:
            asked += f", layers={sorted({*mine.layers, *its.layers})}"
        raise ValueError(f"the two circuits are over different nodes: {', '.join(mine.granularities)} in layers {mine.layers} and "
                         f"{', '.join(its.granularities)} in layers {its.layers}; " + (
                             f"see both at the same ones first, a.at{asked}) and b.at{asked})." if level else
                             "neither tells apart any node of the other's."))

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
