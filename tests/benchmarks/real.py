"""The search on a real language model, SmolLM2-135M (80,640 leaf nodes), judged on prompts that it never sees.

`make smollm2`, then `python tests/benchmarks/real.py --out DIR`. results.json is written after each measurement, table.md at the end. What
DIR holds already is not run again. On a GPU: the same with `--device cuda`; and `--shape 8b --device cuda --parts speed` times a random
model of Llama-3.1-8B's shape, which needs no file.

Prompts that the full model answers right are split by their clean prompt: `--prompts` to search on, `--fresh` to judge on. Parts:

frontier: one run of `prune(max_kl=.25)`, exact tests included: time, and KL and right choices of its order on the fresh prompts at
    `SHARES` of the leaf nodes. The fresh prompts are its `held_out`: the order does not know them, the circuit is cut by them.
baselines: each given as many forward-backward passes of a prompt as that run took, or as it can use.
prune: the circuit of that run, and PaperObjective on the same prompts for as long.
heads: which heads the run ranks highest, and where they look.
speed: a step of the search beside a plain forward and backward of the bridge.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path[:0] = [str(Path(__file__).resolve().parent)] if str(Path(__file__).resolve().parent) not in sys.path else []

import baselines  # noqa: E402
import cost  # noqa: E402
import heads  # noqa: E402
import real_tables  # noqa: E402
import shapes  # noqa: E402
from baselines import attached  # noqa: E402
from real_case import SHARES, Case, counted, different, synchronise  # noqa: E402, F401
from real_prune import MATCH, PAPER, PRUNE, ours, prune  # noqa: E402, F401
from real_tables import HEADS, OURS, SPEED  # noqa: E402
from report import Results  # noqa: E402
from trained import STEPS, TRAINED  # noqa: E402

import tl_nodeprune as tlnp  # noqa: E402
from tl_nodeprune.masks.landscape import STEP_COST, Landscape  # noqa: E402
from tl_nodeprune.masks.reference import Reference  # noqa: E402
from tl_nodeprune.search.nested import Nested  # noqa: E402


def frontier(case: Case) -> None:
    if case.has(OURS):
        return
    searched, fresh = case.sides
    start, cpu = time.perf_counter(), time.process_time()
    with counted() as count:
        result = ours(case)
    synchronise(case.options.device)
    took = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
    assert result.ranking is not None
    flat = result.ranking.flat
    torch.save(flat, case.file("ranking"))
    with attached(case.model) as masks, masks.inactive():
        case.judged(OURS, flat, case.land(masks, fresh), passes=count[0] // STEP_COST, searched=len(searched),
                    searched_different=different(searched), fresh=len(fresh), fresh_different=different(fresh), **took)


def all_baselines(case: Case) -> None:
    """As many passes for each as our run took."""
    ours = case.entry(OURS)
    if ours is None:
        sys.exit("the baselines are given as many passes as our run took: run the part frontier first.")
    passes, prompts = ours["passes"], case.step_prompts
    todo: dict[str, tuple[int, Callable[[Landscape], Tensor]]] = {}
    for name, make in TRAINED.items():
        own = {f"{name}, its own {STEPS[name]} steps": STEPS[name]} if case.options.own_steps else {}
        for label, steps in ({name: max(passes // prompts, 1)} | own).items():
            todo[label] = steps * prompts, partial(make, steps=steps, step_prompts=prompts, seed=case.seed)
    for name, (loss, points, signed) in {**baselines.ATTRIBUTIONS, **baselines.SIGNED}.items():
        most = max(min(passes // len(points), len(case.sides[0])), 1)
        todo[name] = most * len(points), partial(baselines.attribution, loss=loss, points=points, signed=signed, most=most)
    for name in ("magnitude, clean - corrupted", "magnitude, weight norm"):
        todo[name] = 0, baselines.SCORES[name]
    todo["random"] = 0, lambda land: torch.rand(land.n, generator=torch.Generator().manual_seed(case.seed))
    score(case, {name: one for name, one in todo.items() if not case.has(name)})


def score(case: Case, todo: dict[str, tuple[int, Callable[[Landscape], Tensor]]]) -> None:
    if not todo:
        return
    with attached(case.model) as masks, masks.inactive():
        start = time.perf_counter()
        land = case.land(masks, case.sides[0])
        synchronise(case.options.device)
        set_up, fresh = time.perf_counter() - start, case.land(masks, case.sides[1])
        for name, (passes, make) in todo.items():
            start, cpu = time.perf_counter(), time.process_time()
            try:
                scores = make(land)
            except (AttributeError, NotImplementedError, RuntimeError, ValueError) as error:
                case.add(name, kind="note", note=f"not available: {type(error).__name__}: {error}")
                continue
            synchronise(case.options.device)
            case.judged(name, scores, fresh, passes=passes, seconds=set_up + time.perf_counter() - start, set_up_seconds=set_up,
                        cpu_seconds=time.process_time() - cpu)


def highest_heads(case: Case) -> None:
    if not case.file("ranking").exists():
        sys.exit("the heads are those of our run: run the part frontier first.")
    if case.has(HEADS):
        return
    flat = torch.load(case.file("ranking"))
    with attached(case.model) as masks, masks.inactive():
        found = heads.table(tlnp.NodeScores.from_flat(flat, masks.space), case.land(masks, case.sides[1]))
    case.add(HEADS, kind="heads", table=found.to_dict("list"))


def speed(case: Case) -> None:
    """Median seconds of a step of the search and of a plain forward and backward on as many prompts, taken in turns."""
    if case.has(SPEED):
        return
    n, device = case.step_prompts, case.options.device
    prompts = shapes.random_prompts(case.options.shape, n, device) if case.options.shape else case.sides[0]
    with attached(case.model) as masks, masks.inactive():
        land = case.land(masks, prompts)
        land.try_half()
        nested = Nested(land, steps=10**6, step_prompts=n, generator=torch.Generator().manual_seed(0))
        nested.state["scores"].copy_(torch.randn(land.n, generator=torch.Generator().manual_seed(0)))
        some = prompts[:n]
        plain = cost.plain_step(case.model, some, Reference(case.model, some, masks.ablation, land.reference.hooks, cache_bytes=0))
        steps = {"search": lambda: nested.step(0.3), "plain": plain}
        seconds = cost.median_seconds(steps, case.options.repeats, lambda: synchronise(device))
    peak = torch.cuda.max_memory_allocated() / 2**30 if device != "cpu" else None
    case.add(SPEED, kind="speed", nodes=land.n, prompts=n, step=seconds["search"], plain=seconds["plain"],
             ratio=seconds["search"] / seconds["plain"], steps_per_second=1 / seconds["search"], peak_gib=peak)


PARTS: dict[str, Callable[[Case], None]] = {"frontier": frontier, "baselines": all_baselines, "prune": prune, "heads": highest_heads,
                                            "speed": speed}


def default_model() -> Path:
    given = Path(os.environ.get("TL_NODEPRUNE_MODELS", "")) / "smollm2"
    return given if os.environ.get("TL_NODEPRUNE_MODELS") and given.is_dir() else Path(__file__).resolve().parents[2] / "out/models/smollm2"


def options_of(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default=str(default_model()), help='a Hugging Face folder or name; "toy": the embedded model')
    parser.add_argument("--shape", choices=list(shapes.SHAPES), help="a random model of this shape instead; the part speed only")
    parser.add_argument("--tasks", nargs="+", default=["ioi"], choices=["ioi", "gendered_pronoun"], metavar="TASK")
    parser.add_argument("--parts", nargs="+", default=["frontier", "baselines", "prune", "heads"], choices=list(PARTS), metavar="PART")
    parser.add_argument("--prompts", type=int, default=500, help="to search on")
    parser.add_argument("--fresh", type=int, default=100, help="to judge on")
    parser.add_argument("--steps", type=int, help="of our searches; by default more for more nodes")
    parser.add_argument("--step-prompts", type=int, help="prompts a step, ours and the baselines'; by default 32, on CUDA 64")
    parser.add_argument("--own-steps", action="store_true", help="the trained baselines with their own numbers of steps too")
    parser.add_argument("--finish", action="store_true", help="finish our circuit at the KL of the paper's objective; takes longer")
    parser.add_argument("--time-limit", type=float, help="of our prune, seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--cache-bytes", type=int, default=2 << 30)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=10, help="of each step that is timed")
    parser.add_argument("--bar", action="store_true", help="show progress bars")
    parser.add_argument("--quick", action="store_true", help="few prompts and steps: does it run?")
    options = parser.parse_args(arguments)
    if options.quick:
        options.prompts, options.fresh, options.steps, options.step_prompts, options.repeats, options.time_limit = 32, 12, 4, 4, 2, 2.0
    if options.shape:
        options.parts, options.tasks = ["speed"], ["random"]
    return options


def main(arguments: list[str] | None = None) -> Path:
    """Run what is missing in the folder, write, and return the folder."""
    options = options_of(arguments)
    torch.set_num_threads(options.threads)
    names = ("prompts", "fresh", "steps", "step_prompts", "batch_size", "threads", "device", "quick")
    results = Results(options.out, {name: getattr(options, name) for name in names})
    for task in options.tasks:
        case = Case(results, options, task)
        for part, measure in PARTS.items():
            if part in options.parts:
                measure(case)
                (options.out / "table.md").write_text(real_tables.text(results.entries))
    print((options.out / "table.md").read_text())
    return options.out


if __name__ == "__main__":
    main()
