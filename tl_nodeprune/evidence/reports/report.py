"""`report`: what speaks for a circuit and what against it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy import stats

from tl_nodeprune.circuit import Circuit, evaluate
from tl_nodeprune.evidence.hypotheses import HypothesisTest, equivalence, independence, minimality
from tl_nodeprune.evidence.reports.completeness import completeness
from tl_nodeprune.evidence.reports.document import Report
from tl_nodeprune.evidence.reports.judged import JudgedCircuit
from tl_nodeprune.evidence.reports.minimality import UnitEffects, random_effects, unit_effects
from tl_nodeprune.evidence.reports.random_circuits import random_circuits
from tl_nodeprune.evidence.reports.redundancy import redundancies
from tl_nodeprune.evidence.reports.verdicts import Settings
from tl_nodeprune.evidence.runs import CircuitRuns
from tl_nodeprune.evidence.units import units_of
from tl_nodeprune.masks import ABLATIONS, Ablation, masks_off, optimal_constants
from tl_nodeprune.nodes import check_counts, check_level, check_ready, check_seed, check_types, figures, model_name
from tl_nodeprune.prompts import PromptPairs, preference

FEWEST_FOR_INTERVALS = 10


def report(
    model: Any, circuit: Circuit, prompts: PromptPairs, *, held_out: PromptPairs | None = None, units: str = "block", n_random: int = 100,
    n_subsets: int = 20, max_units: int = 64, alpha: float = 0.05, seed: int = 0, batch_size: int = 64, progress: bool = True,
) -> Report:
    """What a circuit is worth, under the ablation it was found under: faithfulness with intervals, completeness, size-matched random
    circuits, other ablations, the tests of Shi et al. 2024 (see `hypotheses`), and redundancy. Masks that are attached are left out.

    model: the model that the circuit is of.
    circuit: the circuit to judge.
    prompts: the pairs that were searched on; judged on too where `held_out` is not given.
    held_out: pairs that the search has not seen. Then these are judged on, and `prompts` are evaluated beside them. Of pairs with the
        same clean prompt the first is judged on: repeated ones would make every test and interval too sure.
    units: what is removed one at a time: "block" (heads, MLP blocks) or "node" (single leaf nodes), see `units_of`.
    n_random: random circuits, and random units that kept ones are compared with.
    n_subsets: random subsets for completeness.
    max_units: kept units that are tried at most, sampled at random above that.
    alpha: level of the tests.
    seed: the same seed gives the same report.
    batch_size: rows (circuit and prompt) per forward.
    progress: whether to show a bar.

    Cost: about 3 * n_random + 2 * n_subsets + 2 * (units tried) circuits, and up to 120 for pairs of units, each a forward row per prompt;
    more where units turn out to be redundant. Where prompts are too few for a test its values are NaN; its verdict says how many it takes.

    Raises: ValueError where circuit or prompts do not fit the model, an ablation was not fitted, corrupted prompts are missing where
    the ablation needs them (all the same as the clean ones), ablating all nodes changes nothing (a constant metric), or a number is out
    of range; TypeError for what is not a Circuit or PromptPairs; RuntimeError where a circuit is applied or the model is in training mode
    with dropout; FloatingPointError for NaN or inf logits.
    """
    check_types(report, locals())
    judged_on = prompts if held_out is None else held_out
    repeated = len(judged_on) - len(judged_on := judged_on.without_repeats())
    for given in (prompts, judged_on):
        given.check_corrupted(circuit.ablation.name)
    check_counts(n_random=n_random, n_subsets=n_subsets, max_units=max_units, batch_size=batch_size)
    check_level(alpha=alpha)
    check_seed(seed)
    every_unit = units_of(circuit.space, units)
    with masks_off(model):
        _check_fits(model, circuit, {"prompts": prompts, "held_out": judged_on})
        runs = CircuitRuns(model, judged_on, circuit.space, circuit.ablation, batch_size=batch_size, progress=progress)
        judged = JudgedCircuit(runs, circuit, every_unit, max_units=max_units, generator=torch.Generator().manual_seed(int(seed)))
        task, effects = preference(model, judged_on, batch_size), unit_effects(judged)
        tests, p_values = _tests(judged, effects, n_random, alpha, seed)
        found, looked_for, paired = redundancies(judged, effects)
        evaluation = evaluate(model, circuit, judged_on, batch_size=batch_size)
        ablations, left_out = _under_each_ablation(model, circuit, prompts, judged_on, batch_size)
        return Report(
            circuit=circuit,
            settings=Settings(circuit.space.model_name, circuit.ablation.name, circuit.space.granularities, circuit.space.layers,
                              circuit.size, circuit.size_total, len(judged_on), held_out is not None, units, len(judged.tried),
                              len(judged.kept), n_random, n_subsets, alpha, seed),
            evaluation=evaluation, searched=None if held_out is None else evaluate(model, circuit, prompts, batch_size=batch_size),
            intervals=_intervals(judged, seed), task_p=task.p_value, completeness=completeness(judged, n_subsets),
            null=random_circuits(judged, n_random), **tests, ablations=ablations, effects=_frame(effects, p_values),
            redundancies=tuple(found), stand_ins_sought=looked_for, pairs_among=paired,
            notes=(*left_out, *_notes(model, circuit, prompts, judged_on, repeated, held_out is not None)),
        )


def _tests(judged: JudgedCircuit, effects: UnitEffects, n_random: int, alpha: float, seed: int
           ) -> tuple[dict[str, HypothesisTest], NDArray[np.float64]]:
    """The tests by name, and each unit's p-value of minimality."""
    scores = {name: getattr(judged, name).logit_diff[0] for name in ("itself", "full", "ablated", "complement")}
    p_values = np.full(len(effects.units), np.nan)

    def of_units() -> HypothesisTest:
        if not judged.spare:
            raise ValueError("every unit is kept whole, so there is no random one to compare with.")
        reference, names = random_effects(judged, n_random), [str(unit) for unit in effects.units]
        test, p_values[:] = minimality(effects.score_change, reference, alpha=alpha, names=names)
        return test

    def equal() -> HypothesisTest:
        return equivalence(scores["itself"], scores["full"], alpha=alpha, ties=judged.runs.resolution)

    def knocked_out(name: str) -> HypothesisTest:
        return _made("independence", lambda: independence(scores[name], scores["full"], alpha=alpha, seed=seed))

    apart = knocked_out("complement")
    if apart.passed is False and (nothing := knocked_out("ablated")).passed is False:
        why = ("But so do the scores with every node ablated "
               f"(p = {figures(nothing.p_value)}): what stands in for nodes tells of the task itself, and this test can decide nothing.")
        apart = replace(apart, passed=None, sentence=f"{apart.sentence} {why}")
    return {"equivalence": _made("equivalence", equal), "independence": apart, "minimality": _made("minimality", of_units)}, p_values


def _made(name: str, test: Callable[[], HypothesisTest]) -> HypothesisTest:
    """A test, or why it could not be made."""
    try:
        return test()
    except ValueError as error:
        return HypothesisTest.not_made(name, str(error))


def _frame(effects: UnitEffects, p_values: NDArray[np.float64]) -> pd.DataFrame:
    table = pd.DataFrame({"kl_rise": effects.kl_rise.tolist(), "score_change": effects.score_change.tolist(), "p_value": p_values},
                         index=pd.Index(list(map(str, effects.units)), name="unit"))
    return table.sort_values("kl_rise", ascending=False)


def _under_each_ablation(model: Any, circuit: Circuit, prompts: PromptPairs, judged_on: PromptPairs, batch_size: int
                         ) -> tuple[pd.DataFrame, list[str]]:
    """A row per ablation with the circuit's metrics under it, and which were left out, why. Means and constants are those of the search's
    prompts."""
    rows, left_out = {}, []
    for name in ABLATIONS:
        ablation = circuit.ablation if name == circuit.ablation.name else Ablation(name)
        if name == "interchange" and not judged_on.has_corrupted:
            left_out.append("Interchange ablation is left out: all corrupted prompts are the same as the clean ones.")
        elif name == "mean" and not ablation.fitted and judged_on.reach > prompts.reach:
            left_out.append("Mean ablation is left out: the held-out prompts are longer than those of the search, whose means it takes.")
        else:
            if name == "optimal" and not ablation.fitted:
                fitted = optimal_constants(model, circuit.masks, prompts, batch_size=batch_size)
            else:
                fitted = ablation.fit(model, prompts, circuit.space.hooks, batch_size=batch_size)
            found = evaluate(model, circuit.under(fitted), judged_on, batch_size=batch_size)
            rows[name] = found.to_frame().loc["circuit"].to_dict() | {"found_under": name == circuit.ablation.name}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("ablation"), left_out


def _intervals(judged: JudgedCircuit, seed: int) -> dict[str, tuple[float, float]]:
    """95 % intervals over prompts: `bootstrap`, but Wilson's for shares, which a bootstrap gives no width at 0 and 1."""
    one = judged.itself
    n = one.logit_diff.shape[1]
    if n < FEWEST_FOR_INTERVALS:
        return dict.fromkeys(("kl", "accuracy", "logit_diff", "exact_match", "faithfulness"), (math.nan, math.nan))
    circuit, full, ablated = (scores.logit_diff[0].double().numpy() for scores in (one, judged.full, judged.ablated))

    def faithfulness(c: NDArray[Any], f: NDArray[Any], a: NDArray[Any], axis: int = -1) -> NDArray[Any]:
        with np.errstate(all="ignore"):
            return (c.mean(axis) - a.mean(axis)) / (f.mean(axis) - a.mean(axis))  # type: ignore[no-any-return]

    def share(hits: torch.Tensor) -> tuple[float, float]:
        found = stats.binomtest(int(hits.sum()), n).proportion_ci(method="wilson")
        return float(found.low), float(found.high)

    return {"kl": bootstrap(np.mean, one.kl[0].double().numpy(), seed=seed), "accuracy": share(one.logit_diff[0] > 0),
            "logit_diff": bootstrap(np.mean, circuit, seed=seed), "exact_match": share(one.agrees[0]),
            "faithfulness": bootstrap(faithfulness, circuit, full, ablated, seed=seed) if judged.share(0) == 0 else (math.nan, math.nan)}


def bootstrap(statistic: Any, *data: NDArray[Any], seed: int) -> tuple[float, float]:
    """95 % interval of a statistic of paired samples: bias-corrected and accelerated, of percentiles where all values are the same."""
    def interval(method: str) -> tuple[float, float]:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore", stats.DegenerateDataWarning)
            found = stats.bootstrap(data, statistic, paired=True, vectorized=True, method=method, n_resamples=2000, axis=-1,
                                    random_state=np.random.default_rng(seed)).confidence_interval
        return float(found.low), float(found.high)

    corrected = interval("BCa")
    return interval("percentile") if any(map(math.isnan, corrected)) else corrected


def _check_fits(model: Any, circuit: Circuit, given: dict[str, PromptPairs]) -> None:
    check_ready(model, gradient=True)
    circuit.check_fits(model)
    for name, prompts in given.items():
        prompts.check_fits(model, name)


def _notes(model: Any, circuit: Circuit, prompts: PromptPairs, judged_on: PromptPairs, repeated: int, held_out: bool) -> list[str]:
    other = circuit.space.other_name(model_name(model))
    notes = [f"The circuit was found on {other}."] if other else []
    if repeated:
        notes.append(f"{repeated} pairs are left out, since the clean prompt of each is there in another pair already.")
    if same := judged_on.n_same if circuit.ablation.name == "interchange" else 0:
        notes.append(f"{same} of the {len(judged_on)} corrupted prompts are the same as the clean ones, so that nothing is ablated there.")
    if not held_out:
        notes.append("No held-out prompts were given: if the circuit was searched on these, all that is good here is too good.")
    else:
        seen = {tuple(row) for row in prompts.clean.tolist()}
        if again := sum(tuple(row) in seen for row in judged_on.clean.tolist()):
            notes.append(f"{again} of the {len(judged_on)} held-out prompts are among those of the search as well.")
    return notes
