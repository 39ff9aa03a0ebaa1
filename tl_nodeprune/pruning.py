"""`prune`: from attached masks and prompts to the smallest circuit within a budget."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from tqdm.auto import tqdm

from tl_nodeprune.budget import Budget, budget_of
from tl_nodeprune.checks import check_counts
from tl_nodeprune.circuit import Circuit, check_circuit, circuit_logits, full_logits
from tl_nodeprune.landscape import Record
from tl_nodeprune.masks import NodeMasks, masks_off
from tl_nodeprune.objective import LossFn, PaperObjective, Reference, kl_divergence
from tl_nodeprune.probe import device_of
from tl_nodeprune.prompts import PromptPairs
from tl_nodeprune.ranking import NodeScores
from tl_nodeprune.stages import Stages
from tl_nodeprune.survey import searchable, survey


@dataclass(frozen=True)
class Step:
    """One step of a search: of thresholding, then a round of the refinement, and between them steps of the searches that measure the gap.
    kl: nats (or the loss given), mean over the step's prompts, of the worse direction where pairs are searched both ways; size: nodes open;
    coefficient: the score at the cut (with limits by granularity, where there is no one cut, that of rank `size`), in a round the highest
    cost of a removal that was planned; lam for PaperObjective."""

    step: int
    kl: float
    size: int
    coefficient: float


@dataclass(frozen=True)
class PruneResult:
    """What a search found. kl: the binary circuit's mean loss on the prompts it was found on (nats for KL).

    converged: whether the budget (max_kl, max_loss) is met, measured so, and the full model does the task on these prompts; always True for
    an objective. p_value: one-sided Wilcoxon signed-rank test over the different clean prompts, that the model prefers the answer more on
    clean than on corrupted ones; NaN without corrupted ones, or with a loss of one's own or an objective. minimal: whether exact tests of
    all heads, blocks and single nodes found that none can be left out within the budget that the search ended with and without choosing
    less surely; False where `exact_tests` cut them short, and without max_kl or max_loss. gap: 1 + (KL on the
    quarter held out - KL on the three quarters searched on, mean of four circuits of this size) / (KL of the circuit before room was made
    for that); 1 at least, NaN where not measured (fewer than 16 different pairs, or 24 steps). seconds: wall time.
    peak_memory: bytes, the process's peak on CPU (since its start; 0 on Windows), the allocator's on CUDA (since the search began).
    scores: every leaf node's place, `1 - (place - 1) / n`: kept ones first, each side in the order of the search's own scores. For figures,
    and for what would come next; `rank` makes a ranking that is good at every size. loss: what `kl` is, "KL" or the name of the loss given.
    """

    circuit: Circuit
    converged: bool
    kl: float
    history: list[Step] = field(repr=False)
    seconds: float
    peak_memory: int
    p_value: float = float("nan")
    minimal: bool = False
    gap: float = float("nan")
    scores: NodeScores | None = field(default=None, repr=False)
    loss: str = "KL"

    def to_frame(self) -> pd.DataFrame:
        """The history, a row per step."""
        return pd.DataFrame(self.history)


def prune(
    masks: NodeMasks, prompts: PromptPairs, *, max_kl: float | None = None, agreement: float | None = None,
    max_nodes: float | int | Mapping[str, float | int] | None = None, loss: LossFn | None = None, max_loss: float | None = None,
    objective: PaperObjective | None = None, start: Circuit | None = None, steps: int = 200, exact_tests: int = 16,
    batch_size: int = 64, step_prompts: int = 64, cache_bytes: int = 2 << 30, seed: int = 0, progress: bool = True,
) -> PruneResult:
    """The smallest circuit whose KL(full || circuit) at the answer positions is at most `max_kl` nats, or the most faithful
    one of at most `max_nodes` nodes. The masks are left at that circuit, still attached; after
    an objective they have its gate, hard concrete and straight-through.

    A max_kl leaves room for fresh prompts: where circuits do more than 1.5 times worse on pairs held out than on their own (`gap`), what
    is searched within is less, .4 of it at least; with 2 to 15 different pairs, too few to hold any out, half of it.

    Give one of: max_kl (nats); max_nodes (a float is a share of the leaf nodes, an int a count; gates above something that is not
        gated count too; a mapping limits single granularities); loss with max_loss, a loss of your own,
        fn(circuit_logits, full_logits, prompts) -> [batch], bounded in its mean; objective, the paper's, run as it is, with its own
        steps and batch size.
    max_nodes as a mapping: a share or count of each granularity named, as {"head": 3, "mlp_neuron": 0.05}; the most faithful circuit
        with at most so many of each live is sought. A head, block or layer counts as one while anything in it is live. Granularities
        that are not named are not limited: their nodes stay open except where closing them clearly makes the circuit more faithful.
    agreement: with max_kl, share of the prompts on which the circuit must choose between answer and wrong answer as the full model does;
        by default 0.98, or 1 - 0.4 * max_kl where that is less. 0.98 with a large max_kl asks for the choice alone.
    start: a circuit to start from, say that of a smaller budget, instead of integrated gradients alone.
    steps: at most; the search stops earlier when nothing improves. Where it ends with a large circuit, or one that does not hold on pairs
        held out, rounds of removals down from the full model come on top; the search can take twice the time then. step_prompts: prompts
        per step, more are drawn from at random.
    exact_tests: with max_kl or max_loss, leaf nodes whose removal is tried exactly at the end, the likeliest first. Heads and blocks
        above them always are, all of them.
    batch_size: prompts per forward; memory, and the result hardly. cache_bytes: stand-ins are kept up to this, recomputed above.
    seed: same seed, same machine, same circuit.

    Where, with max_kl or max_nodes, the full model on corrupted prompts prefers the wrong answer, as when the corruption swaps two names,
    those pairs are searched on in both directions, which makes the circuit hold on fresh prompts (docs/decisions). Where 7 clean prompts
    or more show no preference of the full model for the answer on the clean prompts, no circuit is claimed: a warning, and `converged` is
    False.

    Warns where some corrupted prompts are the same as the clean ones. Raises: ValueError for a budget that is missing, doubled, not above
    0, or of nodes that these masks do not gate, an agreement that is no share or without max_kl, prompts that do not fit the model, a loss
    without a gradient, or a start over other nodes or with an objective; TypeError for what is no number or no PromptPairs; RuntimeError
    where the masks are not attached, another circuit is applied, or the model is in training mode with dropout; FloatingPointError at
    the step where logits or the loss are NaN or inf. The model and the masks are then as before.
    """
    budget = budget_of(masks.space, max_kl, agreement, max_nodes, loss, max_loss, objective)
    if start is not None and objective is not None:
        raise ValueError("start goes with max_kl, max_nodes or a loss; an objective starts from scores of its own.")
    model = _ready(masks, prompts, start)
    check_counts(steps=steps, batch_size=batch_size, step_prompts=step_prompts)
    check_counts(0, exact_tests=exact_tests)
    began, generator = time.perf_counter(), torch.Generator().manual_seed(seed)
    history: list[Step] = []
    if device_of(model).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device_of(model))
    with tqdm(total=objective.steps if objective else steps, desc="prune", disable=not progress) as bar, _restored_on_error(masks):
        def record(step: int, kl: float, size: int, coefficient: float) -> None:
            history.append(Step(step, kl, size, coefficient))
            bar.total = max(bar.total, bar.n + 1)  # the way down comes on top
            bar.set_postfix(kl=f"{kl:.4f}", nodes=size, refresh=False)
            bar.update()

        if objective:
            found = _paper(masks, model, prompts, objective, record, generator, batch_size=batch_size, cache_bytes=cache_bytes)
        else:
            found = _search(masks, model, prompts, budget, record, generator, start=start, steps=steps, exact_tests=exact_tests,
                            batch_size=batch_size, step_prompts=step_prompts, cache_bytes=cache_bytes)
    masks.set_to(found.circuit)
    if problem := None if objective else found.problem(budget):
        warnings.warn(problem, stacklevel=2)
    return PruneResult(found.circuit, not problem, found.kl, history, time.perf_counter() - began, _peak_memory(model), found.p_value,
                       found.minimal, found.gap, NodeScores.from_circuit(found.circuit, within=found.order),
                       "KL" if loss in (None, kl_divergence) else getattr(loss, "__name__", "loss"))


@dataclass(frozen=True)
class _Found:
    """What a search came to."""

    circuit: Circuit
    kl: float
    order: NodeScores
    p_value: float = float("nan")
    no_task: bool = False
    minimal: bool = False
    gap: float = float("nan")

    def problem(self, budget: Budget) -> str | None:
        """Why no circuit can be claimed, in words."""
        if budget.smallest and not self.kl <= budget.max_loss:
            over = self.kl - budget.max_loss
            return f"no circuit within the budget was found: the loss is {self.kl:.4f}, {over:.4f} above {budget.max_loss}."
        if self.no_task:
            return ("no circuit is claimed: on these pairs the full model does not prefer the answer more on clean than on corrupted "
                    f"prompts (signed-rank test, p = {self.p_value:.2g}). Are answers and prompts in the same order?")
        return None


@contextmanager
def _restored_on_error(masks: NodeMasks) -> Iterator[None]:
    """Scores, gate and ablation as they were, if anything goes wrong inside."""
    before = ({name: p.detach().clone() for name, p in masks.scores.items()}, masks.gate, masks.ablation)
    try:
        yield
    except BaseException:
        masks.gate, masks.ablation = before[1:]
        with torch.no_grad():
            for name, score in before[0].items():
                masks.scores[name].copy_(score)
        raise


def _ready(masks: NodeMasks, prompts: PromptPairs, start: Circuit | None) -> Any:
    model = searchable(masks, prompts, stacklevel=4)
    if start is not None:
        check_circuit(start, "start")
    if start is not None and start.space.shapes != masks.space.shapes:
        raise ValueError(f"start is a circuit over other nodes, {', '.join(start.space.granularities)} in layers {start.space.layers}, "
                         f"than these masks ({', '.join(masks.space.granularities)} in layers {masks.space.layers}).")
    return model


def _search(masks: NodeMasks, model: Any, prompts: PromptPairs, budget: Budget, record: Record, generator: torch.Generator, *,
            start: Circuit | None, steps: int, exact_tests: int, batch_size: int, step_prompts: int, cache_bytes: int) -> _Found:
    with masks.inactive():
        landscape, sample, pairs = survey(masks, prompts, budget, both_ways=budget.loss is kl_divergence, batch_size=batch_size,
                                          cache_bytes=cache_bytes)
        stages = Stages(landscape, sample, step_prompts=step_prompts, generator=generator, record=record)
        minimal = stages.run(steps=steps, exact_tests=exact_tests, start=start)
        masks.ablation = landscape.with_coarse(stages.best.ablation)
        circuit = landscape.circuit(stages.best.kept, masks.ablation)
    kl = binary_loss(model, circuit, prompts, budget.loss, batch_size)
    task = {"p_value": pairs.p_value, "no_task": pairs.no_task} if pairs else {}
    order = NodeScores.from_flat(stages.order, masks.space)
    return _Found(circuit, kl, order, minimal=minimal, gap=stages.gap, **task)  # type: ignore[arg-type]


def _paper(masks: NodeMasks, model: Any, prompts: PromptPairs, objective: PaperObjective, record: Record, generator: torch.Generator,
           *, batch_size: int, cache_bytes: int) -> _Found:
    with masks.inactive():
        ablation = masks.asked_ablation.fit(model, prompts, masks.space.hooks, batch_size=batch_size)
        reference = Reference(model, prompts, ablation, masks.space.hooks, batch_size=batch_size, cache_bytes=cache_bytes)
    masks.ablation = ablation
    with torch.enable_grad():
        objective.train(masks, reference, generator, record)
    circuit = masks.to_circuit()
    order = NodeScores({key: masks.score(key) for key in masks.space.free()}, masks.space)
    return _Found(circuit, binary_loss(model, circuit, prompts, kl_divergence, batch_size), order)


def binary_loss(model: Any, circuit: Circuit, prompts: PromptPairs, loss: LossFn, batch_size: int) -> float:
    """Mean loss of a binary circuit against the full model, measured without any search shortcut."""
    with masks_off(model):
        full = torch.cat([full_logits(model, batch) for batch in prompts.batches(batch_size)])
        logits = circuit_logits(model, circuit, prompts, batch_size=batch_size)
    return float(loss(logits, full, prompts).mean())


def _peak_memory(model: Any) -> int:
    if device_of(model).type == "cuda":
        return torch.cuda.max_memory_allocated(device_of(model))
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


NodeMasks.prune = prune
