"""Circuits of several tasks side by side: what they share, what chance would share, and what each does on the other's prompts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from tl_nodeprune.circuit import Circuit, evaluate, tells_apart
from tl_nodeprune.nodes import check_model, check_types, node_name
from tl_nodeprune.prompts import PromptPairs

_SHOWN = 12
_COLUMNS = ("node", "granularity", "layer", "index", "kept_by")


@dataclass(frozen=True, eq=False, repr=False)
class Comparison:
    """Circuits side by side, as frames.

    nodes: a row per node that any of them keeps: node, granularity, layer, index, a column per circuit (whether it keeps it), and
        `kept_by`, how many do; those that most keep first.
    pairs: a row per pair of circuits a and b: kept_a, kept_b, shared, iou (intersection over union), of as many nodes of each granularity
        sampled at random for both expected_iou, and p_value, the chance that these share as many or more (hypergeometric, one-sided).
    judged: a row per circuit and prompts: kl (nats), accuracy, exact_match, faithfulness, see `Evaluation`, and full_accuracy, the full
        model's; empty where no prompts were given.
    """

    level: tuple[str, ...]
    nodes: pd.DataFrame
    pairs: pd.DataFrame
    judged: pd.DataFrame

    def __repr__(self) -> str:
        lines = [f"{' and '.join(self.level)} nodes, pair by pair:", self.pairs.to_string(index=False, float_format="{:.3g}".format)]
        names = list(self.nodes.columns[4:-1])
        everywhere, own = self.nodes[self.nodes["kept_by"] == len(names)], self.nodes[self.nodes["kept_by"] == 1]
        lines += [_listed("in all", everywhere["node"]), *(_listed(f"only in {name}", own.loc[own[name], "node"]) for name in names)]
        if len(self.judged):
            lines += ["on each other's prompts:", self.judged.to_string(index=False, float_format="{:.3g}".format)]
        return "\n".join(lines)


def compare(circuits: Mapping[str, Circuit], level: str | Iterable[str] = "head", *, model: Any | None = None,
            prompts: Mapping[str, PromptPairs] | None = None, batch_size: int = 64) -> Comparison:
    """Compare two circuits or more of one model, by name, as `{"ioi": a, "pronoun": b}`: the nodes of a granularity, or several, that they
    share and keep alone, beside chance.

    Circuits may be of different granularities: each is seen at `level`, see `Circuit.at`. With model and prompts, by name as well, each
    circuit runs on all of the prompts, as it is: one that does its own task and no other is specific to it (and one that keeps nearly
    everything does them all). `viz.compare` draws two circuits.

    Raises: ValueError for fewer than two circuits, a level that some circuit does not gate, circuits of other models or layers, model or
    prompts without the other, and what `evaluate` raises; TypeError for what is not a circuit or prompts.
    """
    check_types(compare, locals())
    _check(circuits, Circuit, "circuits")
    names = (level,) if isinstance(level, str) else tuple(level)
    if len(circuits) < 2:
        raise ValueError(f"circuits holds {len(circuits)}; give two or more, as {{'ioi': a, 'pronoun': b}}.")
    if (model is None) != (prompts is None):
        raise ValueError(f"{'prompts' if model is None else 'model'} is given without {'model' if model is None else 'prompts'}; "
                         "to run the circuits both are needed.")
    if taken := set(circuits) & set(_COLUMNS):
        raise ValueError(f"circuits has one named {min(taken)!r}, which is a column of the table of nodes; give it another name.")
    seen = {name: _seen(name, circuit, names) for name, circuit in circuits.items()}
    pairs = pd.DataFrame([_pair(a, b, seen[a], seen[b]) for a, b in combinations(seen, 2)])
    judged = []
    if prompts is not None:
        check_model(model)
        _check(prompts, PromptPairs, "prompts")
        judged = [_judged(model, name, circuits[name], on, prompts[on], batch_size) for name in circuits for on in prompts]
    return Comparison(next(iter(seen.values())).space.granularities, _nodes(seen), pairs, pd.DataFrame(judged))


def _check(given: Mapping[str, Any], kind: type, what: str) -> None:
    for name, one in given.items():
        if not isinstance(name, str) or not isinstance(one, kind):
            raise TypeError(f"{what}[{name!r}] is {type(one).__name__}; give {kind.__name__} by name.")
    if not given:
        raise ValueError(f"{what} is empty; give some by name.")


def _seen(name: str, circuit: Circuit, level: tuple[str, ...]) -> Circuit:
    at = circuit.under("zero").at(level)  # only nodes are compared
    if blurred := [one for one in at.space.granularities if not tells_apart(circuit.space, one)]:
        raise ValueError(f"level={blurred[0]!r}: circuits[{name!r}] is over {', '.join(circuit.space.granularities)} and does not tell "
                         "those nodes apart; give a level that all circuits do.")
    return at


def _nodes(seen: Mapping[str, Circuit]) -> pd.DataFrame:
    kept: dict[str, set[Any]] = {name: {(one, *node) for one in circuit.space.granularities for node in circuit.nodes(one)}
                                 for name, circuit in seen.items()}
    rows = [{"node": node_name(*node), "granularity": node[0], "layer": node[1], "index": tuple(node[2:])}
            | {name: node in nodes for name, nodes in kept.items()} | {"kept_by": sum(node in nodes for nodes in kept.values())}
            for node in sorted(set().union(*kept.values()))]
    table = pd.DataFrame(rows, columns=[*_COLUMNS[:-1], *kept, _COLUMNS[-1]])
    return table.sort_values("kept_by", ascending=False, kind="stable", ignore_index=True)


def _pair(a: str, b: str, one: Circuit, two: Circuit) -> dict[str, Any]:
    both = (one & two).count()  # raises where they are over different nodes
    kept = one.count(), two.count()
    shared, sizes = sum(both.values()), [sum(counts.values()) for counts in kept]
    chances = _shared_by_chance([(total, kept[0][name], kept[1][name]) for name, total in one.space.totals().items()])
    values = np.arange(len(chances))
    union = sum(sizes) - values
    ious = np.divide(values, union, out=np.ones(len(values)), where=union > 0)
    union_now = sum(sizes) - shared
    return {"a": a, "b": b, "kept_a": sizes[0], "kept_b": sizes[1], "shared": shared, "iou": shared / union_now if union_now else 1.0,
            "expected_iou": float(chances @ ious), "p_value": min(float(chances[shared:].sum()), 1.0)}


def _shared_by_chance(sizes: list[tuple[int, int, int]]) -> NDArray[np.float64]:
    """The chances of sharing 0, 1, ... nodes, for two random sets of each granularity. sizes: of these how many there are, and in each."""
    chances = np.ones(1)
    for total, one, two in sizes:
        each = stats.hypergeom.pmf(np.arange(min(one, two) + 1), total, one, two)
        chances = np.convolve(chances, np.trim_zeros(each, "b"))  # far out it underflows to 0, which keeps this short
    return np.pad(chances, (0, sum(min(one, two) for _, one, two in sizes) + 1 - len(chances)))


def _judged(model: Any, name: str, circuit: Circuit, on: str, prompts: PromptPairs, batch_size: int) -> dict[str, Any]:
    found = evaluate(model, circuit, prompts, batch_size=batch_size)
    return {"circuit": name, "prompts": on, "kl": found.kl, "accuracy": found.accuracy, "exact_match": found.exact_match,
            "faithfulness": found.faithfulness, "full_accuracy": found.full.accuracy}


def _listed(what: str, nodes: Iterable[str]) -> str:
    given = list(nodes)
    more = f", and {len(given) - _SHOWN} more" if len(given) > _SHOWN else ""
    return f"{what}: {', '.join(given[:_SHOWN]) or 'none'}{more}"
