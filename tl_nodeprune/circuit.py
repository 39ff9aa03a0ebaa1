"""A circuit: which nodes stay, as a mapping from hook name to 0/1 mask, and the ablation that it was found under."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from tl_nodeprune.ablation import Ablation, as_ablation
from tl_nodeprune.attachment import Attachment, HookFn, find_attachment, ledger_of, temporary_hooks
from tl_nodeprune.hooks import answer_logits, mask_hooks
from tl_nodeprune.nodes import GateKey, Gates, NodeSpace, combine, count_parameters, settle
from tl_nodeprune.probe import check_ready, find_nodes
from tl_nodeprune.prompts import PromptPairs
from tl_nodeprune.scope import Scope

_FORMAT = "tl_nodeprune.circuit/1"


class Circuit(Mapping[str, Tensor]):
    """A frozen set of nodes. As a Mapping: hook name -> mask, 1 = kept, 0 = pruned, float32, at the hook's own shape.

    Always consistent: no live child under a closed parent, no live parent with nothing live below.
    Leaf nodes are those that do not follow from gates below them: nothing there is gated, or not everything; an MLP is none where its
    neurons or its output dims are gated. `&`, `|`, `~` work on nodes, and like `==` and `iou` look at nodes only; the ablation stays that
    of the left circuit. Circuits over other nodes raise ValueError, but are unequal. `~` keeps exactly the finest nodes that were pruned; a
    gate above something that is not gated (a layer whose MLP is not) stays as it is, and so does what is below a closed one.
    """

    def __init__(self, space: NodeSpace, gates: Gates, ablation: Ablation = Ablation()) -> None:  # noqa: B008 (frozen)
        if set(gates) != set(space.shapes):
            raise ValueError(f"gates are given for {len(gates)} tensors, the nodes have {len(space.shapes)}.")
        for key, gate in gates.items():
            if tuple(gate.shape) != space.shapes[key]:
                raise ValueError(f"gate {key.granularity} of layer {key.layer} is {tuple(gate.shape)}, expected {space.shapes[key]}.")
        self.space, self.ablation = space, ablation.cpu()
        self._live = settle(space, {key: gate.detach().cpu().bool() for key, gate in gates.items()})
        self._masks = {hook: combine(space, hook, self._live).float().contiguous() for hook in space.hooks}

    @classmethod
    def full(cls, space: NodeSpace, ablation: Ablation = Ablation()) -> Circuit:  # noqa: B008
        """Every node kept."""
        return cls(space, {key: torch.ones(shape, dtype=torch.float32) for key, shape in space.shapes.items()}, ablation)

    @classmethod
    def empty(cls, space: NodeSpace, ablation: Ablation = Ablation()) -> Circuit:  # noqa: B008
        """No node kept: the ablated run."""
        return cls(space, {key: torch.zeros(shape, dtype=torch.float32) for key, shape in space.shapes.items()}, ablation)

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

    def live(self, granularity: str, layer: int) -> Tensor:
        """Which nodes of one granularity in one layer are live: bool, shaped as the gate tensor. Raises KeyError where it has no gate."""
        key = GateKey(granularity, layer)
        if key not in self._live:
            raise KeyError(f"{granularity!r} is not gated in layer {layer}; gated are {', '.join(self.space.granularities)} "
                           f"in layers {self.space.layers}.")
        return self._live[key].clone()

    def nodes(self, granularity: str) -> list[tuple[int, ...]]:
        """The live nodes of a granularity as (layer, *index): (9,) an attention block, (9, 6) a head, (9, 6, 13) a dim of it.

        Raises: KeyError for a granularity that is not gated.
        """
        if granularity not in self.space.granularities:
            raise KeyError(f"{granularity!r} is not gated in this circuit; gated are {', '.join(self.space.granularities)}.")
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
        table = pd.DataFrame(0, index=[str(layer) for layer in self.space.layers], columns=list(self.space.granularities))
        for key, live in self._live.items():
            table.loc[str(key.layer), key.granularity] = int(live.sum())
        live_row, of = table.sum(), pd.Series(self.space.totals())
        table.loc["live"], table.loc["of"] = live_row, of
        table.loc["share"] = [f"{a / b:.1%}" for a, b in zip(live_row, of[table.columns], strict=True)]
        return table.rename_axis("layer")

    def __repr__(self) -> str:
        counts = ", ".join(f"{live}/{self.space.totals()[name]} {name}" for name, live in self.count().items())
        return f"Circuit({counts}; ablation={self.ablation.name!r})"

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
        return self._join(other, torch.logical_and)

    def __or__(self, other: Circuit) -> Circuit:
        return self._join(other, torch.logical_or)

    def _join(self, other: Circuit, rule: Callable[[Tensor, Tensor], Tensor]) -> Circuit:
        if not isinstance(other, Circuit):
            return NotImplemented
        self._check_same_nodes(other)
        return Circuit(self.space, {key: rule(live, other._live[key]) for key, live in self._live.items()}, self.ablation)

    def under(self, ablation: str | Ablation) -> Circuit:
        """The same nodes with another stand-in for the pruned ones; "mean" and "optimal" need an Ablation that is fitted."""
        return Circuit(self.space, self._live, as_ablation(ablation))

    def iou(self, other: Circuit) -> float:
        """Intersection over union of the live leaf nodes, 0 to 1; 1 where both are empty."""
        self._check_same_nodes(other)
        pairs = [(self._live[key], other._live[key]) for key in self.space.free()]
        union = sum(int((a | b).sum()) for a, b in pairs)
        return sum(int((a & b).sum()) for a, b in pairs) / union if union else 1.0

    def _check_same_nodes(self, other: Circuit) -> None:
        if self.space.shapes != other.space.shapes:
            raise ValueError("the two circuits are over different nodes: "
                             f"{self.space.granularities} in layers {self.space.layers} and "
                             f"{other.space.granularities} in layers {other.space.layers}, or models of other shapes.")

    def check_fits(self, model: Any) -> None:
        """Raises ValueError where the model lacks nodes of this circuit or has them in another shape; warns where only its name differs."""
        self.space.check_fits(find_nodes(model), "this circuit was found on")

    def fwd_hooks(self, model: Any, prompts: PromptPairs) -> list[tuple[str, HookFn]]:
        """Hooks for `model.run_with_hooks(prompts.clean, fwd_hooks=...)`; closed nodes take their stand-in for these prompts.

        On other prompts of the same shape they are wrong, and can't tell; `applied` can. Where corrupted prompts are missing (the same as
        the clean ones) interchange ablation changes nothing.

        Raises: RuntimeError where masks or a circuit are attached or the model is in training mode with dropout; ValueError where circuit
        or prompts do not fit the model, or constants of the ablation do not fit the prompts.
        """
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

    def save(self, path: str | Path) -> None:
        """Write as safetensors: the gates as uint8, the ablation's constants, the nodes' description. All of it or nothing.

        Raises: OSError where the file cannot be written, FileNotFoundError where its folder does not exist.
        """
        tensors = {f"gate/{key.granularity}/{key.layer}": live.to(torch.uint8) for key, live in self._live.items()}
        tensors |= {f"constant/{hook}": value.contiguous() for hook, value in self.ablation.constants.items()}
        description = asdict(self.space) | {name: _to_json(getattr(self.space, name)) for name in ("shapes", "present")}
        header = {"format": _FORMAT, "ablation": self.ablation.name, "space": json.dumps(description)}
        part = Path(f"{path}.part")
        if not part.parent.is_dir():
            raise FileNotFoundError(f"the folder {str(part.parent)!r} does not exist; make it first.")
        try:
            safetensors.torch.save_file(tensors, part, header)
            os.replace(part, path)
        except safetensors.SafetensorError as error:
            raise OSError(f"{path} cannot be written: {error}") from error
        finally:
            part.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> Circuit:
        """Read what `save` wrote. Raises FileNotFoundError; ValueError for a damaged file or one that is not a circuit."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no file {str(path)!r}.")
        try:
            with safetensors.safe_open(str(path), framework="pt") as file:
                header, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error
        if header.get("format") != _FORMAT:
            raise ValueError(f"{path} is no circuit of this library: its format is {header.get('format')!r}, expected {_FORMAT!r}.")
        try:
            return cls._from_tensors(header, tensors)
        except (KeyError, TypeError, ValueError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error

    @classmethod
    def _from_tensors(cls, header: Mapping[str, str], tensors: Mapping[str, Tensor]) -> Circuit:
        fields = json.loads(header["space"])
        space = NodeSpace(**fields | {name: _from_json(fields[name]) for name in ("shapes", "present")})
        gates = {key: tensors[f"gate/{key.granularity}/{key.layer}"] for key in space.shapes}
        constants = {name.removeprefix("constant/"): value for name, value in tensors.items() if name.startswith("constant/")}
        return cls(space, gates, Ablation(header["ablation"], constants))


def check_circuit(given: object, name: str = "circuit") -> None:
    """Raises TypeError for what is no Circuit."""
    if not isinstance(given, Circuit):
        raise TypeError(f"{name} must be a Circuit, got {type(given).__name__}; of a result it is `result.circuit`.")


def circuit_logits(model: Any, circuit: Circuit, prompts: PromptPairs, *, batch_size: int = 64) -> Tensor:
    """The circuit's logits at the answer positions: [batch d_vocab], float32."""
    logits = []
    for batch in prompts.batches(batch_size):
        with torch.no_grad(), temporary_hooks(model, circuit.hooks_on(model, batch)):
            logits.append(full_logits(model, batch))
    return torch.cat(logits)


def full_logits(model: Any, prompts: PromptPairs) -> Tensor:
    """The model's logits at the answer positions, as it is: [batch d_vocab], float32. One forward, no gradient."""
    assert prompts.answer_positions is not None
    with torch.no_grad():
        return answer_logits(model, prompts.clean, prompts.answer_positions, sliced=False)


def _to_json(shapes: Mapping[GateKey, tuple[int, ...]]) -> list[list[Any]]:
    return [[key.granularity, key.layer, list(shape)] for key, shape in shapes.items()]


def _from_json(rows: list[list[Any]]) -> dict[GateKey, tuple[int, ...]]:
    return {GateKey(granularity, int(layer)): tuple(shape) for granularity, layer, shape in rows}
