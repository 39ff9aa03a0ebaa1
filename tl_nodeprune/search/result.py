"""What a search found, and the circuits of other budgets from the same run."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import pandas as pd
import torch

from tl_nodeprune.circuit import Circuit, NodeScores, figure, leaves_of, set_to, versions
from tl_nodeprune.masks import NodeMasks, kl_divergence
from tl_nodeprune.nodes import Figured, check_counts, check_types, figures, peak_memory
from tl_nodeprune.prompts import FEWEST_PROMPTS, TASK_LEVEL, PromptPairs
from tl_nodeprune.search.budget import Budget, budget_of
from tl_nodeprune.search.cut import smallest
from tl_nodeprune.search.held_out import ENOUGH, HeldOut
from tl_nodeprune.search.run import Run, Settings, going, searchable


@dataclass(frozen=True, repr=False)
class Step(Figured):
    """One step of a search. kl: nats (or the loss given), mean over the step's prompts, each under a size of its own; size: their mean;
    coefficient: the temperature of the soft masks; lam for PaperObjective."""

    step: int
    kl: float
    size: int
    coefficient: float


@dataclass(frozen=True, repr=False)
class PruneResult(Figured):
    """What a search found.

    kl: the binary circuit's mean loss on prompts that were never searched on, `held_out` (nats for KL); interval: 90 %, by bootstrap over
        the different ones; accuracy: share of them with the answer preferred. search_kl: on the prompts searched on, `searched`.
    converged: the budget holds on the prompts held out, with the interval's upper end at most 1.25 times it, and the full model does the
        task; False where it does not; None, untested, where the prompts are too few to tell. Always True for a size and an objective.
    p_value: one-sided Wilcoxon signed-rank test over the different clean prompts, that the model prefers the answer more on clean than on
        corrupted ones; NaN without corrupted ones, or for an objective.
    frontier: every size of the same run: nodes, share, search_kl, and on the prompts held out kl, low, high, accuracy; a row per size that
        no smaller one does better than. `at` gives the circuit of another budget.
    minimal: exact tests found no head, block or node that can be left out at this loss; `tested` were run, `ruled_out` raised the loss of
        the first prompts by far more than there was room for. False where `exact_tests` or time cut them short, and without max_kl or
        max_loss.
    ranking: the order of all nodes that the run was cut from; scores: the same with the circuit's nodes first.
    circuit: its `about` says budget, figures, seed and versions, so that its file does.
    seconds: wall time. peak_memory: bytes, the process's peak on CPU (since its start; 0 on Windows), the allocator's on CUDA (since the
        search began). stopped: what cut the search short, "" where nothing did. loss: what `kl` is, "KL" or the name of the loss given.
    """

    circuit: Circuit
    converged: bool | None
    kl: float
    search_kl: float
    history: list[Step] = field(repr=False)
    seconds: float
    peak_memory: int
    interval: tuple[float, float] = (math.nan, math.nan)
    accuracy: float = math.nan
    p_value: float = math.nan
    minimal: bool = False
    tested: int = 0
    ruled_out: int = 0
    stopped: str = ""
    frontier: pd.DataFrame = field(default_factory=pd.DataFrame, repr=False)
    ranking: NodeScores | None = field(default=None, repr=False)
    scores: NodeScores | None = field(default=None, repr=False)
    searched: PromptPairs | None = field(default=None, repr=False)
    held_out: PromptPairs | None = field(default=None, repr=False)
    loss: str = "KL"

    def __post_init__(self) -> None:
        low, high = map(figure, self.interval)
        about = replace(self.circuit.about, model_name=self.circuit.space.model_name, loss=self.loss, kl=figure(self.kl),
                        interval=None if low is None or high is None else (low, high), accuracy=figure(self.accuracy),
                        converged=self.converged, held_out=None if self.held_out is None else len(self.held_out),
                        searched=None if self.searched is None else len(self.searched), versions=versions())
        object.__setattr__(self, "circuit", self.circuit.with_about(about))

    def to_frame(self) -> pd.DataFrame:
        """The history, a row per step."""
        return pd.DataFrame(self.history)

    def at(self, *, max_kl: float | None = None, max_nodes: float | int | None = None, agreement: float | None = None,
           finish: NodeMasks | None = None, exact_tests: int = 16, progress: bool = False) -> PruneResult:
        """The circuit of another budget, from the same run: no new search.

        max_kl: the smallest on the frontier within it, on the prompts held out; max_nodes: the largest of at most so many (a share or a
            count). finish: attached masks over the same nodes; the circuit is then cut finely and tested as by `prune`, on its prompts.

        Raises: ValueError for a budget that is missing, given twice, out of range, or that no circuit of the frontier meets, a result that
        has no frontier (an objective's, or one within limits by granularity), and masks over other nodes.
        """
        check_types(PruneResult.at, locals())
        check_counts(0, exact_tests=exact_tests)
        if self.frontier.empty or self.ranking is None:
            raise ValueError("this result has no frontier: it is an objective's or one within limits by granularity. Search with max_kl.")
        if agreement is not None and finish is None:
            raise ValueError(f"agreement={agreement} goes with finish=masks: the frontier's circuits are not chosen by it.")
        budget = budget_of(self.ranking.space, max_kl=max_kl, agreement=agreement, max_nodes=max_nodes)
        asked = {"max_kl": max_kl, "max_nodes": max_nodes, "agreement": agreement}
        if finish is not None:
            return noted(_finished(self, finish, budget, exact_tests=exact_tests, progress=progress), asked, self.circuit.about.seed)
        table = self.frontier
        fits = table[table["kl"] <= budget.max_loss] if budget.smallest else table[table["nodes"] <= (budget.max_size or 0)]
        if fits.empty:
            given, have = (f"max_kl={max_kl}", f"KL {figures(table['kl'].min())}") if budget.smallest else (
                f"max_nodes={max_nodes}", f"{int(table['nodes'].min())} nodes")
            raise ValueError(f"no circuit of this run's frontier meets {given}; its lowest is {have}. Give finish=masks, or search again.")
        row = fits.iloc[0 if budget.smallest else -1]
        circuit = self.ranking.top(int(row["nodes"]))
        held = HeldOut(float(row["kl"]), float(row["low"]), float(row["high"]), float(row["accuracy"]), _different(self.held_out))
        met = held.meets(budget.max_loss) if budget.smallest else True
        no_task = _different(self.searched) >= FEWEST_PROMPTS and self.p_value > TASK_LEVEL
        there = replace(self, circuit=circuit, converged=False if no_task else met, kl=held.kl,
                        search_kl=float(row["search_kl"]), interval=(held.low, held.high), accuracy=held.accuracy, minimal=False, tested=0,
                        ruled_out=0, scores=NodeScores.from_circuit(circuit, within=self.ranking))
        return noted(there, asked, self.circuit.about.seed)


def noted(found: PruneResult, asked: Mapping[str, object], seed: int | None) -> PruneResult:
    """A result whose circuit says what it was asked to be."""
    budget = ", ".join(f"{name}={value}" for name, value in asked.items() if value is not None)
    return replace(found, circuit=found.circuit.with_about(replace(found.circuit.about, budget=budget, seed=seed)))


def found(run: Run, start: Circuit | None, exact_tests: int, frontier: pd.DataFrame | None = None) -> PruneResult:
    """The budget's circuit from a run that is trained."""
    budget = run.budget
    table = run.frontier() if frontier is None and budget.limits is None else pd.DataFrame() if frontier is None else frontier
    kept, tests = smallest(run, table, None if start is None else leaves_of(start).to(run.landscape.device), exact_tests)
    (held,) = run.judge([kept], most=None)
    run.masks.ablation = run.landscape.with_coarse(run.landscape.ablation_now())
    circuit = Circuit(run.masks.space, run.landscape.gates(kept.float()), run.masks.ablation)
    met = held.meets(budget.max_loss) if budget.smallest else True
    ranking = run.scores()
    rows = torch.arange(len(run.given))
    return PruneResult(
        circuit, False if run.preference.no_task else met, held.kl, float(run.landscape.losses(kept[None].float(), rows).loss.mean()),
        [Step(i, loss, round(size), heat) for i, (loss, size, heat) in enumerate(run.trace.tolist())], run.progress.seconds,
        peak_memory(run.masks.model), (held.low, held.high), held.accuracy, run.preference.p_value if run.by_kl else math.nan,
        tests.complete, tests.tested, tests.ruled_out,
        "time limit" if run.progress.over() or run.cut_short else "", table, ranking, NodeScores.from_circuit(circuit, within=ranking),
        run.given, run.held.prompts if run.held else None,
        "KL" if budget.loss is kl_divergence else getattr(budget.loss, "__name__", "loss"))


def told(masks: NodeMasks, found: PruneResult, budget: Budget, *, objective: bool, stacklevel: int) -> PruneResult:
    """Leave the masks at the circuit, and warn of what is wrong with it."""
    set_to(masks, found.circuit)
    if problem := "" if objective else _problem(found, budget):
        warnings.warn(problem, stacklevel=stacklevel)
    return found


def _problem(found: PruneResult, budget: Budget) -> str:
    """Why no circuit can be claimed, in words; empty where one can."""
    if found.converged is False and found.p_value > TASK_LEVEL and (not budget.smallest or found.kl <= budget.max_loss):
        return ("no circuit is claimed: on these pairs the full model does not prefer the answer more on clean than on corrupted "
                f"prompts (signed-rank test, p = {figures(found.p_value)}). Are answers and prompts in the same order?")
    if found.converged is False:
        return (f"no circuit within the budget was found: on prompts held out the loss is {figures(found.kl)}, "
                f"{figures(found.kl - budget.max_loss)} above {budget.max_loss}.")
    if found.converged is None:
        n = _different(found.held_out)
        needed = HeldOut(found.kl, *found.interval, found.accuracy, n).needed(budget.max_loss)
        return (f"the budget is untested: {n} different prompts held out are too few to tell whether the loss, {figures(found.kl)} there, "
                f"is within {budget.max_loss}. About {needed} are needed: give {max(ENOUGH, 4 * needed)} prompts, or others as held_out.")
    return ""


def _finished(result: PruneResult, masks: NodeMasks, budget: Budget, *, exact_tests: int, progress: bool) -> PruneResult:
    assert result.searched is not None and result.held_out is not None and result.ranking is not None
    searchable(masks, result.searched, stacklevel=4)
    if masks.space.shapes != result.ranking.space.shapes:
        raise ValueError("finish: these masks are over other nodes than the run's.")
    settings = Settings()
    with going(masks, "finish", settings, progress) as bar, masks.inactive():
        run = Run(masks, result.searched, result.held_out, budget, settings, bar, both_ways=budget.loss is kl_divergence)
        run.order = result.ranking.flat.to(run.order.device)
        better = found(run, None, exact_tests, result.frontier)
        return told(masks, replace(better, history=result.history, p_value=result.p_value), budget, objective=False, stacklevel=4)


def _different(prompts: PromptPairs | None) -> int:
    return int(prompts.distinct().max()) + 1 if prompts is not None else 0


def held_out_sentence(result: PruneResult) -> str:
    """What a result says of its circuit on prompts held out, then on those searched."""
    unit, (low, high) = " nats" if result.loss == "KL" else "", result.interval
    aside, n = "" if result.held_out is None else f" {len(result.held_out)}", "" if result.searched is None else f" {len(result.searched)}"
    sure = "" if math.isnan(low) else f" (90 % interval {figures(low)} to {figures(high)})"
    right = "" if math.isnan(result.accuracy) else f", {result.accuracy:.0%} answered right"
    return (f"{result.loss} {figures(result.kl)}{unit} on{aside} prompts held out{sure}{right}; {figures(result.search_kl)} on the{n} "
            "prompts searched.")
