"""Size against faithfulness: ours, the reference method and the baselines on every task, in one run on one machine.

`python tests/benchmarks/frontier.py --out DIR` (or `make bench-frontier`) writes results.json after each measurement, and table.md
and frontier.html after each task and seed. What DIR holds already is not run again. The stories3M tasks need TL_NODEPRUNE_MODELS.

A seed draws the split (half of the prompts that the full model answers right to search on, the others held out; the same for every
method) and is the search's own seed. Sizes are live leaf nodes of the full node space without those that change nothing
(`baselines.lift`), for every method alike.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import torch

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS / folder) for folder in ("benchmarks", "golden", "integration") if str(TESTS / folder) not in sys.path]

import baselines  # noqa: E402
import report  # noqa: E402
import test_planted as planted  # noqa: E402
import test_stories as stories  # noqa: E402
from baselines import PAPER_GRANULARITIES, attached  # noqa: E402
from report import EQUAL_BUDGET, Results, budget_name  # noqa: E402
from today import TODAY, TODAY_BUDGET, against_today  # noqa: E402
from trained import STEPS, TRAINED  # noqa: E402

import tl_nodeprune as tlnp  # noqa: E402
from tl_nodeprune.masks.landscape import Landscape  # noqa: E402
from tl_nodeprune.nodes.probe import find_nodes  # noqa: E402
from tl_nodeprune.search.budget import DISAGREEMENT, PER_NAT  # noqa: E402

TOYS = tuple(f"toy/{name}" for name in ("ioi", "gendered_pronoun", "greater_than"))
STORIES = tuple(f"stories3M/{name}" for name in stories.TASKS)
LAMS, BUDGETS = (0.90, 0.95, 0.97, 0.98, 0.99, 0.995), (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
MARGIN = 1.6  # of the held-out KL of a paper run over the budget of ours that is aimed at it
NEAR = 1.15  # budgets closer than this are not both run
AIMS, CLOSE = 3, 0.75  # runs aimed at one of the paper's, at most; KL over the paper run's that is close enough below it
NEXT, LOWEST = 0.85, 0.25  # the next budget over the last: NEXT times what proportion says; at least LOWEST, or 1 / NEXT where
# more is wanted; at most 1 / LOWEST
ONE_GRANULARITY = {"head": "ours, heads only", "mlp_neuron": "ours, MLP neurons only"}
LENS, DRAWS = "attribution, TransformerLens, whole heads and MLPs", 10


@cache
def load(task: str, n: int) -> tuple[Any, tlnp.PromptPairs]:
    """A model and those of the task's prompts that it answers right, of `n` for the embedded model."""
    name, which = task.split("/")
    model, prompts = tlnp.toy.load(which, n=n) if name == "toy" else (stories_model(name), stories.task(name, which))
    return model, prompts.correct(model)


@cache
def stories_model(name: str) -> Any:
    return stories.load(name)


class Bench:
    """One task and seed: the methods, each measured on the same held-out prompts and added to the results.

    search_seeds: of more searches of ours on the same split.
    """

    def __init__(self, results: Results, task: str, seed: int, options: argparse.Namespace, search_seeds: list[int]) -> None:
        self.results, self.task, self.seed, self.options, self.search_seeds = results, task, seed, options, search_seeds
        self.model, prompts = load(task, options.toy_prompts)
        self.train, self.test = prompts.split(0.5, seed=seed)
        self.space = find_nodes(self.model).restrict()

    def run(self) -> None:
        """The parts asked for, in their order."""
        for part, method in self.PARTS.items():
            if part in self.options.parts:
                method(self)

    def paper(self) -> None:
        self.reference("paper", self.options.lams, summed=False)
        self.reference("paper, summed", self.options.summed_lams, summed=True)

    def reference(self, kind: str, lams: list[float], *, summed: bool) -> None:
        steps = self.options.paper_steps
        for lam in lams:
            objective = tlnp.PaperObjective(lam=lam, steps=steps, warmup=steps * 2 // 3, summed=summed)
            self.prune(kind, f"{kind}, lam {lam:g}", PAPER_GRANULARITIES, objective=objective, noted={"lam": lam})

    def ours(self) -> None:
        for budget in self.options.budgets:
            self.prune("ours", budget_name(budget), max_kl=budget)

    def one_granularity(self) -> None:
        for granularity, name in ONE_GRANULARITY.items():
            self.prune("one granularity", name, (granularity,), max_kl=EQUAL_BUDGET)

    def stability(self) -> None:
        for seed in self.search_seeds:
            self.prune("stability", f"{budget_name(EQUAL_BUDGET)}, search seed {seed}", search_seed=seed, max_kl=EQUAL_BUDGET)

    def match_paper(self) -> None:
        """Runs of ours aimed at the held-out KL of each paper run, asked for no more of the full model's choices than that has. Where one
        is above that KL, or is neither half as large nor both smaller and close to it, another with another budget, midway between
        those that were too low and too high once there are both; `AIMS` at most."""
        for paper in self.rows("paper") + self.rows("paper, summed"):
            wanted, low, high = paper["kl"] / MARGIN, 0.0, math.inf
            for aim in range(AIMS if wanted > 0 else 0):
                row = self.aimed(paper, f"ours, for {paper['method']}" + f", aim {aim + 1}" * (aim > 0), wanted)
                within, close = row["kl"] <= paper["kl"], row["kl"] >= CLOSE * paper["kl"]
                if within and (row["size"] <= paper["size"] / 2 or close and row["size"] <= paper["size"]):
                    break
                low, high = (max(low, row["max_kl"]), high) if within else (low, min(high, row["max_kl"]))
                step = max(NEXT * paper["kl"] / max(row["kl"], 1e-9), 1 / NEXT if within else LOWEST)
                bracketed = low > 0 and high < math.inf
                wanted = math.sqrt(low * high) if bracketed else row["max_kl"] * min(step, 1 / LOWEST)

    def aimed(self, paper: dict[str, Any], method: str, wanted: float) -> dict[str, Any]:
        """A run of ours at a budget, unless one with nearly that budget is there that is as good to compare."""
        usual = 1 - max(DISAGREEMENT, PER_NAT * wanted)
        near = [row for row in self.rows("ours") if wanted / NEAR <= row["max_kl"] <= wanted * NEAR and paper["accuracy"] >= usual]
        if near:
            return near[0]
        self.prune("ours", method, max_kl=wanted, agreement=min(usual, paper["accuracy"]))
        return next(row for row in self.rows("ours") if row["method"] == method)

    def rows(self, kind: str) -> list[dict[str, Any]]:
        return [e for e in self.results.entries if (e["task"], e["seed"], e["kind"]) == (self.task, self.seed, kind)]

    def prune(self, kind: str, method: str, granularities: tuple[str, ...] | None = None, *, search_seed: int | None = None,
              noted: dict[str, Any] | None = None, **search: Any) -> tlnp.PruneResult | None:
        """Search, unless it is there already, and add what was found."""
        if self.results.has(self.task, self.seed, method):
            return None
        if "objective" not in search:
            search |= self.options.search
        search_seed = self.seed if search_seed is None else search_seed
        with attached(self.model, granularities) as masks, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "(no circuit within the budget|the budget is untested)")
            start = time.process_time()
            result = masks.prune(self.train, seed=search_seed, progress=False, **search)
        seconds = time.process_time() - start
        found = {"converged": result.converged, "train_kl": result.search_kl, "own_kl": result.kl, "interval": result.interval,
                 "minimal": result.minimal, "tested": result.tested, "ruled_out": result.ruled_out, "steps": len(result.history)}
        more = against_today(self.task, result, self.model, self.space, self.test) if kind == "today" else {}
        self.add(kind, method, result.circuit, seconds=seconds, search_seed=search_seed, max_kl=search.get("max_kl"), **found, **more,
                 **(noted or {}))
        return result

    def add(self, kind: str, method: str, circuit: tlnp.Circuit, **noted: Any) -> None:
        circuit = baselines.lift(circuit, self.space)
        found = tlnp.evaluate(self.model, circuit, self.test)
        self.results.add(self.task, self.seed, method, kind=kind, size=circuit.size, size_total=circuit.size_total, kl=found.kl,
                         accuracy=found.accuracy, exact_match=found.exact_match, faithfulness=found.faithfulness,
                         nodes=circuit.count(), parameters=circuit.parameters, circuit=report.packed(circuit), **noted)

    def today(self) -> None:
        """One run at the budget of issue 20's figures, beside what the search before it came to; only tasks that have such a figure."""
        if self.task in TODAY:
            self.prune("today", f"today's figure, max_kl {TODAY_BUDGET:g}", max_kl=TODAY_BUDGET)

    def equal_size(self) -> None:
        """The baselines, as large as ours at the budget that all comparisons at equal size are made at."""
        (ours,) = (row for row in self.rows("ours") if row["method"] == budget_name(EQUAL_BUDGET))
        with attached(self.model) as masks, masks.inactive():
            land = baselines.landscape(masks, self.train)
            for name, scores in baselines.SCORES.items():
                self.equal(name, lambda scores=scores: baselines.top(land, scores(land), ours["size"]))
            for name, scores in TRAINED.items():
                steps = self.options.trained_steps or STEPS[name]
                self.equal(name, lambda scores=scores, steps=steps: baselines.top(land, scores(land, steps=steps, seed=self.seed),
                                                                                 ours["size"]), kind="trained")
            self.random(land, ours["size"])
        self.equal(LENS, lambda: baselines.lens_attribution(land, ours["size"]))

    def equal(self, method: str, make: Callable[[], tlnp.Circuit], kind: str = "") -> None:
        if self.results.has(self.task, self.seed, method):
            return
        start, kind = time.process_time(), kind or method.split(",")[0]
        try:
            circuit = make()
        except (ImportError, AttributeError, NotImplementedError, RuntimeError, ValueError) as error:
            self.results.add(self.task, self.seed, method, kind=kind, note=f"not available: {type(error).__name__}: {error}")
        else:
            self.add(kind, method, circuit, seconds=time.process_time() - start)

    def random(self, land: Landscape, size: int) -> None:
        if self.results.has(self.task, self.seed, report.RANDOM_BEST):
            return
        circuits = [baselines.random(land, size, seed=DRAWS * self.seed + i) for i in range(DRAWS)]
        found = [tlnp.evaluate(self.model, circuit, self.test) for circuit in circuits]
        draws = pd.DataFrame({"size": [float(circuit.size) for circuit in circuits],
                              **{name: [getattr(each, name) for each in found] for name in ("kl", "accuracy")}})
        for method, row in ((report.RANDOM_MEAN, draws.mean()), (report.RANDOM_BEST, draws.loc[draws["kl"].idxmin()])):
            self.results.add(self.task, self.seed, method, kind="random", size_total=land.n, draws=draws["kl"].tolist(), **row.to_dict())

    PARTS = {"paper": paper, "ours": ours, "match": match_paper, "single": one_granularity, "stability": stability, "equal": equal_size,
             "today": today}


def run_planted(results: Results, seed: int, options: argparse.Namespace) -> None:
    """Exact recovery of the planted circuits, at every granularity, and the negative control: labels that tell nothing."""
    plants = ("lookup", "conjunction") if options.quick else tuple(planted.planted.PLANTS)
    for name, which in planted.CASES:
        if results.has("planted", seed, f"{name}, {which}") or name not in plants or options.quick and which not in planted.COARSE:
            continue
        wired, search = planted.plant(name, seed), {"steps": 40} if which in planted.COARSE else options.search
        result = planted.prune(wired, wired.prompts(24, seed), which, seed, **search)
        found, answers = planted.nodes_of(result.circuit), wired.answers(result.circuit.space)
        nearest = min(answers, key=lambda answer: len(answer ^ found))
        results.add("planted", seed, f"{name}, {which}", kind="planted", which=which, exact=found in answers, seconds=result.seconds,
                    missing=len(nearest - found), too_many=len(found - nearest), converged=result.converged, train_kl=result.search_kl)
    for name in plants:
        if not results.has("planted", seed, f"{name}, negative control"):
            wired = planted.plant(name, seed)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                claimed = planted.claims_a_circuit(wired, planted.exchanged(wired.prompts(24, seed), seed=seed))
            results.add("planted", seed, f"{name}, negative control", kind="control", converged=claimed)


def options_of(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--take", nargs="+", type=Path, default=[], metavar="DIR", help="take up the measurements of other folders first")
    parser.add_argument("--tasks", nargs="+", default=[*TOYS, *STORIES], choices=[*TOYS, *STORIES, "planted"], metavar="TASK",
                        help=f"some of {', '.join([*TOYS, *STORIES])}; planted alone leaves the others out")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--lams", nargs="+", type=float, default=list(LAMS))
    parser.add_argument("--summed-lams", nargs="*", type=float, default=[0.95], help="of the paper's objective with its penalty summed")
    parser.add_argument("--budgets", nargs="+", type=float, default=list(BUDGETS), help=f"{EQUAL_BUDGET} is always among them")
    parser.add_argument("--paper-steps", type=int, default=1500)
    parser.add_argument("--steps", type=int, help="of our searches; by default more for more nodes")
    parser.add_argument("--trained-steps", type=int, help="of the trained baselines; by default their own, "
                        + ", ".join(f"{name} {steps}" for name, steps in STEPS.items()))
    parser.add_argument("--toy-prompts", type=int, default=100, help="of each task of the embedded model")
    parser.add_argument("--parts", nargs="+", default=[part for part in Bench.PARTS if part != "today"], choices=list(Bench.PARTS),
                        metavar="PART", help=f"some of {', '.join(Bench.PARTS)}; equal needs ours. today: issue 20's figures, to be run as "
                                             "--parts today --tasks stories3M/... --seeds 1 --threads 1")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="toy tasks, one seed, two lams, one budget, few steps: does it run?")
    options = parser.parse_args(arguments)
    if options.quick:
        options.tasks, options.seeds, options.lams, options.budgets = list(TOYS), [0], [0.95, 0.99], [EQUAL_BUDGET]
        options.paper_steps, options.steps, options.toy_prompts, options.trained_steps = 60, 20, 24, 4
    options.budgets = sorted({*options.budgets, EQUAL_BUDGET})
    options.search = {"steps": options.steps} | ({"exact_tests": 4} if options.quick else {})
    return options


def main(arguments: list[str] | None = None) -> Path:
    """Run what is missing in the folder, write, and return the folder."""
    options = options_of(arguments)
    torch.set_num_threads(options.threads)
    settings = {name: getattr(options, name) for name in ("paper_steps", "steps", "trained_steps", "toy_prompts", "threads", "quick")}
    results, first = Results(options.out, settings), options.seeds[0]
    for folder in options.take:
        results.take(folder / "results.json")
        results.write()
    tasks = [task for task in options.tasks if task != "planted"]
    if not os.environ.get("TL_NODEPRUNE_MODELS") and any(task in STORIES for task in tasks):
        print("TL_NODEPRUNE_MODELS is not set: the stories3M tasks are left out.", flush=True)
        tasks = [task for task in tasks if task not in STORIES]
    for seed in options.seeds:
        for task in tasks:
            start = time.perf_counter()
            more = 1 if options.quick else 2
            Bench(results, task, seed, options, [seed + i + 1 for i in range(more)] if seed == first else []).run()
            report.write(results)
            print(f"{task} seed {seed}: {time.perf_counter() - start:.0f} s", flush=True)
        run_planted(results, seed, options)
        report.write(results)
    print((options.out / "table.md").read_text())
    return options.out


if __name__ == "__main__":
    main()
