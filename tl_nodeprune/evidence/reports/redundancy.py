"""Redundancy: units that can do each other's work, so that neither is the truth alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from tl_nodeprune.circuit import Circuit
from tl_nodeprune.evidence.reports.judged import JudgedCircuit
from tl_nodeprune.evidence.reports.minimality import UnitEffects
from tl_nodeprune.evidence.runs import CircuitRuns
from tl_nodeprune.evidence.units import Unit, closed, opened
from tl_nodeprune.nodes import figures

MATTERS = 0.01  # of KL(full || ablated): a rise of the KL below this counts as none
RECOVERED = 0.8  # of what removing a unit costs: what a stand-in must bring back, and by how much it must lower that cost
TOGETHER, PER_UNIT = 4, 4  # units that are named as one stand-in, and stand-ins per unit, at most
PAIRS_AMONG = 16  # kept units between which pairs are tried, at most, those of smallest effect


@dataclass(frozen=True)
class Redundancy:
    """unit: a kept one. others: what can stand in for it: together, or where they are kept too, each by itself. rise: nats, KL of the
    circuit without any of them less KL of the circuit. recovered: the share of that which having one of them (of a stand-in: all of it)
    brings back. kept: whether `others` are in the circuit too, so that any may go, not all."""

    unit: Unit
    others: tuple[Unit, ...]
    recovered: float
    kept: bool
    rise: float

    def __str__(self) -> str:
        others = " with ".join(map(str, self.others))
        if self.kept and len(self.others) > 1:
            names = ", ".join(map(str, (self.unit, *self.others)))
            return (f"any one of {names} suffices, all are kept: without all of them the circuit's KL rises by {self.rise:.3g} nats, with "
                    f"one of them left by {figures((1 - self.recovered) * self.rise)} at most")
        if self.kept:
            return (f"either {self.unit} or {others} suffices, both are kept: without both the circuit's KL rises by {self.rise:.3g} nats, "
                    f"without one of them by {figures((1 - self.recovered) * self.rise)} at most")
        return (f"either {self.unit} or {others} suffices: with {self.unit} out, which costs {self.rise:.3g} nats, {others} "
                f"{'brings' if len(self.others) == 1 else 'bring'} back {self.recovered:.0%} of that")


def redundancies(judged: JudgedCircuit, effects: UnitEffects) -> tuple[list[Redundancy], int, int]:
    """Those found; how many units' stand-ins were looked for; among how many kept units, those of smallest effect, pairs were tried."""
    least, most = MATTERS * float(judged.ablated.kl.mean()), (1 - RECOVERED) * float(judged.ablated.kl.mean())
    rises = dict(zip(effects.units, effects.kl_rise.tolist(), strict=True))
    needed = {unit: rise for unit, rise in rises.items() if rise >= least}
    slight = sorted((unit for unit in rises if rises[unit] <= most), key=lambda unit: rises[unit])[:PAIRS_AMONG]
    found = stand_ins(judged.runs, judged.circuit, judged.kl, needed, judged.units)
    pairs = kept_pairs(judged.runs, judged.circuit, judged.kl, {unit: rises[unit] for unit in slight}, least)
    paired = {unit for pair in pairs for unit in (pair.unit, *pair.others)}
    groups = kept_groups(judged.runs, judged.circuit, judged.kl, {unit: rises[unit] for unit in slight if unit not in paired}, least)
    found += pairs + groups
    return found, len(needed), len(slight)


def stand_ins(runs: CircuitRuns, circuit: Circuit, base: float, rises: Mapping[Unit, float], units: Sequence[Unit]) -> list[Redundancy]:
    """For each kept unit, whole units of the same kind that are cut (or partly so) and make up for it when it is taken out; and with
    them in, it no longer matters (else they would not replace it but do good of their own).

    base: the circuit's KL; rises: what removing each unit adds, above 0. Found by halving: all candidates are opened at once, and a
    half is looked at further only if it brings back enough, so one that works alone but not in company is missed.
    """
    found = _bring_back(runs, circuit, base, rises, units)
    pairs = (one for item in found for one in (opened(circuit, item.others), opened(closed(circuit, [item.unit]), item.others)))
    kl = runs(pairs, total=2 * len(found), desc="both").kl.double().mean(1)
    costs = (kl[1::2] - kl[0::2]).tolist()
    return [item for item, cost in zip(found, costs, strict=True) if cost <= (1 - RECOVERED) * item.rise]


def _bring_back(runs: CircuitRuns, circuit: Circuit, base: float, rises: Mapping[Unit, float], units: Sequence[Unit]) -> list[Redundancy]:
    spare = [unit for unit in units if not unit.whole(circuit)]
    groups = [(unit, tuple(v for v in spare if v.granularity == unit.granularity and v != unit)) for unit in rises]
    groups, found, parents = [group for group in groups if group[1]], [], dict[tuple[Unit, tuple[Unit, ...]], float]()
    while groups:
        circuits = (opened(closed(circuit, [unit]), others) for unit, others in groups)
        kl = runs(circuits, total=len(groups), desc="stand-ins").kl.double().mean(1).tolist()
        shares = {group: 1 - (value - base) / rises[group[0]] for group, value in zip(groups, kl, strict=True)}
        enough = _first_few({group: share for group, share in shares.items() if share >= RECOVERED})
        halved = {(unit, others) for unit, others in parents if not any(u == unit and set(some) < set(others) for u, some in enough)}
        done = {group: parents[group] for group in halved} | {group: share for group, share in enough.items() if len(group[1]) == 1}
        found += [Redundancy(unit, others, share, False, rises[unit]) for (unit, others), share in done.items() if len(others) <= TOGETHER]
        parents = {group: share for group, share in enough.items() if len(group[1]) > 1}
        groups = [(unit, half) for unit, others in parents for half in (others[:len(others) // 2], others[len(others) // 2:])]
    return found


def kept_pairs(runs: CircuitRuns, circuit: Circuit, base: float, rises: Mapping[Unit, float], least: float) -> list[Redundancy]:
    """Pairs of kept units whose removal together adds `least` nats or more to the KL, while each alone adds next to nothing of that."""
    pairs = list(combinations(rises, 2))
    kl = runs((closed(circuit, pair) for pair in pairs), total=len(pairs), desc="pairs").kl.double().mean(1).tolist()
    joint = {pair: value - base for pair, value in zip(pairs, kl, strict=True)}
    found = [Redundancy(one, (other,), 1 - max(rises[one], rises[other], 0) / max(rise, 1e-12), True, rise)
             for (one, other), rise in joint.items() if rise >= least]
    return [item for item in found if item.recovered >= RECOVERED]


def kept_groups(runs: CircuitRuns, circuit: Circuit, base: float, rises: Mapping[Unit, float], least: float) -> list[Redundancy]:
    """Three or more kept units of which any one suffices: all of them out adds `least` nats or more to the KL, and with any one of them
    back next to nothing of that. Found by taking units out one after the other, those of smallest effect first, until the KL jumps."""
    left, found = sorted(rises, key=lambda unit: rises[unit]), []

    def joint(groups: Sequence[Sequence[Unit]]) -> list[float]:
        kl = runs((closed(circuit, group) for group in groups), total=len(groups), desc="groups").kl.double().mean(1)
        return (kl - base).tolist()

    while len(left) > 2:
        costs = [0.0, *joint([left[:i] for i in range(1, len(left) + 1)])]
        jump = next((i for i in range(3, len(costs)) if costs[i] >= least and costs[i - 1] <= (1 - RECOVERED) * costs[i]), None)
        if jump is None:
            break
        group = left[:jump]
        for unit in left[:jump - 1]:  # those without which all the others still do the harm have no part in it
            fewer = [other for other in group if other != unit]
            if len(fewer) > 2 and joint([fewer])[0] >= RECOVERED * costs[jump]:
                group = fewer
        rise, *without = joint([group, *([other for other in group if other != unit] for unit in group)])
        if rise >= least and max(without) <= (1 - RECOVERED) * rise:
            found.append(Redundancy(group[0], tuple(group[1:]), 1 - max(*without, 0.0) / rise, True, rise))
        left = [unit for unit in left if unit not in group]
    return found


def _first_few(shares: dict[tuple[Unit, tuple[Unit, ...]], float]) -> dict[tuple[Unit, tuple[Unit, ...]], float]:
    """For each unit the groups of largest share, at most PER_UNIT."""
    chosen: dict[tuple[Unit, tuple[Unit, ...]], float] = {}
    for group, share in sorted(shares.items(), key=lambda item: -item[1]):
        if sum(unit == group[0] for unit, _ in chosen) < PER_UNIT:
            chosen[group] = share
    return chosen
