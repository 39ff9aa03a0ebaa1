"""`prune`: from attached masks and prompts to the smallest circuit within a budget."""

from __future__ import annotations

import resource
import sys
import time
import warnings
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from tqdm.auto import tqdm

from tl_nodeprune.ablation import batches
from tl_nodeprune.circuit import Circuit, circuit_logits, full_logits
from tl_nodeprune.hooks import check_ready, device_of, find_attachment
from tl_nodeprune.landscape import GIVEN, TURNED, Budget, Landscape, Snapshot
from tl_nodeprune.masks import NodeMasks, masks_off
from tl_nodeprune.nodes import GateKey
from tl_nodeprune.objective import LossFn, PaperObjective, Reference, check_finite, kl_divergence
from tl_nodeprune.prompts import PromptPairs
from tl_nodeprune.refine import Refinement
from tl_nodeprune.search import Search

TURNED_SHARE = 0.5
ROUND_COST = 12  # steps of the search that are worth one round of the refinement


@dataclass(frozen=True)
class Step:
    """One step of a search. kl: nats (or the loss given), mean over the step's prompts; size: nodes open; coefficient:
    the score at the cut for the default search, lam for PaperObjective."""

    step: int
    kl: float
    size: int
    coefficient: float


@dataclass(frozen=True)
class PruneResult:
    """What a search found. kl: the binary circuit's mean loss on the prompts it was found on (nats for KL).

    converged: whether the budget is met, measured so. seconds: wall time. peak_memory: bytes, the process's peak on CPU
    (since its start), the allocator's on CUDA (since the search began).
    """

    circuit: Circuit
    converged: bool
    kl: float
    history: list[Step] = field(repr=False)
    seconds: float
    peak_memory: int

    def to_frame(self) -> pd.DataFrame:
        """The history, a row per step."""
        return pd.DataFrame(self.history)


def prune(
    masks: NodeMasks, prompts: PromptPairs, *, max_kl: float | None = None, max_nodes: float | int | None = None,
    loss: LossFn | None = None, max_loss: float | None = None, objective: PaperObjective | None = None,
    steps: int = 300, exact_tests: int = 64, batch_size: int = 64, step_prompts: int = 128, cache_bytes: int = 2 << 30,
    seed: int = 0, progress: bool = True,
) -> PruneResult:
    """The smallest circuit whose KL(full || circuit) at the answer positions is at most `max_kl` nats, or the most faithful
    one of at most `max_nodes` leaf nodes. The masks are left at that circuit, still attached.

    Give one of: max_kl (nats); max_nodes (a float is a share of the leaf nodes, an int a count); loss with max_loss, a loss of
        your own, fn(circuit_logits, full_logits, prompts) -> [batch], bounded in its mean; objective, the paper's, run as it is.
    steps: at most; the search stops earlier when nothing improves. step_prompts: prompts per step, more are drawn from at random.
    batch_size: prompts per forward (memory, not result). cache_bytes: stand-ins are kept up to this, recomputed above.
    seed: same seed, same machine, same circuit.

    With max_kl the circuit must also choose between answer and wrong answer as the full model does on 98 % of the prompts; and
    where the full model on corrupted prompts prefers the wrong answer, as when the corruption swaps two names, those pairs
    are searched on in both directions, which makes the circuit hold on fresh prompts (docs/decisions).

    Raises: ValueError for a budget that is missing, doubled or not above 0, or prompts that do not fit the model; RuntimeError
    where the masks are not attached, another circuit is applied, or the model is in training mode with dropout;
    FloatingPointError at the step where logits are NaN or inf. The model and the masks are then as before.
    """
    budget = _budget(masks, max_kl, max_nodes, loss, max_loss, objective)
    model = _ready(masks, prompts)
    for name, value in (("steps", steps), ("batch_size", batch_size), ("step_prompts", step_prompts)):
        if value < 1:
            raise ValueError(f"{name}={value}; it must be 1 or more.")
    start, generator = time.perf_counter(), torch.Generator().manual_seed(seed)
    history: list[Step] = []
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    before = ({name: p.detach().clone() for name, p in masks.scores.items()}, masks.gate, masks.ablation)
    with tqdm(total=objective.steps if objective else steps, desc="prune", disable=not progress) as bar:
        def record(step: int, kl: float, size: int, coefficient: float) -> None:
            history.append(Step(step, kl, size, coefficient))
            bar.set_postfix(kl=f"{kl:.4f}", nodes=size, refresh=False)
            bar.update()

        try:
            if objective:
                found = _paper(masks, model, prompts, objective, record, generator, batch_size=batch_size, cache_bytes=cache_bytes)
            else:
                found = _search(masks, model, prompts, budget, record, generator, steps=steps, exact_tests=exact_tests,
                                batch_size=batch_size, step_prompts=step_prompts, cache_bytes=cache_bytes)
        except BaseException:
            masks.gate, masks.ablation = before[1:]
            with torch.no_grad():
                for name, score in before[0].items():
                    masks.scores[name].copy_(score)
            raise
    circuit, kl = found
    masks.set_to(circuit)
    converged = objective is not None or kl <= budget.max_loss or budget.max_size is not None
    if not converged:
        warnings.warn(f"no circuit within the budget was found: the loss is {kl:.4f}, {kl - budget.max_loss:.4f} above {budget.max_loss}.",
                      stacklevel=2)
    return PruneResult(circuit, converged, kl, history, time.perf_counter() - start, _peak_memory(model))


def _budget(masks: NodeMasks, max_kl: float | None, max_nodes: float | int | None, loss: LossFn | None, max_loss: float | None,
            objective: PaperObjective | None) -> Budget:
    given = {"max_kl": max_kl, "max_nodes": max_nodes, "max_loss": max_loss, "objective": objective}
    chosen = [name for name, value in given.items() if value is not None]
    if len(chosen) != 1:
        raise ValueError(f"give exactly one of max_kl, max_nodes, loss with max_loss, or objective; got {' and '.join(chosen) or 'none'}.")
    if (loss is None) != (max_loss is None):
        raise ValueError("loss and max_loss go together: a loss of your own and what its mean may be at most.")
    limit = max_kl if max_kl is not None else max_loss
    if limit is not None and not 0 < limit < float("inf"):
        raise ValueError(f"{chosen[0]}={limit}; it must be a finite number above 0 (nats for max_kl; 0.05 is a good start).")
    if limit is not None:
        return Budget(loss or kl_divergence, limit)
    return Budget(max_size=None if max_nodes is None else _count(max_nodes, sum(masks.score(k).numel() for k in masks.space.leaves())))


def _count(max_nodes: float | int, total: int) -> int:
    is_share = isinstance(max_nodes, float)
    count = round(max_nodes * total) if is_share and 0 < max_nodes <= 1 else 0 if is_share else max_nodes
    if not 1 <= count <= total:
        raise ValueError(f"max_nodes={max_nodes}; give a share above 0 and up to 1.0 as a float, or a count of 1 to {total} as an int.")
    return int(count)


def _ready(masks: NodeMasks, prompts: PromptPairs) -> Any:
    model = masks.model
    attachment = find_attachment(model)
    if attachment is None or attachment.owner is not masks:
        raise RuntimeError("a circuit is applied to this model; leave its `with` block before pruning.")
    check_ready(model)
    prompts.check_fits(model)
    return model


def _search(masks: NodeMasks, model: Any, prompts: PromptPairs, budget: Budget, record: Any, generator: torch.Generator, *,
            steps: int, exact_tests: int, batch_size: int, step_prompts: int, cache_bytes: int) -> tuple[Circuit, float]:
    with masks.inactive():
        ablation = masks.ablation.fit(model, prompts, masks.space.hooks, batch_size=batch_size)
        searched, groups = sample(model, prompts, budget, batch_size)
        hooks = tuple(hook for hook in masks.space.hooks if any(not masks.space.covered(key) for key in masks.space.at(hook)))
        reference = Reference(model, searched, ablation, hooks, batch_size=batch_size, cache_bytes=cache_bytes)
        landscape = Landscape(masks.space, reference, budget, groups)
        search = Search(landscape, steps=steps, step_prompts=step_prompts, generator=generator, record=record)
        best = search.run()
        landscape.restore(best.ablation)
        refinement = Refinement(landscape, best, search.scores, step_prompts=step_prompts, generator=generator, record=record)
        if budget.loss is kl_divergence:
            refinement.run(rounds=max(steps // ROUND_COST, 1), first_step=steps)
        if budget.max_size is None:
            refinement.minimal(exact_tests)
        best = refinement.best
        circuit = landscape.circuit(_without_moot(landscape, best), best.ablation)
        masks.ablation = best.ablation
    return circuit, binary_loss(model, circuit, prompts, budget.loss, batch_size)


def _paper(masks: NodeMasks, model: Any, prompts: PromptPairs, objective: PaperObjective, record: Any, generator: torch.Generator, *,
           batch_size: int, cache_bytes: int) -> tuple[Circuit, float]:
    with masks.inactive():
        ablation = masks.ablation.fit(model, prompts, masks.space.hooks, batch_size=batch_size)
        reference = Reference(model, prompts, ablation, masks.space.hooks, batch_size=batch_size, cache_bytes=cache_bytes)
    masks.ablation = ablation
    objective.train(masks, reference, generator, record)
    circuit = masks.to_circuit()
    return circuit, binary_loss(model, circuit, prompts, kl_divergence, batch_size)


def sample(model: Any, prompts: PromptPairs, budget: Budget, batch_size: int) -> tuple[PromptPairs, torch.Tensor]:
    """The prompts that a search runs on, and each one's group: GIVEN, or TURNED (see `turned`)."""
    again = turned(model, prompts, batch_size) if budget.loss is kl_divergence else None
    if again is None:
        return prompts, torch.full((len(prompts),), GIVEN)
    both = {name: torch.cat([getattr(prompts, name), getattr(again, name)]) for name in PromptPairs.__dataclass_fields__}
    return PromptPairs(**both), torch.tensor([GIVEN] * len(prompts) + [TURNED] * len(again))


def turned(model: Any, prompts: PromptPairs, batch_size: int) -> PromptPairs | None:
    """Clean and corrupted exchanged, the answers too, for those pairs where the full model prefers the wrong answer on the corrupted
    prompt; None unless it does so at least half as strongly, on average, as it prefers the answer on the clean one, since only
    then the corrupted prompts are prompts of the task themselves."""
    swapped = PromptPairs(prompts.corrupted, prompts.clean, prompts.wrong_answers, prompts.answers, prompts.attention_mask,
                          prompts.answer_positions)
    here, there = (torch.cat([batch.logit_diff(full_logits(model, batch)) for batch in batches(side, batch_size)])
                   for side in (prompts, swapped))
    check_finite(torch.stack([here.mean(), there.mean()]), "the full model")
    if there.mean() < TURNED_SHARE * here.mean() or here.mean() <= 0 or prompts.answers.shape != prompts.wrong_answers.shape:
        return None
    return swapped[(there > 0).nonzero()[:, 0]]


def _without_moot(landscape: Landscape, best: Snapshot) -> torch.Tensor:
    """Kept nodes less those with no effect: output dims of an MLP with no neuron kept, neurons of one with no output dim."""
    flat = best.kept.clone()
    gates = landscape.gates(flat)  # views into `flat`
    for layer in landscape.space.layers:
        neurons, outs = (gates.get(GateKey(name, layer)) for name in ("mlp_neuron", "mlp_out"))
        if neurons is not None and outs is not None and not (neurons.any() and outs.any()):
            neurons.zero_()
            outs.zero_()
    rows = torch.arange(len(landscape.reference.prompts))
    loss, disagreement = landscape.measure(flat.float().to(landscape.reference.full.device), rows)
    return flat if landscape.budget.violation(loss, disagreement) <= max(best.violation, 1) else best.kept


def binary_loss(model: Any, circuit: Circuit, prompts: PromptPairs, loss: LossFn, batch_size: int) -> float:
    """Mean loss of a binary circuit against the full model, measured without any search shortcut."""
    with masks_off(model):
        full = torch.cat([full_logits(model, batch) for batch in batches(prompts, batch_size)])
        logits = circuit_logits(model, circuit, prompts, batch_size=batch_size)
    return float(loss(logits, full, prompts).mean())


def _peak_memory(model: Any) -> int:
    if device_of(model).type == "cuda":
        return torch.cuda.max_memory_allocated(device_of(model))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


NodeMasks.prune = prune
