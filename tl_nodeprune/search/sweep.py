"""`sweep`: circuits over several budgets and seeds, for the frontier of size against faithfulness and for how stable they are."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from tl_nodeprune.circuit import Circuit, Evaluation, evaluate
from tl_nodeprune.masks import Ablation, as_ablation, make_node_masks
from tl_nodeprune.nodes import check_agreement, check_counts, check_model, check_seed, check_several, check_types, device_of, find_nodes
from tl_nodeprune.prompts import PromptPairs
from tl_nodeprune.search.parallel import in_tasks, is_loader
from tl_nodeprune.search.prune import prune
from tl_nodeprune.search.result import PruneResult


@dataclass(frozen=True)
class SweepRun:
    """One search of a sweep. max_kl: its budget, nats; seed: of its split and its draws; held_out: on the prompts it did not see."""

    max_kl: float
    seed: int
    result: PruneResult
    held_out: Evaluation


@dataclass(frozen=True)
class Sweep:
    """What `sweep` found: a run per seed and budget, by seed, each from the smallest budget to the largest."""

    runs: tuple[SweepRun, ...]

    def to_frame(self) -> pd.DataFrame:
        """A row per run.

        max_kl: nats; nodes, share: live leaf nodes, count and share of all; held_out_kl, accuracy, faithfulness: on the held-out
        prompts, see `Evaluation`; search_kl: nats, on the prompts of the search; seconds: wall time, of the first budget with the training.
        """
        return pd.DataFrame([_row(run) for run in self.runs])

    def frontier(self) -> pd.DataFrame:
        """Nodes against held-out KL: a row per max_kl with the median over seeds of every column of `to_frame`; "converged" is
        the share of seeds that met the budget."""
        table = self.to_frame().drop(columns="seed").groupby("max_kl")
        medians = table.median(numeric_only=True)
        return medians.assign(converged=table["converged"].agg(lambda met: sum(one is True for one in met) / len(met))).reset_index()

    def frequency(self, max_kl: float) -> dict[str, Float[Tensor, "..."]]:
        """The share of seeds whose circuit keeps each node, 0 to 1: hook name -> tensor shaped as a circuit's mask at that hook.

        Raises: ValueError for a max_kl that was not swept.
        """
        check_types(Sweep.frequency, locals())
        circuits = self._circuits(max_kl).values()
        return {hook: torch.stack([circuit[hook] for circuit in circuits]).mean(0) for hook in next(iter(circuits))}

    def iou(self, max_kl: float) -> pd.DataFrame:
        """Intersection over union of live leaf nodes between every two seeds' circuits, 0 to 1; rows and columns are seeds.

        Raises: ValueError for a max_kl that was not swept.
        """
        check_types(Sweep.iou, locals())
        circuits = self._circuits(max_kl)
        table = {seed: {other: circuit.iou(circuits[other]) for other in circuits} for seed, circuit in circuits.items()}
        return pd.DataFrame(table).rename_axis(index="seed", columns="seed")

    def consensus(self, max_kl: float, share: float = 0.5) -> Circuit:
        """The leaf nodes that are live in at least `share` of the seeds' circuits, and what stands above them.

        The ablation is the circuits' own; constants ("mean", "optimal") are their mean over seeds. No run has tested this
        circuit against the budget: `evaluate` it.

        Raises: ValueError for a max_kl that was not swept, or a share that is not above 0 and at most 1.
        """
        check_types(Sweep.consensus, locals())
        if not 0 < share <= 1:
            raise ValueError(f"share={share}; it must be above 0 and at most 1 (1: only nodes that every seed's circuit keeps).")
        circuits = list(self._circuits(max_kl).values())
        # what is above a live node is live too, so a parent never has fewer votes than what is below it
        votes = {key: torch.stack([circuit.live(*key) for circuit in circuits]).double().mean(0) for key in circuits[0].space.shapes}
        gates = {key: vote >= share - 1e-9 for key, vote in votes.items()}
        return Circuit(circuits[0].space, gates, _mean_ablation([circuit.ablation for circuit in circuits]))

    def _circuits(self, max_kl: float) -> dict[int, Circuit]:
        found = {run.seed: run.result.circuit for run in self.runs if math.isclose(run.max_kl, max_kl)}
        if not found:
            swept = ", ".join(str(value) for value in dict.fromkeys(run.max_kl for run in self.runs))
            raise ValueError(f"max_kl={max_kl} was not swept; swept were {swept or 'none'}.")
        return found

    def __repr__(self) -> str:
        seeds = list(dict.fromkeys(run.seed for run in self.runs))
        return f"{len(self.runs)} runs, seeds {seeds}; medians over seeds\n{self.frontier().round(4).to_string(index=False)}"


@dataclass(frozen=True)
class _Work:
    """All that one seed's runs need except the model."""

    seed: int
    budgets: tuple[float, ...]
    prompts: PromptPairs
    share: float
    granularities: tuple[str, ...] | None
    ablation: Ablation
    agreement: float | None
    search: dict[str, Any]

    def fitted(self, model: Any) -> Ablation:
        """The ablation, "mean" with the means of all prompts: one of these must reach as far as any, and the same for all seeds."""
        if self.ablation.name != "mean":
            return self.ablation
        hooks = find_nodes(model).restrict(self.granularities).hooks
        return self.ablation.fit(model, self.prompts.to(device_of(model)), hooks, batch_size=self.search["batch_size"])


def sweep(
    model: Any | Callable[[], Any], prompts: PromptPairs, *, max_kl: Sequence[float] = (0.02, 0.05, 0.1, 0.2),
    seeds: Sequence[int] = (0, 1, 2), granularities: str | Iterable[str] | None = None, ablation: str | Ablation = "interchange",
    share: float = 0.75, agreement: float | None = None, steps: int | None = None, batch_size: int = 64,
    executor: Executor | None = None, progress: bool = True,
) -> Sweep:
    """The smallest circuit within each budget of `max_kl`, for each seed: size against held-out KL, and how stable it is.

    A seed draws its own split of the prompts, `prompts.split(share, seed)`: the first part is searched on, the rest judges.
    It is the search's seed as well. So what differs between seeds is the prompts and the draws: a search on the same prompts
    is deterministic or nearly so, and agreement between its repeats would say little. A seed is one run; its budgets are cut from
    that run's order of the nodes, and finished, one by one (`PruneResult.at`).

    model: a HookedTransformer or TransformerBridge, left as it was. Or a function without arguments that returns a new one at each call.
    prompts: two pairs or more.
    max_kl: the budgets, nats.
    seeds: one run each.
    granularities: which nodes to gate, as in `add_node_masks`. None: all that the model has.
    ablation: as in `add_node_masks`. "mean" that is not fitted is of all prompts, the held-out ones too, so that it reaches as far as
        they do and is the same for all seeds.
    share: of the prompts that a seed searches on.
    agreement: share of equal choices, as in `prune`.
    steps: of each search, as in `prune`.
    batch_size: prompts per forward.
    executor: any concurrent.futures Executor, one task per seed (ThreadPoolExecutor, ProcessPoolExecutor, loky, Dask's
        `client.get_executor()`, mpi4py's pools). None: here, one seed after the other. Every task works on a model of its own:
        in threads a copy; in other processes the pickled model, or, since a TransformerBridge cannot be pickled, what a
        function that can be imported there returns. Start processes by "spawn" or "forkserver": torch's threads can hang in
        forked ones. No result holds a model, and its tensors are on the CPU.
    progress: whether to show a bar over all runs.

    Raises: ValueError for max_kl or seeds that are empty, given twice or out of range, steps or batch_size below 1, fewer than 2 prompts,
    a share that is not between 0 and 1, an agreement that is not a share; TypeError for what is of another type, and a model that the
    executor's processes cannot be given; RuntimeError where node masks or a circuit are attached; all before any search begins. Then
    what `prune` raises; tasks not begun are cancelled.
    """
    check_types(sweep, locals())
    check_counts(steps=1 if steps is None else steps, batch_size=batch_size)
    check_agreement(agreement)
    search = {"steps": steps, "batch_size": batch_size}
    works = _works(prompts, _budgets(max_kl), _seeds(seeds), share, granularities, as_ablation(ablation), agreement, search)
    if not is_loader(model):
        check_model(model)
        _check(model, works[0])
    with tqdm(total=len(works) * len(works[0].budgets), desc="sweep", disable=not progress) as bar:
        if executor is None:
            here = model() if is_loader(model) else model
            found = [_runs(here, work, bar.update) for work in works]
        else:
            found = in_tasks(executor, _runs, model, works, done=lambda: bar.update(len(works[0].budgets)))
    return Sweep(tuple(run for runs in found for run in runs))


def _works(prompts: PromptPairs, budgets: tuple[float, ...], seeds: tuple[int, ...], share: float,
           granularities: str | Iterable[str] | None, ablation: Ablation, agreement: float | None, search: dict[str, Any]) -> list[_Work]:
    names = (granularities,) if isinstance(granularities, str) else None if granularities is None else tuple(granularities)
    prompts.split(share, seeds[0])  # raises where they cannot be, before any search
    return [_Work(seed, budgets, prompts, share, names, ablation, agreement, search) for seed in seeds]


def _budgets(given: Sequence[float]) -> tuple[float, ...]:
    values = check_several("max_kl", given, "(0.05, 0.1)")
    for value in values:
        if not 0 < value < float("inf"):
            raise ValueError(f"max_kl={values} holds {value}; each must be a finite number above 0 (nats).")
    return tuple(sorted(float(value) for value in values))


def _seeds(given: Sequence[int]) -> tuple[int, ...]:
    values = check_several("seeds", given, "(0, 1, 2)")
    for value in values:
        check_seed(value)
    return tuple(int(value) for value in values)


def _check(model: Any, work: _Work) -> None:
    """Raises what each task would: nodes that are not there, masks or a circuit attached, prompts that do not fit."""
    make_node_masks(model, work.granularities, ablation=work.ablation)
    work.prompts.check_fits(model)


def _runs(model: Any, work: _Work, done: Callable[[], object] = lambda: None) -> list[SweepRun]:
    """One seed's run, cut and finished at each budget from the smallest to the largest. The model is left without masks."""
    _check(model, work)
    train, held_out = work.prompts.to(device_of(model)).split(work.share, work.seed)
    masks = make_node_masks(model, work.granularities, ablation=work.fitted(model))
    found: list[PruneResult] = []
    with masks.on(model):
        for max_kl in work.budgets:  # that a budget is untested stands in the table
            found.append(found[0].at(max_kl=max_kl, agreement=work.agreement, finish=masks) if found else
                         prune(masks, train, max_kl=max_kl, agreement=work.agreement, held_out=held_out, seed=work.seed, progress=False,
                               **work.search))
            done()
    return [SweepRun(max_kl, work.seed, result, evaluate(model, result.circuit, held_out, batch_size=work.search["batch_size"]))
            for max_kl, result in zip(work.budgets, found, strict=True)]


def _mean_ablation(given: list[Ablation]) -> Ablation:
    constants = {hook: torch.stack([one.constants[hook] for one in given]).mean(0) for hook in given[0].constants}
    return Ablation(given[0].name, constants)


def _row(run: SweepRun) -> dict[str, Any]:
    circuit, held_out = run.result.circuit, run.held_out
    return {"max_kl": run.max_kl, "seed": run.seed, "converged": run.result.converged, "nodes": circuit.size, "share": 1 - circuit.sparsity,
            "held_out_kl": held_out.kl, "search_kl": run.result.search_kl, "accuracy": held_out.accuracy,
            "faithfulness": held_out.faithfulness, "seconds": run.result.seconds}
