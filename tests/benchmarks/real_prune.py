"""`prune` on a real model beside the paper's objective, given the same prompts and time."""

from __future__ import annotations

import time
import warnings
from typing import Any

import baselines
import torch
from baselines import PAPER_GRANULARITIES, attached
from real_case import Case, synchronise

import tl_nodeprune as tlnp
from tl_nodeprune.nodes.probe import find_nodes

MAX_KL, LAM, PAPER_STEPS = 0.25, 0.95, 1500
FITTED = 0.9  # share of our time that the steps of the paper's objective are fitted into, so that its schedule comes to its end
PRUNE = f"prune, max_kl {MAX_KL:g}"
PAPER = f"PaperObjective, lam {LAM:g}, summed, for as long"
MATCH = "ours at the held-out KL of PaperObjective"


def prune(case: Case) -> None:
    """Ours at MAX_KL; the paper's objective on the same prompts for as long; ours at the KL of that."""
    found = ours(case)
    if not case.has(PAPER):
        steps, each = paper_steps(case, found.seconds)
        objective = tlnp.PaperObjective(lam=LAM, summed=True, steps=steps, warmup=steps * 2 // 3)
        searched(case, PAPER, PAPER_GRANULARITIES, objective=objective, time_limit=found.seconds,
                 noted={"asked_steps": steps, "seconds_per_step": each})
    if not case.has(MATCH):
        match(case, found, torch.load(case.file("paper"), weights_only=False))


def ours(case: Case) -> tlnp.PruneResult:
    """Our search at MAX_KL, its circuit judged on the fresh prompts."""
    return searched(case, PRUNE, None, max_kl=MAX_KL, steps=case.options.steps, step_prompts=case.options.step_prompts,
                    time_limit=case.options.time_limit, held_out=case.sides[1])


def paper_steps(case: Case, seconds: float) -> tuple[int, float]:
    """How many steps of the paper's objective fit into a time, PAPER_STEPS at most, so that its schedule comes to its end."""
    def timed(steps: int) -> float:
        start = time.perf_counter()
        with attached(case.model, PAPER_GRANULARITIES) as masks:
            masks.prune(case.sides[0], objective=tlnp.PaperObjective(lam=LAM, summed=True, steps=steps), seed=case.seed, progress=False,
                        cache_bytes=case.options.cache_bytes, batch_size=case.options.batch_size)
        synchronise(case.options.device)
        return time.perf_counter() - start

    once = timed(1)
    each = max((timed(4) - once) / 3, 1e-3)
    return max(min(PAPER_STEPS, int(FITTED * (seconds - max(once - each, 0)) / each)), 1), each


def searched(case: Case, method: str, granularities: tuple[str, ...] | None, noted: dict[str, Any] | None = None,
             **search: Any) -> tlnp.PruneResult:
    """`prune`, its circuit judged on the fresh prompts; one that is there is read."""
    file = case.file("paper" if "objective" in search else "prune")
    if case.has(method):
        return torch.load(file, weights_only=False)  # type: ignore[no-any-return]
    with attached(case.model, granularities) as masks, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(no circuit within the budget|the budget is untested)")
        result = masks.prune(case.sides[0], seed=case.seed, progress=case.options.bar, batch_size=case.options.batch_size,
                             cache_bytes=case.options.cache_bytes, **search)
    torch.save(result, file)
    add_circuit(case, method, result, history=len(result.history), **(noted or {}))
    return result


def add_circuit(case: Case, method: str, result: tlnp.PruneResult, **noted: Any) -> None:
    circuit = baselines.lift(result.circuit, find_nodes(case.model).restrict())
    found = tlnp.evaluate(case.model, circuit, case.sides[1], batch_size=case.options.batch_size)
    case.add(method, kind="circuit", size=circuit.size, nodes=circuit.size_total, kl=found.kl, right=found.accuracy, own_kl=result.kl,
             interval=result.interval, search_kl=result.search_kl, converged=result.converged, minimal=result.minimal,
             tested=result.tested, ruled_out=result.ruled_out, stopped=result.stopped, seconds=result.seconds, **noted)


def match(case: Case, ours: tlnp.PruneResult, paper: tlnp.PruneResult) -> None:
    """Ours at the KL that the paper's objective has on the prompts held out, from the run that is there; the circuit of the run itself
    where that is as faithful and smaller."""
    found = [ours] if ours.kl <= paper.kl else []
    try:
        with attached(case.model) as masks:
            found.append(ours.at(max_kl=paper.kl, finish=masks if case.options.finish else None))
    except ValueError as error:
        if not found:
            case.add(MATCH, kind="note", note=str(error))
            return
    add_circuit(case, MATCH, min(found, key=lambda one: one.circuit.size))
