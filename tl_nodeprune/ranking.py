"""`rank`: a score for every node, so that the best k of them are a circuit for every k."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Tensor
from tqdm.auto import tqdm

from tl_nodeprune.ablation import Ablation
from tl_nodeprune.budget import Budget, Measured
from tl_nodeprune.checks import check_counts
from tl_nodeprune.circuit import Circuit
from tl_nodeprune.effects import Effects
from tl_nodeprune.hooks import HookFn
from tl_nodeprune.landscape import Landscape
from tl_nodeprune.masks import NodeMasks
from tl_nodeprune.nodes import GateKey, NodeSpace
from tl_nodeprune.objective import LossFn, distance, kl_divergence
from tl_nodeprune.prompts import PromptPairs
from tl_nodeprune.refine import Refinement
from tl_nodeprune.search import Search
from tl_nodeprune.stages import ROUND_COST
from tl_nodeprune.survey import searchable, survey

SIZES: tuple[float, ...] = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Shares of the nodes at which MIB judges scores (arXiv:2504.13151)."""
ROUNDS_SHARE = 3  # one step in so many goes into rounds of refinement


@dataclass(frozen=True, eq=False, repr=False)
class NodeScores(Mapping[str, Tensor]):
    """Scores of the nodes that a search decides on (`NodeSpace.free`: the leaves), the best first.

    As a Mapping: hook name -> scores at the shape of the gate tensor there, [head d_head] or [head] for hook_z, [d_mlp], [d_model], [].
    gates: the same by (granularity, layer), float32 on the CPU. ablation: what stands in for a node that is left out.

    Raises: ValueError where a gate tensor is missing, of another shape, or holds NaN or inf; TypeError where it is no tensor.
    """

    gates: Mapping[GateKey, Tensor]
    space: NodeSpace
    ablation: Ablation = Ablation()

    def __post_init__(self) -> None:
        gates = {}
        for key in self.space.free():
            if key not in self.gates or tuple(self.gates[key].shape) != self.space.shapes[key]:
                given = list(self.gates[key].shape) if key in self.gates else "missing"
                raise ValueError(f"scores of the {key.granularity} nodes of layer {key.layer} are {given}; "
                                 f"expected {list(self.space.shapes[key])}.")
            if not isinstance(self.gates[key], Tensor):
                raise TypeError(f"scores of the {key.granularity} nodes of layer {key.layer} are {type(self.gates[key]).__name__}; "
                                "give a tensor (torch.as_tensor).")
            gates[key] = self.gates[key].detach().float().cpu()
            if not torch.isfinite(gates[key]).all():
                raise ValueError(f"NaN or inf in the scores of the {key.granularity} nodes of layer {key.layer}; "
                                 "give a finite number to each.")
        object.__setattr__(self, "gates", gates)

    def __eq__(self, other: object) -> bool:
        """The same scores for the same nodes."""
        if not isinstance(other, NodeScores) or set(self.gates) != set(other.gates):
            return False
        return all(torch.equal(gate, other.gates[key]) for key, gate in self.gates.items())

    __hash__ = None  # type: ignore[assignment]

    @classmethod
    def from_flat(cls, flat: Tensor, space: NodeSpace, ablation: Ablation = Ablation()) -> NodeScores:  # noqa: B008 (frozen)
        """From one vector [node] over the free gate tensors, in the order of `NodeSpace.free`."""
        sizes = [math.prod(space.shapes[key]) for key in space.free()]
        pieces = zip(space.free(), flat.split(sizes), strict=True)
        return cls({key: piece.view(space.shapes[key]) for key, piece in pieces}, space, ablation)

    @classmethod
    def from_effects(cls, effects: Effects, *, absolute: bool = False, ablation: Ablation = Ablation()) -> NodeScores:  # noqa: B008
        """From activation or attribution patching. What helps ranks first, in either direction; absolute: what matters most, either way."""
        sign = 1 if effects.direction == "denoise" else -1
        gates = {key: effects.gates[key].abs() if absolute else sign * effects.gates[key] for key in effects.space.free()}
        return cls(gates, effects.space, ablation)

    @classmethod
    def from_circuit(cls, circuit: Circuit, within: NodeScores | None = None) -> NodeScores:
        """Kept nodes above all cut ones, each side in the order of `within` (None: as they come)."""
        space, kept = circuit.space, torch.cat([circuit.live(*key).flatten() for key in circuit.space.free()])
        if within is not None and within.space.shapes != space.shapes:
            raise ValueError("the circuit and the scores are over different nodes.")
        order = within.flat if within is not None else torch.zeros(len(kept))
        return cls.from_flat(_ranks(_first(kept, order)), space, circuit.ablation)

    def __getitem__(self, hook: str) -> Tensor:
        found = [gate for key, gate in self.gates.items() if key.hook == hook]
        if not found:
            raise KeyError(f"{hook!r} has no scores; scored are {', '.join(self)}.")
        return found[0].clone()

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(key.hook for key in self.gates))

    def __len__(self) -> int:
        return len({key.hook for key in self.gates})

    @property
    def flat(self) -> Tensor:
        """All scores as one vector [node]."""
        return torch.cat([gate.flatten() for gate in self.gates.values()])

    @property
    def n(self) -> int:
        """How many nodes are scored."""
        return sum(gate.numel() for gate in self.gates.values())

    def top(self, size: float | int) -> Circuit:
        """The circuit of the best nodes: a float is a share, an int a count. Of equal scores the first come first.

        Raises: ValueError for a share outside 0 to 1 or a count outside 0 to n.
        """
        count = self.count(size)
        kept = torch.zeros(self.n)
        kept[self.flat.argsort(descending=True, stable=True)[:count]] = 1
        scores = NodeScores.from_flat(kept, self.space)
        gates = {key: scores.gates.get(key, torch.ones(shape)) for key, shape in self.space.shapes.items()}
        return Circuit(self.space, gates, self.ablation)

    def count(self, size: float | int) -> int:
        """How many nodes a share is: the nearest, at least one."""
        counted = isinstance(size, Integral)
        if isinstance(size, bool) or not 0 <= size <= (self.n if counted else 1):
            raise ValueError(f"size={size}; give a share of 0.0 to 1.0 as a float, or a count of 0 to {self.n} as an int.")
        return int(size) if counted else max(round(size * self.n), 1) if size else 0

    def __repr__(self) -> str:
        counts = ", ".join(f"{sum(g.numel() for k, g in self.gates.items() if k.granularity == name)} {name}"
                           for name in dict.fromkeys(key.granularity for key in self.gates))
        return f"NodeScores({counts}; ablation={self.ablation.name!r})"


def rank(masks: NodeMasks, prompts: PromptPairs, *, loss: LossFn = kl_divergence, sizes: Sequence[float] = SIZES, anchor: float = 0.05,
         steps: int = 60, batch_size: int = 64, step_prompts: int = 128, cache_bytes: int = 2 << 30, seed: int = 0,
         progress: bool = True) -> NodeScores:
    """A score for every leaf node such that the best k of them, for every k, are a circuit of low loss: `1 - (place - 1) / n`.

    The circuit of the size next to `anchor` is searched first, among all nodes. Then every larger size among the nodes around it, and every
    smaller one among those inside it, each by `prune`'s own thresholding at a fixed size, started from the scores of the size before. So
    the circuits are nested. The masks stay as they are.

    loss: fn(circuit_logits, full_logits, prompts) -> [batch], its mean is lowered at each size; KL(full || circuit) as given. For MIB
        see `mib.distance` (CMD) and `mib.shortfall` (CPR). By KL and `mib.distance` pairs are searched on in both directions where `prune`
        does that.
    sizes: shares of the nodes, ascending, the last 1. anchor: share. steps: per size, at most. All else as in `prune`.

    Raises: ValueError for sizes that are not so, a loss that is the same with every node ablated, or "optimal" ablation, whose constants
    differ from size to size; and what `prune` raises.
    """
    _check(masks, sizes, anchor, steps=steps, batch_size=batch_size, step_prompts=step_prompts)
    searchable(masks, prompts, stacklevel=3)
    counts = sorted({max(round(size * masks.space.free_total()), 1) for size in sizes[:-1]})
    first = min(counts, key=lambda count: abs(math.log(count / (anchor * masks.space.free_total()))))
    with masks.inactive(), tqdm(total=len(counts), desc="rank", disable=not progress) as bar:
        landscape = survey(masks, prompts, LowestLoss(loss), both_ways=loss in (kl_divergence, distance), batch_size=batch_size,
                           cache_bytes=cache_bytes).landscape
        _check_varies(landscape)
        climb = _Climb(landscape, bar, steps=steps, step_prompts=step_prompts, generator=torch.Generator().manual_seed(seed))
        climb.run(first, counts)
    return NodeScores.from_flat(_ranks(-climb.place), masks.space, landscape.reference.ablation)


def _check(masks: NodeMasks, sizes: Sequence[float], anchor: float, **counts: int) -> None:
    check_sizes(sizes)
    if not 0 < anchor <= 1:
        raise ValueError(f"anchor={anchor}; give a share of the nodes above 0, up to 1.")
    check_counts(**counts)
    if masks.asked_ablation.name == "optimal":
        raise ValueError('"optimal" ablation learns constants that differ from size to size, so there is no one ranking under it; '
                         'attach the masks with "interchange", "mean" or "zero".')


def _check_varies(landscape: Landscape) -> None:
    """Raises ValueError where ablating every node leaves the loss as it is."""
    rows, device = torch.arange(len(landscape.groups)), landscape.reference.full.device
    full, ablated = (landscape.measure(torch.full((landscape.n,), value, device=device), rows).loss for value in (1.0, 0.0))
    if abs(full - ablated) <= 1e-6 * max(abs(full), abs(ablated)):
        raise ValueError(f"the loss is constant: {full:.4g} for the full model and {ablated:.4g} with every node ablated, so no node is "
                         "better than another. Are these the right corrupted prompts?")


def check_sizes(sizes: Sequence[float]) -> None:
    """Raises ValueError where sizes are not ascending shares above 0 that end at 1."""
    ascending = all(a < b for a, b in zip(sizes, sizes[1:], strict=False))
    if len(sizes) < 2 or not ascending or not sizes[0] > 0 or sizes[-1] != 1:
        raise ValueError(f"sizes={tuple(sizes)}; give two or more shares of the nodes, ascending, above 0, the last one 1.0.")


@dataclass(frozen=True)
class LowestLoss(Budget):
    """No bound: the loss alone is to be low, whatever its sign."""

    def violation(self, measured: Measured) -> float:
        return measured.loss


class _Part(Landscape):
    """A landscape over some of another's nodes; all others stay as in `held` [node] bool."""

    def __init__(self, whole: Landscape, nodes: Tensor, held: Tensor, max_size: int) -> None:
        super().__init__(whole.space, whole.reference, LowestLoss(whole.budget.loss, max_size=max_size), whole.groups)
        self.nodes, self.held, self.n = nodes, held, len(nodes)

    def flat(self, circuit: Circuit) -> Tensor:
        return super().flat(circuit)[self.nodes]

    def whole(self, flat: Tensor) -> Tensor:
        """Gates of these nodes, [node] or [batch node], with all others beside them."""
        held = self.held.to(flat).expand(*flat.shape[:-1], -1)
        return held.index_copy(-1, self.nodes.to(flat.device), flat)

    def _masks(self, flat: Tensor) -> dict[str, Tensor]:
        return super()._masks(self.whole(flat))

    def _closed_blocks(self, flat: Tensor, rows: Tensor) -> list[tuple[str, HookFn]]:
        return super()._closed_blocks(self.whole(flat), rows)


class _Climb:
    """Searches size by size. place: [node], the order of the nodes so far, 0 the best."""

    def __init__(self, landscape: Landscape, bar: tqdm[None], *, steps: int, step_prompts: int, generator: torch.Generator) -> None:
        self.landscape, self.bar, self.steps = landscape, bar, steps
        self.step_prompts, self.generator = step_prompts, generator
        self.rows = torch.arange(len(landscape.groups))
        self.place = torch.arange(landscape.n)

    def run(self, first: int, counts: Sequence[int]) -> None:
        """The first size among all nodes, larger ones around it, smaller ones inside it."""
        self._search(self.place >= 0, 0, first, start=False)
        kept = first
        for count in (count for count in counts if count > first):
            self._search(self.place >= kept, kept, count - kept)
            kept = count
        kept = first
        for count in (count for count in reversed(counts) if count < first):
            self._search(self.place < kept, 0, count)
            kept = count

    def _search(self, among: Tensor, held: int, size: int, *, start: bool = True) -> None:
        """Order some nodes among themselves: first the `size` that do best together, with the `held` best of all nodes beside them."""
        nodes = among.nonzero()[:, 0]
        part = _Part(self.landscape, nodes, self.place < held, size)
        guess = self.landscape.circuit(self.place < held + size, self.landscape.reference.ablation) if start else None
        rounds = self.steps // (ROUNDS_SHARE * ROUND_COST) if part.budget.loss is kl_divergence else 0
        common = {"step_prompts": self.step_prompts, "generator": self.generator, "record": self._record}
        search = Search(part, self.rows, steps=self.steps - rounds * ROUND_COST, start=guess, **common)  # type: ignore[arg-type]
        best = search.run()
        scores = search.scores if best.scores is None else best.scores
        if rounds:
            finish = Refinement(part, self.rows, best, scores, **common)  # type: ignore[arg-type]
            finish.run(rounds, first_step=search.taken)
            best = finish.best
        order = _first(best.kept, scores).argsort(descending=True)
        self.place[nodes[order]] = self.place[nodes].sort().values
        self.bar.update()

    def _record(self, step: int, loss: float, size: int, coefficient: float) -> None:
        self.bar.set_postfix(loss=f"{loss:.4f}", nodes=size)


def _first(kept: Tensor, scores: Tensor) -> Tensor:
    """Keys [node] by which kept nodes come before all others, each side in the order of its scores."""
    return len(kept) * kept - scores.argsort(descending=True, stable=True).argsort()


def _ranks(keys: Tensor) -> Tensor:
    """`1 - place / n`: 1 for the highest key, 1 / n for the lowest."""
    return 1 - keys.argsort(descending=True, stable=True).argsort() / len(keys)
