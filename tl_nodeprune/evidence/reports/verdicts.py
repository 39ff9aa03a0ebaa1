"""What was found about a circuit: the numbers of a report, each in words, and whether it speaks for the circuit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import pandas as pd

from tl_nodeprune.circuit import Circuit, Evaluation
from tl_nodeprune.evidence.hypotheses import HypothesisTest
from tl_nodeprune.evidence.reports.completeness import Completeness
from tl_nodeprune.evidence.reports.random_circuits import RandomDraws
from tl_nodeprune.evidence.reports.redundancy import MATTERS, Redundancy
from tl_nodeprune.nodes import figures
from tl_nodeprune.prompts import FEWEST_PROMPTS, TASK_LEVEL

LEFT = 0.2
"""Of the task's effect on the logit difference: more must not be left without the circuit, nor lie between model and circuit on average."""
MARKS = {True: "yes", False: "no", None: "-"}
NAMED = 5  # redundancies that a sentence names


@dataclass(frozen=True)
class Settings:
    """What a report holds for. size: live leaf nodes of size_total. held_out: whether the prompts judged on were given as held out from the
    search. units: "block" or "node"; units_tried of units_kept were taken out one at a time."""

    model: str
    ablation: str
    granularities: tuple[str, ...]
    layers: tuple[int, ...]
    size: int
    size_total: int
    n_prompts: int
    held_out: bool
    units: str
    units_tried: int
    units_kept: int
    n_random: int
    n_subsets: int
    alpha: float
    seed: int

    def __str__(self) -> str:
        seen = "held out from the search" if self.held_out else "none given as held out"
        return (f"a circuit of {self.size:,} of {self.size_total:,} leaf nodes ({', '.join(self.granularities)}; layers "
                f"{', '.join(map(str, self.layers))}) in {self.model or 'an unnamed model'}; {self.ablation} ablation, nodes cut at all "
                f"positions, outputs read at the answer positions; {self.n_prompts} prompts, {seen}; {self.units_tried} of "
                f"{self.units_kept} kept units ({self.units}) tried, {self.n_random} random draws, {self.n_subsets} subsets, "
                f"alpha {self.alpha:g}, seed {self.seed}.")


@dataclass(frozen=True, eq=False)
class Findings:
    """The numbers of a report, not yet judged.

    circuit: the one judged. settings: what all of it holds for. evaluation: on the prompts judged on; searched: on those of the search,
    where others were held out. intervals: 95 %, for the means of the evaluation, by name; NaN for fewer than 10 prompts. task_p: see
    `Preference.p_value`, NaN where there are no corrupted prompts. ablations: the circuit judged under each ablation. effects: a row per
    unit tried, with what its removal does (see `UnitEffects`) and its p-value of `hypotheses.minimality`. redundancies: units that
    can do each other's work; stand_ins_sought, pairs_among: for, and among, how many units they were looked for. notes: what else to know.
    """

    circuit: Circuit = field(repr=False)
    settings: Settings
    evaluation: Evaluation
    searched: Evaluation | None
    intervals: Mapping[str, tuple[float, float]] = field(repr=False)
    task_p: float
    completeness: Completeness
    null: RandomDraws
    equivalence: HypothesisTest
    independence: HypothesisTest
    minimality: HypothesisTest
    ablations: pd.DataFrame
    effects: pd.DataFrame
    redundancies: tuple[Redundancy, ...]
    stand_ins_sought: int
    pairs_among: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Verdict:
    """name, a sentence that says what was found, and whether that speaks for the circuit: None where nothing was or could be decided."""

    name: str
    passed: bool | None
    sentence: str

    def __str__(self) -> str:
        return f"[{MARKS[self.passed]:^3}] {self.name}: {self.sentence}"


def verdicts_of(report: Findings) -> tuple[Verdict, ...]:
    """All verdicts, the task first. Where the full model does not do it, or on too few prompts, none of the others speaks for a circuit or
    against it."""
    tests = [Verdict(test.name, test.passed, test.sentence) for test in (report.equivalence, report.independence, report.minimality)]
    task, others = _task(report), [_faithfulness(report), _completeness(report), _random_circuits(report), *tests, _redundancy(report),
                                   _ablations(report)]
    few = f"fewer than {FEWEST_PROMPTS} prompts, so no claim" if report.settings.n_prompts < FEWEST_PROMPTS else ""
    if why := "no task here, so no claim" if task.passed is False else few:
        others = [replace(one, passed=None, sentence=f"({why}) {one.sentence}") for one in others]
    return (task, *others)


def _task(report: Findings) -> Verdict:
    n, p = report.settings.n_prompts, report.task_p
    if math.isnan(p):
        return Verdict("task", None, "Not tested: corrupted prompts are the same as the clean ones. The full model prefers the answer to "
                       f"the wrong one on {report.evaluation.full.accuracy:.0%} of {n} prompts.")
    if n < FEWEST_PROMPTS:
        return Verdict("task", None, f"Not tested: whether the full model does the task needs {FEWEST_PROMPTS} prompts or more; got {n}.")
    tail = f"the answer more on clean than on corrupted prompts (signed-rank test on {n} pairs, p = {figures(p)})"
    if p <= TASK_LEVEL:
        return Verdict("task", True, f"The full model prefers {tail}.")
    return Verdict("task", False, f"The full model was not found to prefer {tail}. Are answers and prompts in the same order? No circuit "
                   "of a task can be claimed; what follows is about the model's output alone.")


def _faithfulness(report: Findings) -> Verdict:
    found = report.evaluation

    def within(name: str, form: str = ".3g") -> str:
        low, high = report.intervals[name]
        return "" if math.isnan(low) else f" ({low:{form}} to {high:{form}})"

    scale = " (95 % intervals over prompts)" if within("kl") else " (no intervals: they need 10 prompts or more)"
    return Verdict("faithfulness", None, (
        f"KL to the full model {found.kl:.3g}{within('kl')} nats, with every node ablated {found.ablated.kl:.3g}; logit difference "
        f"{found.logit_diff:.3g}{within('logit_diff')} of {found.full.logit_diff:.3g}, a faithfulness of {found.faithfulness:.3g}"
        f"{within('faithfulness')}; accuracy {found.accuracy:.0%}{within('accuracy', '.0%')}, the full model's "
        f"{found.full.accuracy:.0%}{scale}."))


def _completeness(report: Findings) -> Verdict:
    found = report.completeness
    known = not (math.isnan(found.left) or math.isnan(found.gap_share))
    parts = "no part of it could be" if not len(found.gaps) else (
        f"with random parts of it knocked out of both, model and circuit differ by {float(found.gaps.mean()):.3g} logits on average, "
        f"{_percent(found.gap_share)} of the task's effect, and by {float(found.gaps.max()):.3g} at most")
    return Verdict("completeness", found.left <= LEFT and found.gap_share <= LEFT if known else None, (
        f"With the circuit knocked out, {_percent(found.left)} of the task's effect is left (accuracy {found.complement.accuracy:.0%}); "
        f"{parts}. At most {LEFT:.0%} passes, for both."))


def _percent(share: float) -> str:
    return "an unknown share" if math.isnan(share) else f"{round(100 * share)}%"  # an int: no -0%


def _random_circuits(report: Findings) -> Verdict:
    null, alpha, name = report.null, report.settings.alpha, "random circuits"
    where = "in all layers together" if null.over_layers else "in each layer"
    if null.possible < 2:
        return Verdict(name, None, f"Not tested: no other circuit has as many nodes of each kind {where}.")
    draws, low = len(null.kl), null.p_value <= alpha
    tail = (f"of {draws} random circuits with as many nodes of each kind {where} (KL {null.median:.3g} nats in the median, "
            f"{float(null.kl.min()):.3g} at the lowest; p = {figures(null.p_value)}, the chance that one of them is as low)")
    floor = max(1 / null.possible, 1 / (draws + 1))
    if floor > alpha:
        few = f"{null.possible:.0f} such circuits exist" if 1 / null.possible == floor else f"{draws} were drawn"
        return Verdict(name, None, f"Cannot be told: only {few}, so p cannot be below {figures(floor)}; {tail}.")
    return Verdict(name, low, f"Its KL is {'lower than that of nearly all' if low else 'not clearly lower than those'} {tail}.")


def _redundancy(report: Findings) -> Verdict:
    found = report.redundancies
    if found:
        more = f"; and {len(found) - NAMED} more" if len(found) > NAMED else ""
        listed = "; ".join(map(str, found[:NAMED])) + more
        return Verdict("redundancy", False, f"{listed[0].upper()}{listed[1:]}. So the circuit is one of several that do the same.")
    if not report.stand_ins_sought and report.pairs_among < 2:
        return Verdict("redundancy", None, "Not looked for: no unit tried has an effect of its own, and there is no pair of them.")
    if not report.stand_ins_sought:
        return Verdict("redundancy", None, (
            f"Cannot be told: no unit tried costs {MATTERS:.0%} of the ablated model's KL when it alone is removed, and "
            f"among the {report.pairs_among} kept units of smallest effect none were found of which any one suffices."))
    pairs = "" if report.pairs_among < 2 else (
        f" No two or more of the {report.pairs_among} kept units of smallest effect do each other's work.")
    return Verdict("redundancy", True, (
        f"For none of the {report.stand_ins_sought} units that cost {MATTERS:.0%} or more of the ablated model's KL when removed was a "
        f"stand-in of the same kind found outside of the circuit.{pairs} Stand-ins of another kind, or of more than a few units, were not "
        "looked for."))


def _ablations(report: Findings) -> Verdict:
    table = report.ablations
    each = "; ".join(f"{name}: faithfulness {row['faithfulness']:.3g}, KL {row['kl']:.3g} nats" for name, row in table.iterrows())
    return Verdict("ablations", None, f"Found under {report.settings.ablation}, judged under {each}.")
