"""Designs of soft gates priced by expected live size (soft_gates.py), against the library's search.

`python tests/benchmarks/designs.py --out DIR` prints a Markdown table and writes results.json. All designs have the same pairs (those that
`prune` searches on, both directions where it does), loss, hinge, budget and attribution; they differ in which gates are trained when:

joint: all seven granularities at once. fine only: leaf gates, coarse ones follow. group: the same, with half of the penalty on the sum over
heads and MLPs of the square root of their expected live size. fine then coarse: leaf gates for half of the steps, then coarse ones too.
coarse first: coarse gates for a third of the steps at half of the budget, cut there, then leaf gates inside what is left.

`nodes` are those of the gates thresholded at the end, `within` those of the smallest circuit within the budget found by bisection over the
gates' own order, at the end or at the smallest circuit within the budget met on the way. `finished` is `prune(start=...)` from it; or from
the thresholded circuit, where that is less than half as large and near the budget.
"""

from __future__ import annotations

import argparse
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import baselines
import frontier
import pandas as pd
import report
import torch
from report import EQUAL_BUDGET, Results
from soft_gates import DESIGNS, SETTINGS, Settings, SoftGates

import tl_nodeprune as tlnp
from tl_nodeprune.budget import Budget, Snapshot
from tl_nodeprune.landscape import Landscape
from tl_nodeprune.masks import NodeMasks
from tl_nodeprune.nodes import LEAVES
from tl_nodeprune.objective import Reference
from tl_nodeprune.preference import preference
from tl_nodeprune.probe import find_nodes
from tl_nodeprune.search import Search

NEAR = 1.25  # times the budget


def landscape(masks: NodeMasks, prompts: tlnp.PromptPairs) -> Landscape:
    """As `prune` has it at the bench's budget, its stand-ins for coarse hook points too."""
    sample = preference(masks.model, prompts, 64).sample()
    reference = Reference(masks.model, sample.prompts, masks.ablation, masks.space.hooks)
    return Landscape(masks.space, reference, Budget(max_loss=EQUAL_BUDGET), sample.groups)


class Bench:
    """One task and seed: each design measured and added to the results."""

    def __init__(self, results: Results, task: str, seed: int, options: argparse.Namespace) -> None:
        self.results, self.task, self.seed, self.options = results, task, seed, options
        self.model, prompts = frontier.load(task, options.toy_prompts)
        self.train, self.test = prompts.split(0.5, seed=seed)
        self.space = find_nodes(self.model).restrict()

    def soft(self, design: str, settings: Settings) -> None:
        phases, start = DESIGNS[design], time.process_time()
        trained = [name for name in self.space.granularities if any(name in phase.trained for phase in phases)]
        with frontier.attached(self.model, tuple(trained)) as masks:
            with masks.inactive():
                land = landscape(masks, self.train)
            generator = torch.Generator().manual_seed(self.seed)
            gates = SoftGates(masks, land, settings, grouped=design == "group", generator=generator)
            at_end, within = gates.run(phases, self.options.steps), gates.smallest()
        self.add(design, land, at_end, within, time.process_time() - start)

    def thresholding(self) -> None:
        """Our search without its finish."""
        start = time.process_time()
        with frontier.attached(self.model, LEAVES) as masks, masks.inactive():
            land = landscape(masks, self.train)
            search = Search(land, torch.arange(len(land.groups)), steps=self.options.steps, step_prompts=128, record=lambda *_: None,
                            generator=torch.Generator().manual_seed(self.seed))
            found = search.run()
        self.add("ours, no finish", land, found, found, time.process_time() - start)

    def ours(self) -> None:
        circuit, seconds = self.finish(None, self.options.steps)
        self.results.add(self.task, self.seed, "ours", **self.judged("finished", circuit), seconds=seconds)

    def add(self, method: str, land: Landscape, at_end: Snapshot, within: Snapshot, seconds: float) -> None:
        found = {name: baselines.lift(land.circuit(one.kept, land.reference.ablation), self.space)
                 for name, one in (("nodes", at_end), ("within", within))}
        noted = {"search_kl": at_end.loss, "violation": at_end.violation, "within_search_kl": within.loss, "seconds": seconds}
        noted |= self.judged("nodes", found["nodes"]) | self.judged("within", found["within"])
        start = found["nodes" if at_end.violation <= NEAR and within.size > 2 * at_end.size else "within"]
        noted["circuit"] = report.packed(start)
        if self.options.finish_steps and start.size < self.options.worth * start.size_total:
            finished, more = self.finish(start, self.options.finish_steps)
            noted |= self.judged("finished", finished) | {"finish_seconds": more}
        self.results.add(self.task, self.seed, method, **noted)

    def finish(self, start: tlnp.Circuit | None, steps: int) -> tuple[tlnp.Circuit, float]:
        began = time.process_time()
        with frontier.attached(self.model) as masks, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "no circuit within the budget")
            circuit = masks.prune(self.train, max_kl=EQUAL_BUDGET, start=start, steps=steps, seed=self.seed, progress=False).circuit
        return baselines.lift(circuit, self.space), time.process_time() - began

    def judged(self, name: str, circuit: tlnp.Circuit) -> dict[str, float]:
        return {name: circuit.size, f"{name}_kl": tlnp.evaluate(self.model, circuit, self.test).kl}


def table(results: Results) -> str:
    columns = {"task": "task", "method": "design", "nodes": "nodes", "search_kl": "search KL", "nodes_kl": "held-out KL",
               "within": "within", "within_kl": "held-out KL ", "seconds": "CPU s", "finished": "finished", "finished_kl": "held-out KL  ",
               "finish_seconds": "CPU s "}
    frame = pd.DataFrame(results.entries).reindex(columns=[*columns, "seed"])
    medians = frame.groupby(["task", "method"], sort=False).median().drop(columns="seed").reset_index()
    for name in ("nodes", "within", "finished", "seconds", "finish_seconds"):
        medians[name] = medians[name].round()
    return report.markdown(medians.rename(columns=columns))


def main(arguments: list[str] | None = None) -> Path:
    """Measure, write, print the table, and return the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", default=["toy/ioi", "toy/greater_than", "stories3M/ioi6", "stories3M/ioi4"])
    parser.add_argument("--designs", nargs="+", default=[*DESIGNS, "ours, no finish", "ours"])
    parser.add_argument("--gate", default="step", choices=list(SETTINGS), help="of the soft designs")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--finish-steps", type=int, default=60, help="of the finish that all designs get; 0: none")
    parser.add_argument("--worth", type=float, default=0.5, help="share of the nodes up to which a circuit is finished")
    parser.add_argument("--toy-prompts", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    settings = SETTINGS[options.gate]
    noted: dict[str, Any] = {"steps": options.steps, "finish_steps": options.finish_steps, "toy_prompts": options.toy_prompts,
                             "threads": options.threads, **asdict(settings)}
    results = Results(options.out, noted)
    for seed in options.seeds:
        for task in options.tasks:
            bench = Bench(results, task, seed, options)
            for design in options.designs:
                if not results.has(task, seed, design):
                    own = {"ours": bench.ours, "ours, no finish": bench.thresholding}
                    own[design]() if design in own else bench.soft(design, settings)
                    print(task, design, results.entries[-1], flush=True)
    print(table(results))
    return options.out


if __name__ == "__main__":
    main()
