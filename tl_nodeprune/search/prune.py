"""`prune`: from attached masks and prompts to the smallest circuit within a budget, and its result."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from tl_nodeprune.checks import check_counts
from tl_nodeprune.circuit import Circuit, check_circuit
from tl_nodeprune.losses import LossFn, kl_divergence
from tl_nodeprune.masks import NodeMasks
from tl_nodeprune.preference import FEWEST, SIGNIFICANT
from tl_nodeprune.probe import device_of, peak_memory
from tl_nodeprune.prompts import PromptPairs, check_pairs
from tl_nodeprune.reference import Reference
from tl_nodeprune.scores import NodeScores
from tl_nodeprune.search.budget import Budget, budget_of
from tl_nodeprune.search.checkpoint import Checkpoint, asked
from tl_nodeprune.search.exact_tests import MEASURED, ExactTests, expected_forwards
from tl_nodeprune.search.held_out import ENOUGH, ENOUGH_HELD, HeldOut, set_aside
from tl_nodeprune.search.paper import PaperObjective
from tl_nodeprune.search.run import Progress, Run, Settings, going, searchable

FEW = 0.5  # the budget on the prompts searched over that asked for, where those held out are too few to tell
SURE = 1.25  # times the nodes, at most, that are kept where they make sure of the budget
ROOM = 0.25  # of what the budget leaves, the share that exact tests may use
BISECTED = 0.02  # a size is settled when the next smaller one tried is nearer than this share


@dataclass(frozen=True)
class Step:
    """One step of a search. kl: nats (or the loss given), mean over the step's prompts, each under a size of its own; size: their mean;
    coefficient: the temperature of the soft masks; lam for PaperObjective."""

    step: int
    kl: float
    size: int
    coefficient: float


@dataclass(frozen=True)
class PruneResult:
    """What a search found.

    kl: the binary circuit's mean loss on prompts that were never searched on, `held_out` (nats for KL); interval: 90 %, by bootstrap over
        the different ones; accuracy: share of them with the answer preferred. search_kl: on the prompts searched on, `searched`.
    converged: the budget holds on the prompts held out, with the interval's upper end at most 1.25 times it, and the full model does the
        task; False where it does not; None, untested, where the prompts are too few to tell. Always True for a size and an objective.
    p_value: one-sided Wilcoxon signed-rank test over the different clean prompts, that the model prefers the answer more on clean than on
        corrupted ones; NaN without corrupted ones, or for an objective.
    frontier: every size of the same run: nodes, share, search_kl, and on the prompts held out kl, low, high, accuracy; a row per size that
        no smaller one does better than. `at` gives the circuit of another budget.
    minimal: exact tests found no head, block or node that can be left out at this loss; `tested` were run, `ruled_out` had prices far above
        the room that was left. False where `exact_tests` or time cut them short, and without max_kl or max_loss.
    ranking: the order of all nodes that the run was cut from; scores: the same with the circuit's nodes first.
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

    def to_frame(self) -> pd.DataFrame:
        """The history, a row per step."""
        return pd.DataFrame(self.history)

    def at(self, *, max_kl: float | None = None, max_nodes: float | int | None = None, agreement: float | None = None,
           finish: NodeMasks | None = None, exact_tests: int = 16, progress: bool = False) -> PruneResult:
        """The circuit of another budget, from the same run: no new search.

        max_kl: the smallest on the frontier within it, on the prompts held out; max_nodes: the largest of at most so many (a share or a
            count). finish: attached masks over the same nodes; the circuit is then cut finely and tested as by `prune`, on its prompts.

        Raises: ValueError for a budget that is missing, doubled, out of range, or that no circuit of the frontier meets, a result that has
        no frontier (an objective's, or one within limits by granularity), and masks over other nodes.
        """
        if self.frontier.empty or self.ranking is None:
            raise ValueError("this result has no frontier: it is an objective's or one within limits by granularity. Search with max_kl.")
        if agreement is not None and finish is None:
            raise ValueError(f"agreement={agreement} goes with finish=masks: the frontier's circuits are not chosen by it.")
        budget = budget_of(self.ranking.space, max_kl=max_kl, agreement=agreement, max_nodes=max_nodes)
        if finish is not None:
            return _finished(self, finish, budget, exact_tests=exact_tests, progress=progress)
        table = self.frontier
        fits = table[table["kl"] <= budget.max_loss] if budget.smallest else table[table["nodes"] <= (budget.max_size or 0)]
        if fits.empty:
            given, have = (f"max_kl={max_kl}", f"KL {table['kl'].min():.4g}") if budget.smallest else (
                f"max_nodes={max_nodes}", f"{int(table['nodes'].min())} nodes")
            raise ValueError(f"no circuit of this run's frontier meets {given}; its lowest is {have}. Give finish=masks, or search anew.")
        row = fits.iloc[0 if budget.smallest else -1]
        circuit = self.ranking.top(int(row["nodes"]))
        held = HeldOut(float(row["kl"]), float(row["low"]), float(row["high"]), float(row["accuracy"]), _different(self.held_out))
        met = held.meets(budget.max_loss) if budget.smallest else True
        no_task = _different(self.searched) >= FEWEST and self.p_value > SIGNIFICANT
        return replace(self, circuit=circuit, converged=False if no_task else met, kl=held.kl,
                       search_kl=float(row["search_kl"]), interval=(held.low, held.high), accuracy=held.accuracy, minimal=False, tested=0,
                       ruled_out=0, scores=NodeScores.from_circuit(circuit, within=self.ranking))


def prune(
    masks: NodeMasks, prompts: PromptPairs, *, max_kl: float | None = None, agreement: float | None = None,
    max_nodes: float | int | Mapping[str, float | int] | None = None, loss: LossFn | None = None, max_loss: float | None = None,
    objective: PaperObjective | None = None, held_out: PromptPairs | None = None, start: Circuit | None = None, steps: int | None = None,
    exact_tests: int = 16, time_limit: float | None = None, checkpoint: str | Path | None = None, batch_size: int = 64,
    step_prompts: int | None = None, cache_bytes: int = 2 << 30, seed: int = 0, progress: bool = True,
) -> PruneResult:
    """The smallest circuit whose KL(full || circuit) at the answer positions is at most `max_kl` nats on prompts that were not searched
    on, or the most faithful one of at most `max_nodes` nodes. The masks are left at that circuit, still attached; after an objective they
    have its gate, hard concrete and straight-through.

    Give one of: max_kl (nats); max_nodes (a float is a share of the leaf nodes, an int a count; gates above something that is not
        gated count too; a mapping limits single granularities); loss with max_loss, a loss of your own,
        fn(circuit_logits, full_logits, prompts) -> [batch], bounded in its mean; objective, the paper's, run as it is, with its own
        steps and batch size.
    max_nodes as a mapping: a share or count of each granularity named, as {"head": 3, "mlp_neuron": 0.05}; the most faithful circuit
        with at most so many of each live is sought. A head, block or layer counts as one while anything in it is live. Granularities
        that are not named are not limited: their nodes stay open except where closing them clearly makes the circuit more faithful.
    agreement: with max_kl, share of the prompts on which the circuit must choose between answer and wrong answer as the full model does;
        by default 0.98, or 1 - 0.4 * max_kl where that is less. 0.98 with a large max_kl asks for the choice alone.
    held_out: prompts to judge by that are never searched on; None: a quarter of `prompts` at random, 8 different ones at least where there
        are 24. From fewer the result says that the budget is untested.
    start: a circuit to better, in place of the run's own cut, where it is within the budget and smaller.
    steps: of the training that orders all nodes; None: 265 for 5,000 nodes, 600 for 80,000. step_prompts: prompts per step, drawn at
        random; None: 32, on CUDA 64. The cost of a step does not grow with the number of prompts.
    exact_tests: with max_kl or max_loss, leaf nodes whose removal is tried exactly at the end, the likeliest first. Heads and blocks
        above them are tested too, unless their price rules them out by far.
    time_limit: seconds, about; the best so far is returned then, and `stopped` says so. checkpoint: a folder in which the state is kept;
        a run that was broken off goes on there, to the same circuit.
    batch_size: prompts per forward; memory, and the result hardly. cache_bytes: stand-ins are kept up to this, recomputed above.
    seed: same seed, same machine, same circuit.

    Where, with max_kl or max_nodes, the full model on corrupted prompts prefers the wrong answer, as when the corruption swaps two names,
    those pairs are searched on in both directions, which makes the circuit hold on fresh prompts (docs/decisions). Where 7 clean prompts
    or more show no preference of the full model for the answer on the clean prompts, no circuit is claimed: a warning, and `converged` is
    False.

    Warns where some corrupted prompts are the same as the clean ones, and where the budget is not met or untested. Raises: ValueError for a
    budget that is missing, doubled, not above 0, or of nodes that these masks do not gate, an agreement that is no share or without max_kl,
    prompts that do not fit the model, that are all the same or held out and searched on, a loss without a gradient, a start over other
    nodes or with an objective, a time limit that is not above 0, and a checkpoint of another run; TypeError for what is no number or no
    PromptPairs; OSError for a checkpoint that cannot be written; RuntimeError where the masks are not attached, another circuit is
    applied, or the model is in training mode with dropout; FloatingPointError at the step where logits or the loss are NaN or inf. The
    model and the masks are then as before.
    """
    budget = budget_of(masks.space, max_kl=max_kl, agreement=agreement, max_nodes=max_nodes, loss=loss, max_loss=max_loss,
                       objective=objective)
    _check_start(masks, start, objective)
    model = searchable(masks, prompts, stacklevel=3)
    settings = Settings(steps, batch_size, step_prompts, cache_bytes, seed, time_limit, checkpoint)
    check_counts(0, exact_tests=exact_tests)
    if held_out is not None:
        check_pairs(held_out, "held_out")
        held_out.check_fits(model)
        held_out.check_corrupted(masks.asked_ablation.name)
    searched, held = set_aside(prompts, held_out, seed)
    saved = None if checkpoint is None else Checkpoint(checkpoint, asked(
        masks, prompts, held_out, loss=getattr(budget.loss, "__name__", "loss"), limits=budget.limits and dict(budget.limits.most),
        budget=(budget.max_loss, budget.max_size), steps=steps, step_prompts=step_prompts, seed=seed))
    if device_of(model).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device_of(model))
    with going(masks, "prune", settings, progress) as bar:
        if objective:
            found = _paper(masks, searched, held, objective, settings, bar)
        else:
            with masks.inactive():
                run = Run(masks, searched, held, budget, settings, bar, both_ways=budget.loss is kl_divergence)
                run.train(saved)
                found = _found(run, start, exact_tests)
    return _told(masks, found, budget, objective=objective is not None, stacklevel=3)


def _told(masks: NodeMasks, found: PruneResult, budget: Budget, *, objective: bool, stacklevel: int) -> PruneResult:
    """Leave the masks at the circuit, and warn of what is wrong with it."""
    masks.set_to(found.circuit)
    if problem := "" if objective else _problem(found, budget):
        warnings.warn(problem, stacklevel=stacklevel)
    return found


def _problem(found: PruneResult, budget: Budget) -> str:
    """Why no circuit can be claimed, in words; empty where one can."""
    if found.converged is False and found.p_value > SIGNIFICANT and (not budget.smallest or found.kl <= budget.max_loss):
        return ("no circuit is claimed: on these pairs the full model does not prefer the answer more on clean than on corrupted "
                f"prompts (signed-rank test, p = {found.p_value:.2g}). Are answers and prompts in the same order?")
    if found.converged is False:
        return (f"no circuit within the budget was found: on prompts held out the loss is {found.kl:.4f}, "
                f"{found.kl - budget.max_loss:.4f} above {budget.max_loss}.")
    if found.converged is None:
        n = _different(found.held_out)
        needed = HeldOut(found.kl, *found.interval, found.accuracy, n).needed(budget.max_loss)
        return (f"the budget is untested: {n} different prompts held out are too few to tell whether the loss, {found.kl:.4f} there, is "
                f"within {budget.max_loss}. About {needed} are needed: give {max(ENOUGH, 4 * needed)} prompts, or others as held_out.")
    return ""


def _check_start(masks: NodeMasks, start: Circuit | None, objective: PaperObjective | None) -> None:
    if start is None:
        return
    if objective is not None:
        raise ValueError("start goes with max_kl, max_nodes or a loss; an objective starts from scores of its own.")
    check_circuit(start, "start")
    if start.space.shapes != masks.space.shapes:
        raise ValueError(f"start is a circuit over other nodes, {', '.join(start.space.granularities)} in layers {start.space.layers}, "
                         f"than these masks ({', '.join(masks.space.granularities)} in layers {masks.space.layers}).")


def _found(run: Run, start: Circuit | None, exact_tests: int, frontier: pd.DataFrame | None = None) -> PruneResult:
    """The budget's circuit from a run that is trained."""
    budget, bar = run.budget, run.progress
    table = run.frontier() if frontier is None and budget.limits is None else pd.DataFrame() if frontier is None else frontier
    cut = _cut(run, table)
    if start is not None:
        cut = _better(run, cut, run.landscape.flat(start))
    bar.stage("exact tests")
    bar.plan(expected_forwards(run.landscape))
    tests = ExactTests(run.landscape, budget, run.searched_rows(MEASURED), run.order, bar.over)
    chain = [cut, run.landscape.without_moot(tests.minimal(cut, _room(run, tests, cut), exact_tests) if budget.smallest else cut)]
    kept = _choose(run, chain)
    (held,) = run.judge([kept], most=None)
    run.masks.ablation = run.landscape.with_coarse(run.landscape.ablation_now())
    circuit = Circuit(run.masks.space, run.landscape.gates(kept.float()), run.masks.ablation)
    met = held.meets(budget.max_loss) if budget.smallest else True
    ranking = run.scores()
    rows = torch.arange(len(run.given))
    return PruneResult(
        circuit, False if run.preference.no_task else met, held.kl, float(run.landscape.losses(kept[None].float(), rows).loss.mean()),
        [Step(i, loss, round(size), heat) for i, (loss, size, heat) in enumerate(run.trace.tolist())], bar.seconds,
        peak_memory(run.masks.model), (held.low, held.high), held.accuracy, run.preference.p_value if run.by_kl else math.nan,
        budget.smallest and tests.complete and kept is chain[-1], tests.tested, tests.ruled_out,
        "time limit" if bar.over() or run.cut_short else "", table, ranking, NodeScores.from_circuit(circuit, within=ranking),
        run.given, run.held.prompts if run.held else None,
        "KL" if budget.loss is kl_divergence else getattr(budget.loss, "__name__", "loss"))


def _cut(run: Run, table: pd.DataFrame) -> Tensor:
    """The smallest size of the run's order that is within the budget, or the size asked for."""
    budget = run.budget
    if not budget.smallest:
        return run.top(budget.max_size or run.landscape.n)
    sizes = [0, *map(int, table["nodes"])]
    place = 1 + int((table["kl"] <= budget.max_loss).to_numpy().argmax())  # the full model is within any budget
    while place < len(sizes) - 1 and not _within(run, [run.top(sizes[place])])[0]:
        place += 1
    low, high = sizes[place - 1], sizes[place]
    while high - low > max(BISECTED * high, 1) and not run.progress.over():
        middle = max(round(math.sqrt(max(low, 1) * high)), low + 1)
        if middle >= high:
            break
        low, high = (low, middle) if _within(run, [run.top(middle)])[0] else (middle, high)
    larger = [run.top(min(round(high * SURE ** (i / 4)), run.landscape.n)) for i in range(5)]
    sure = [kept for kept, held in zip(larger, run.judge(larger), strict=True) if held.meets(budget.max_loss)]
    return (sure or larger)[0]


def _within(run: Run, kept: list[Tensor]) -> list[bool]:
    """Whether circuits are within the budget: on the prompts searched, and on those held out as far as these can tell."""
    budget = run.budget
    losses = run.landscape.losses(torch.stack(kept).float(), run.searched_rows(MEASURED))
    few = FEW if run.held is None or run.n_held < ENOUGH_HELD else 1.0
    fine = replace(budget, max_loss=budget.max_loss * few).violation(losses) <= 1
    return [bool(ok) and held.kl <= budget.max_loss for ok, held in zip(fine, run.judge(kept), strict=True)]


def _better(run: Run, cut: Tensor, start: Tensor) -> Tensor:
    """A circuit to start from, where it is within the budget and smaller, or of the size asked for and more faithful."""
    budget = run.budget
    if budget.smallest:
        return start if int(start.sum()) < int(cut.sum()) and _within(run, [start])[0] else cut
    fits = budget.limits.hold(start.cpu()) if budget.limits else int(start.sum()) <= (budget.max_size or 0)
    losses = run.landscape.losses(torch.stack([cut, start]).float(), run.searched_rows()).loss.mean(-1)
    return start if fits and losses[1] < losses[0] else cut


def _room(run: Run, tests: ExactTests, kept: Tensor) -> float:
    """How far the loss on the prompts searched may rise: a part of the way to where that on prompts held out comes to the budget, in
    proportion. All of it would go into units that are dearer than what the order cuts next."""
    budget, (held,) = run.budget, run.judge([kept])
    loss = float(tests.measure([kept]).loss.mean())
    most = budget.max_loss * (FEW if run.n_held < ENOUGH_HELD else 1.0)
    return loss + ROOM * max(min(most, loss * budget.max_loss / max(held.kl, 1e-9)) - loss, 0)


def _choose(run: Run, chain: list[Tensor]) -> Tensor:
    """The smallest of the circuits that is within the budget on prompts held out; for a size the last."""
    if not run.budget.smallest:
        return chain[-1]
    judged = run.judge(chain)
    fits = [i for i, held in enumerate(judged) if held.kl <= run.budget.max_loss] or [0]
    sure = [i for i in fits if judged[i].meets(run.budget.max_loss) and int(chain[i].sum()) <= SURE * int(chain[fits[-1]].sum())]
    return chain[(sure or fits)[-1]]


def _finished(result: PruneResult, masks: NodeMasks, budget: Budget, *, exact_tests: int, progress: bool) -> PruneResult:
    assert result.searched is not None and result.held_out is not None and result.ranking is not None
    searchable(masks, result.searched, stacklevel=4)
    if masks.space.shapes != result.ranking.space.shapes:
        raise ValueError("finish: these masks are over other nodes than the run's.")
    settings = Settings()
    with going(masks, "finish", settings, progress) as bar, masks.inactive():
        run = Run(masks, result.searched, result.held_out, budget, settings, bar, both_ways=budget.loss is kl_divergence)
        run.order = result.ranking.flat.to(run.order.device)
        found = _found(run, None, exact_tests, result.frontier)
    return _told(masks, replace(found, history=result.history, p_value=result.p_value), budget, objective=False, stacklevel=4)


def _paper(masks: NodeMasks, searched: PromptPairs, held: PromptPairs, objective: PaperObjective, settings: Settings,
           bar: Progress) -> PruneResult:
    model, history = masks.model, list[Step]()
    with masks.inactive():
        run = Run(masks, searched, held, Budget(), settings, bar, both_ways=False)
        reference = Reference(model, searched, run.ablation, masks.space.hooks, batch_size=settings.batch_size,
                              cache_bytes=settings.cache_bytes)
    masks.ablation = run.ablation
    bar.plan(3 * objective.steps * min(objective.batch_size, len(searched)))
    bar.stage("the paper's objective")

    def record(step: int, kl: float, size: int, lam: float) -> None:
        history.append(Step(step, kl, size, lam))
        bar.passed(3 * min(objective.batch_size, len(searched)))

    generator = torch.Generator().manual_seed(settings.seed)
    with torch.enable_grad():
        objective.train(masks, reference, generator, record, bar.over)
    circuit = masks.to_circuit()
    ranking = NodeScores({key: masks.score(key) for key in masks.space.free()}, masks.space)
    with masks.inactive():
        kept = run.landscape.flat(circuit)
        (judged,) = run.judge([kept], most=None)
        search_kl = float(run.landscape.losses(kept[None].float(), torch.arange(len(searched))).loss.mean())
    return PruneResult(circuit, True, judged.kl, search_kl, history, bar.seconds, peak_memory(model), (judged.low, judged.high),
                       judged.accuracy, ranking=ranking, scores=NodeScores.from_circuit(circuit, within=ranking), searched=searched,
                       held_out=held, stopped="time limit" if bar.over() else "")


def _different(prompts: PromptPairs | None) -> int:
    return int(prompts.distinct().max()) + 1 if prompts is not None else 0


NodeMasks.prune = prune
