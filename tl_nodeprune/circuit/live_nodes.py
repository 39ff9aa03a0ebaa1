"""Which nodes are live: read as masks, as nodes, as counts; and compared with those of another set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pandas as pd
import torch
from torch import Tensor

from tl_nodeprune.circuit.view import common
from tl_nodeprune.nodes import HOOKS, GateKey, Gates, NodeSpace, check_types, combine, count_parameters, settle


class LiveNodes(Mapping[str, Tensor]):
    """A frozen, consistent set of live nodes, as a Mapping: hook name -> mask, 1 = kept, 0 = pruned. What of a `Circuit` runs no model."""

    def __init__(self, space: NodeSpace, gates: Gates) -> None:
        if set(gates) != set(space.shapes):
            raise ValueError(f"gates are given for {len(gates)} tensors, the nodes have {len(space.shapes)}.")
        for key, gate in gates.items():
            if not isinstance(gate, Tensor):
                raise TypeError(f"gates must be tensors; {key.granularity} of layer {key.layer} is {type(gate).__name__}.")
            if tuple(gate.shape) != space.shapes[key]:
                raise ValueError(f"gates: {key.granularity} of layer {key.layer} is {tuple(gate.shape)}, expected {space.shapes[key]}.")
            if not ((gate == 0) | (gate == 1)).all():
                raise ValueError(f"gates of {key.granularity} of layer {key.layer} hold other values than 0 (pruned) and 1 (kept).")
        self.space = space
        self._live = settle(space, {key: gate.detach().cpu().bool() for key, gate in gates.items()})
        self._masks = {hook: combine(space, hook, self._live).float().contiguous() for hook in space.hooks}

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

        With these `out = m * clean + (1 - m) * ablated` holds at every hook point; at hook_resid_post it would be of what the
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
        check_types(LiveNodes.live, locals())
        key = GateKey(granularity, layer)
        if key not in self._live:
            raise KeyError(f"granularity {granularity!r} is not gated in layer {layer}; gated are {', '.join(self.space.granularities)} "
                           f"in layers {self.space.layers}.")
        return self._live[key].clone()

    def nodes(self, granularity: str) -> list[tuple[int, ...]]:
        """The live nodes of a granularity as (layer, *index): (9,) an attention block, (9, 6) a head, (9, 6, 13) a dim of it.

        Raises: KeyError for a granularity that is not gated.
        """
        check_types(LiveNodes.nodes, locals())
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

    def __le__(self, other: LiveNodes) -> bool:
        if not isinstance(other, LiveNodes):
            return NotImplemented
        self._check_same_nodes(other)
        return all(bool((live <= other._live[key]).all()) for key, live in self._live.items())

    def __lt__(self, other: LiveNodes) -> bool:
        return self <= other and self != other

    def iou(self, other: LiveNodes) -> float:
        """Intersection over union of the live leaf nodes, 0 to 1; 1 where both are empty."""
        check_types(LiveNodes.iou, locals())
        self._check_same_nodes(other)
        pairs = [(self._live[key], other._live[key]) for key in self.space.free()]
        union = sum(int((a | b).sum()) for a, b in pairs)
        return sum(int((a & b).sum()) for a, b in pairs) / union if union else 1.0

    def _check_same_nodes(self, other: LiveNodes) -> None:
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
