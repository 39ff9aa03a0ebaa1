"""`prune`: from attached masks and prompts to the smallest circuit within a budget."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import nn

from tl_nodeprune.circuit import Circuit, NodeScores, leaves_of, to_circuit
from tl_nodeprune.masks import Ablation, LossFn, NodeMasks, Reference, kl_divergence
from tl_nodeprune.nodes import check_counts, check_seed, check_types, device_of, peak_memory
from tl_nodeprune.prompts import PromptPairs
from tl_nodeprune.search.attached import on_model
from tl_nodeprune.search.budget import Budget, budget_of
from tl_nodeprune.search.checkpoint import Checkpoint, asked
from tl_nodeprune.search.held_out import set_aside
from tl_nodeprune.search.paper import PaperObjective
from tl_nodeprune.search.result import PruneResult, Step, found, noted, told
from tl_nodeprune.search.run import Progress, Run, Settings, going, searchable


def prune(
    masks: NodeMasks | nn.Module, prompts: PromptPairs, *, max_kl: float | None = None, agreement: float | None = None,
    max_nodes: float | int | Mapping[str, float | int] | None = None, loss: LossFn | None = None, max_loss: float | None = None,
    objective: PaperObjective | None = None, held_out: PromptPairs | None = None, start: Circuit | None = None, steps: int | None = None,
    exact_tests: int = 16, time_limit: float | None = None, checkpoint: str | Path | None = None, batch_size: int = 64,
    step_prompts: int | None = None, cache_bytes: int = 2 << 30, seed: int = 0, progress: bool = True,
    granularities: str | Iterable[str] | None = None, layers: int | Iterable[int] | None = None, ablation: str | Ablation | None = None,
) -> PruneResult:
    """The smallest circuit within a budget of KL, or the most faithful one of a size, judged on prompts that were not searched on.

    Give one budget: max_kl, max_nodes, loss with max_loss, or objective. The masks are left at that circuit, still attached; after an
    objective they have its gate, hard concrete and straight-through.

    masks: attached masks, searched over. Or a model: masks are put on, and taken off at the end, whatever happens.
    prompts: pairs to search on, two different ones at least.
    max_kl: the budget, in nats: the most that KL(full || circuit) at the answer positions may be, in the mean over the prompts held out.
    agreement: with max_kl, share of the prompts on which the circuit must choose between answer and wrong answer as the full model
        does. None: 0.98, or 1 - 0.4 * max_kl where that is less. 0.98 with a large max_kl asks for the choice alone.
    max_nodes: the most live leaf nodes: a float is a share, an int a count; gates above something that is not gated count too. A
        mapping is a share or count of each granularity named, as {"head": 3, "mlp_neuron": 0.05}. A head, block or layer counts as
        one while anything in it is live. Granularities that are not named are not limited: their nodes stay open except where closing
        them clearly makes the circuit more faithful.
    loss: a loss of your own, fn(circuit_logits, full_logits, prompts) -> [batch], lower is better. It needs max_loss.
    max_loss: the most that the mean of `loss` may be on the prompts held out, in the loss's own unit.
    objective: the paper's objective, run as it is, with its own steps and batch size; for comparison.
    held_out: pairs to judge by that are never searched on. None: a quarter of `prompts`, sampled at random, 8 different ones at least
        where there are 24. From fewer the result says that the budget is untested.
    start: a circuit that is there already. It is taken in place of the run's own where it is within the budget and smaller.
    steps: of the training that orders all nodes. None: 260 for 5,000 nodes, 640 for 80,000, 48 at least.
    exact_tests: with max_kl or max_loss, how many leaf nodes are removed one by one at the end to see whether they are needed, the
        likeliest first. Heads and blocks above them are tested too, unless the first prompts rule them out by far.
    time_limit: seconds, about. The best circuit so far is returned then, and `stopped` says so. None: no limit.
    checkpoint: a folder in which the state is kept. A run that was broken off goes on there, to the same circuit. None: nothing is kept.
    batch_size: prompts per forward. It changes memory and time, the result hardly.
    step_prompts: prompts per step, sampled at random. None: 32; 16 for fewer than 1,000 nodes; 64 on CUDA. The cost of a step does
        not grow with the number of prompts.
    cache_bytes: bytes, 2 GiB by default. Stand-ins are kept up to this, and recomputed above it.
    seed: same seed, same machine, same circuit.
    progress: whether to show a bar.
    granularities: with a model, which nodes to gate, as in `add_node_masks`. None: all that the model has.
    layers: with a model, which layers, as in `add_node_masks`. None: all.
    ablation: with a model, as in `add_node_masks`. None: "interchange".

    With max_kl or max_nodes some pairs are searched on in both directions: those on whose corrupted prompt the full model prefers the
    wrong answer, as when the corruption swaps two names. That makes the circuit hold on other prompts (docs/decisions).
    Where 7 clean prompts or more show no preference of the full model for the answer, no circuit is claimed: a warning, and `converged` is
    False. It also warns where some corrupted prompts are the same as the clean ones, and where the budget is not met or untested.

    Raises: ValueError for a budget that is missing, given twice, not above 0, or of nodes that these masks do not gate, an agreement that
    is not a share or without max_kl, prompts that do not fit the model, that are all the same or held out and searched on, a loss without a
    gradient, a start over other nodes or with an objective, a time limit that is not above 0, and a checkpoint of another run; TypeError
    for what is not a number or PromptPairs; OSError for a checkpoint that cannot be written; RuntimeError where the masks are not attached,
    another circuit is applied, the model is in training mode with dropout or gradient checkpointing, or it runs in
    `torch.inference_mode()`; FloatingPointError at the step where logits or the loss are NaN or inf. The model and the masks are then as
    before.
    """
    given = locals()
    check_types(prune, given)
    if not isinstance(masks, NodeMasks) or granularities is not None or layers is not None or ablation is not None:
        return on_model(prune, **given)
    budget = budget_of(masks.space, max_kl=max_kl, agreement=agreement, max_nodes=max_nodes, loss=loss, max_loss=max_loss,
                       objective=objective)
    _check_start(masks, start, objective)
    model = searchable(masks, prompts, stacklevel=3)
    check_seed(seed)
    settings = Settings(steps, batch_size, step_prompts, cache_bytes, seed, time_limit, checkpoint)
    check_counts(0, exact_tests=exact_tests)
    if held_out is not None:
        held_out.check_fits(model, "held_out")
        held_out.check_corrupted(masks.asked_ablation.name)
    searched, held = set_aside(prompts, held_out, seed)
    saved = None if checkpoint is None else Checkpoint(checkpoint, asked(
        masks, prompts, held_out, loss=getattr(budget.loss, "__name__", "loss"), limits=budget.limits and dict(budget.limits.most),
        budget=(budget.max_loss, budget.max_size), steps=steps, step_prompts=step_prompts, seed=seed))
    if device_of(model).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device_of(model))
    with going(masks, "prune", settings, progress) as bar:
        if objective:
            result = _paper(masks, searched, held, objective, settings, bar)
        else:
            with masks.inactive():
                run = Run(masks, searched, held, budget, settings, bar, both_ways=budget.loss is kl_divergence)
                run.train(saved)
                result = found(run, start, exact_tests)
        asks = {"max_kl": max_kl, "agreement": agreement, "max_nodes": max_nodes, "max_loss": max_loss, "objective": objective}
        return told(masks, noted(result, asks, seed), budget, objective=objective is not None, stacklevel=3)


def _check_start(masks: NodeMasks, start: Circuit | None, objective: PaperObjective | None) -> None:
    if start is None:
        return
    if objective is not None:
        raise ValueError("start goes with max_kl, max_nodes or a loss; an objective starts from scores of its own.")
    if start.space.shapes != masks.space.shapes:
        raise ValueError(f"start is a circuit over other nodes, {', '.join(start.space.granularities)} in layers {start.space.layers}, "
                         f"than these masks ({', '.join(masks.space.granularities)} in layers {masks.space.layers}); of other "
                         f"granularities give start.at({list(masks.space.granularities)}).")


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

    generator = torch.Generator().manual_seed(int(settings.seed))
    with torch.enable_grad():
        objective.train(masks, reference, generator, record, bar.over)
    circuit = to_circuit(masks)
    ranking = NodeScores({key: masks.score(key) for key in masks.space.free()}, masks.space)
    with masks.inactive():
        kept = leaves_of(circuit).to(run.landscape.device)
        (judged,) = run.judge([kept], most=None)
        search_kl = float(run.landscape.losses(kept[None].float(), torch.arange(len(searched))).loss.mean())
    return PruneResult(circuit, True, judged.kl, search_kl, history, bar.seconds, peak_memory(model), (judged.low, judged.high),
                       judged.accuracy, ranking=ranking, scores=NodeScores.from_circuit(circuit, within=ranking), searched=searched,
                       held_out=held, stopped="time limit" if bar.over() else "")
