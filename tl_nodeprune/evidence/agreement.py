"""Does a circuit agree with scores of single nodes, and on which nodes does it not?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Bool, Float
from scipy import stats
from torch import Tensor

from tl_nodeprune.circuit import Circuit, Effects, common
from tl_nodeprune.nodes import GateKey, check_types, node_name, spread

_SHOWN, _FLOOR = 8, 1e-3


@dataclass(frozen=True)
class NodeScore:
    """A node and its score. index: within its layer; () a block, (6,) a head or an MLP neuron, (6, 13) a dim of a head."""

    granularity: str
    layer: int
    index: tuple[int, ...]
    score: float

    @property
    def name(self) -> str:
        """As "head 9.6": granularity, layer, index."""
        return node_name(self.granularity, self.layer, *self.index)

    def __str__(self) -> str:
        return f"{self.name} ({self.score:+.3g})"


@dataclass(frozen=True)
class GranularityAgreement:
    """A circuit against the absolute scores of one granularity's nodes.

    rank_correlation: Spearman's rho of |score| and kept (1) or cut (0), -1 to 1.
    precision_at_k: share of the k nodes with the largest |score| that the circuit keeps, k = how many it keeps; nodes that tie for the
        last places count by their average. By chance: n_kept / n_nodes.
    auroc: the chance that a kept node has a larger |score| than a cut one, ties half; .5 by chance.
    kept_without_effect: kept, but no effect of their own: backup nodes, or nodes that work jointly; the least first.
    cut_with_effect: cut, although they have an effect; the largest first.
    reason: why the three figures are NaN; "" where they are not.
    """

    granularity: str
    n_nodes: int
    n_kept: int
    rank_correlation: float
    precision_at_k: float
    auroc: float
    kept_without_effect: tuple[NodeScore, ...]
    cut_with_effect: tuple[NodeScore, ...]
    reason: str = ""


@dataclass(frozen=True, repr=False)
class Agreement:
    """A circuit against scores, granularity by granularity, coarse to fine. scores: what they are. share: what counts as an effect, see
    `agreement`."""

    rows: tuple[GranularityAgreement, ...]
    scores: str
    share: float

    def of(self, granularity: str) -> GranularityAgreement:
        """Raises: KeyError for a granularity that was not compared."""
        check_types(Agreement.of, locals())
        for row in self.rows:
            if row.granularity == granularity:
                return row
        raise KeyError(f"granularity {granularity!r} was not compared; compared were {', '.join(row.granularity for row in self.rows)}.")

    def to_frame(self) -> pd.DataFrame:
        """A row per granularity; of the nodes in disagreement, how many."""
        table = pd.DataFrame([vars(row) for row in self.rows])
        lists = ["kept_without_effect", "cut_with_effect"]
        return table.assign(**{name: table[name].map(len) for name in lists})

    def __repr__(self) -> str:
        lines = [f"A circuit against {self.scores}; an effect is a |score| of {self.share:.0%} of the granularity's largest or more.",
                 self.to_frame().drop(columns="reason").round(3).to_string(index=False)]
        for row in self.rows:
            lines += [f"{row.granularity}: {row.reason}"] if row.reason else []
            lines += _listed("kept without an effect of their own (backup or joint nodes?)", row.kept_without_effect)
            lines += _listed("cut although they have an effect", row.cut_with_effect)
        return "\n".join(lines)


def agreement(circuit: Circuit, scores: Effects | Mapping[str, Tensor], *, share: float = 0.05) -> Agreement:
    """Compare which nodes a circuit keeps with scores of single nodes, by absolute score, at every granularity that both have.

    scores: Effects, or any mapping of the circuit's hook names to scores at the hook's shape (or the gate tensor's); such a mapping
        is about the finest granularity gated at each hook point.
    share: 0 to 1; a node has an effect from this share of its granularity's largest |score| on, but never with less than a thousandth
        of the metric's difference between clean and corrupted (where the scores are Effects).

    A circuit of finer nodes is compared by its coarser view, `circuit.at("head")`.

    Raises: TypeError for what is not a circuit or mapping; ValueError where nothing is in common, the shapes or layers are another
    model's, a score is NaN or inf, or share is not 0 to 1.
    """
    check_types(agreement, locals())
    if not 0 < share <= 1:
        raise ValueError(f"share={share}; it must be above 0 and at most 1 (1: only the largest score is an effect).")
    tables = _of_effects(circuit, scores) if isinstance(scores, Effects) else _of_mapping(circuit, scores)
    if not tables:
        have = ", ".join(scores.granularities if isinstance(scores, Effects) else scores) or "nothing"
        level = common(circuit.space, scores.space) if isinstance(scores, Effects) else ()
        raise ValueError(f"the scores are for {have}, the circuit is over {', '.join(circuit.space.granularities)}: nothing to compare"
                         f"{f'; give circuit.at({list(level)})' if level else ''}.")
    floor = _FLOOR * abs(scores.clean - scores.corrupted) if isinstance(scores, Effects) else 0.0
    what = f"{scores.method} ({scores.direction})" if isinstance(scores, Effects) else "given scores"
    rows = [_compare(name, circuit, tables[name], share, floor) for name in circuit.space.granularities if name in tables]
    return Agreement(tuple(rows), what, share)


Tables = dict[str, dict[GateKey, Tensor]]


def _of_effects(circuit: Circuit, effects: Effects) -> Tables:
    tables: Tables = {}
    for key, shape in circuit.space.shapes.items():
        if key.granularity in effects.granularities:
            scores = effects.gates.get(key)
            if scores is None or tuple(scores.shape) != shape:
                raise ValueError(f"the circuit is of another model than the scores: it has {key.granularity} nodes {list(shape)} in layer "
                                 f"{key.layer}, the scores {'have none there' if scores is None else list(scores.shape)}.")
            tables.setdefault(key.granularity, {})[key] = _finite(scores, key)
    return tables


def _of_mapping(circuit: Circuit, scores: Mapping[str, Tensor]) -> Tables:
    finest = {hook: circuit.space.at(hook)[-1] for hook in circuit if hook in scores}
    tables: Tables = {}
    for hook, key in finest.items():
        tables.setdefault(key.granularity, {})[key] = _finite(_at_gate(circuit, key, scores[hook]), key)
    for key in circuit.space.shapes:
        if key.granularity in tables and key not in tables[key.granularity]:
            raise ValueError(f"the scores have no {key.hook!r}, where the circuit has {key.granularity} nodes; are they of another model?")
    return tables


def _at_gate(circuit: Circuit, key: GateKey, scores: Tensor) -> Tensor:
    """Scores at a hook's shape as one per node."""
    if not isinstance(scores, Tensor):
        raise TypeError(f"scores[{key.hook!r}] must be a tensor, got {type(scores).__name__}.")
    given, shape, width = scores.detach(), circuit.space.shapes[key], circuit.space.width(key.hook)
    if tuple(given.shape) == shape:
        return given
    if tuple(given.shape) != width:
        raise ValueError(f"the scores at {key.hook!r} are {list(given.shape)}, the circuit's mask is {list(width)}; "
                         "are they of another model?")
    one = given.flatten(len(shape))[..., 0]
    if not torch.equal(spread(one, given.ndim).expand(width), given):
        raise ValueError(f"the scores at {key.hook!r} {list(width)} differ within a node, since the circuit gates {key.granularity!r} "
                         f"there; give one score per node, {list(shape)}.")
    return one


def _finite(scores: Tensor, key: GateKey) -> Tensor:
    if not torch.isfinite(scores).all():
        raise ValueError(f"the {key.granularity} scores of layer {key.layer} hold a NaN or inf.")
    return scores.cpu().double()


def _compare(granularity: str, circuit: Circuit, tables: dict[GateKey, Tensor], share: float, floor: float) -> GranularityAgreement:
    keys = sorted(tables, key=lambda key: key.layer)
    scores = torch.cat([tables[key].flatten() for key in keys])
    kept = torch.cat([circuit.live(*key).flatten() for key in keys])
    nodes = [(key.layer, tuple(index)) for key in keys for index in torch.ones(tables[key].shape).nonzero().tolist()]
    size = scores.abs()
    order, effect = size.argsort(stable=True).tolist(), (size >= share * size.max()) & (size > floor)

    def named(chosen: Tensor, ids: list[int]) -> tuple[NodeScore, ...]:
        return tuple(NodeScore(granularity, nodes[i][0], nodes[i][1], float(scores[i])) for i in ids if chosen[i])

    figures, reason = _figures(size, kept)
    return GranularityAgreement(granularity, len(kept), int(kept.sum()), *figures, reason=reason,
                                kept_without_effect=named(kept & ~effect, order), cut_with_effect=named(effect & ~kept, order[::-1]))


def _figures(size: Tensor, kept: Tensor) -> tuple[tuple[float, float, float], str]:
    """Rank correlation, precision at k and AUROC, or NaN and why."""
    n, k = len(kept), int(kept.sum())
    reason = ("the circuit keeps none of these nodes" if k == 0 else "the circuit keeps all of these nodes" if k == n
              else "all |scores| are the same" if bool((size == size[0]).all()) else "")
    if reason:
        return (float("nan"),) * 3, f"{reason}, so there is nothing to rank (NaN)"
    least = size.sort(descending=True).values[k - 1]
    surely, tied = size > least, size == least
    hits = float((kept & surely).sum()) + float((kept & tied).sum()) * (k - int(surely.sum())) / int(tied.sum())
    return (float(stats.spearmanr(size, kept).statistic), hits / k, auroc(size, kept)), ""


def auroc(size: Float[Tensor, "node"], kept: Bool[Tensor, "node"]) -> float:
    """The chance that a kept node is of larger size than a cut one, ties half; there must be both."""
    return float(stats.mannwhitneyu(size[kept], size[~kept]).statistic) / (int(kept.sum()) * int((~kept).sum()))


def _listed(what: str, nodes: tuple[NodeScore, ...]) -> list[str]:
    if not nodes:
        return []
    more = f", and {len(nodes) - _SHOWN} more" if len(nodes) > _SHOWN else ""
    return [f"{nodes[0].granularity}, {what}: {', '.join(map(str, nodes[:_SHOWN]))}{more}"]
