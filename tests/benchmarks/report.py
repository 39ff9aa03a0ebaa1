"""What the frontier bench keeps and shows: results.json, table.md and frontier.html."""

from __future__ import annotations

import base64
import json
import os
import platform
import subprocess
import time
from importlib.metadata import version
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.express as px
import torch
from today import SMALLER_RATIO, TIME_RATIO, WORST_TIME, today_table
from trained import TRAINED

import tl_nodeprune as tlnp

EQUAL_BUDGET = 0.05
EQUAL = 1.1  # times our size at most is equal size
GRID = 6  # lams that must have been run for a task and seed before their time together is compared with ours
RANDOM_MEAN, RANDOM_BEST = "random, mean of 10", "random, best of 10"
COLUMNS = {"size": "live leaf nodes", "share": "share", "kl": "held-out KL", "accuracy": "held-out accuracy", "train_kl": "search KL",
           "seconds": "CPU seconds", "seeds": "seeds"}
NOTES = """Live leaf nodes: of the full node space, less those that change nothing; for every method alike. KL(full || circuit) in nats at
the answer positions, interchange ablation. Medians over seeds; a seed draws the split (half to search on, half held out).
Attribution, trained scores (Matryoshka Attribution, hard-concrete node pruning), magnitude and random circuits are as large as ours at
max_kl 0.05 on the same split; TransformerLens' attribution keeps whole heads and MLPs until it is at least as large.
The best attribution is the one with the lowest held-out KL on each split, of those at most 1.1 x as large as ours. `paper` runs
PaperObjective, without "layer" gates and without hinge, its penalty the mean over gate tensors (the authors' code for GPT-2); `paper,
summed` the same with the sum (their code for Llama).
Ours is aimed at the held-out KL of each run of theirs, and asked for its choices no more often than that has them: at 1/1.6 of the KL
first, then, where that is above it, or more than half as large and either far below it or larger than theirs, lower or higher, and
midway between two that were too low and too high, three times at most; the time of all that were aimed counts. One-granularity runs
keep all nodes that they do not gate. Times are CPU seconds of the process, compared on one machine only.
"""


def budget_name(budget: float) -> str:
    return f"ours, max_kl {budget:g}"


class Results:
    """Measurements by task, seed and method, kept in a folder; those that are there already are taken up.

    Raises: SystemExit where the folder holds results with other settings.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder, self.file, self.settings = folder, folder / "results.json", settings
        folder.mkdir(parents=True, exist_ok=True)
        self.runs: list[dict[str, Any]] = []
        self.entries: list[dict[str, Any]] = []
        self._keys: set[tuple[str, int, str]] = set()
        if self.file.exists():
            self.take(self.file)
        self._run = len(self.runs)

    def take(self, file: Path) -> None:
        """Take up the measurements of a results.json that are not here yet; written with the next one that is added."""
        held = json.loads(file.read_text())
        if held["settings"] != self.settings:
            raise SystemExit(f"{file} was made with {held['settings']}, asked for is {self.settings}; give another --out.")
        new = [e | {"run": e["run"] + len(self.runs)} for e in held["entries"] if not self.has(e["task"], e["seed"], e["method"])]
        if not new:
            return
        self.runs, self.entries = self.runs + held["runs"], self.entries + new
        self._keys |= {(e["task"], e["seed"], e["method"]) for e in new}
        self._run = len(self.runs)

    def has(self, task: str, seed: int, method: str) -> bool:
        return (task, seed, method) in self._keys

    def add(self, task: str, seed: int, method: str, **noted: Any) -> None:
        """Keep a measurement and write the file: all of it or nothing."""
        if self._run == len(self.runs):
            self.runs.append(machine())
        self.entries.append({"task": task, "seed": seed, "method": method, **noted, "run": self._run})
        self._keys.add((task, seed, method))
        self.write()

    def write(self) -> None:
        part = self.file.with_suffix(".part")
        part.write_text(json.dumps({"settings": self.settings, "runs": self.runs, "entries": self.entries}, indent=1))
        os.replace(part, self.file)

    def frame(self) -> pd.DataFrame:
        """A row per measurement of a circuit, all columns there."""
        numbers = ("size", "size_total", "kl", "accuracy", "train_kl", "seconds", "max_kl", "lam")
        named = ("task", "seed", "method", "kind", "run", "search_seed", "circuit", "converged", "note")
        table = pd.DataFrame(self.entries).reindex(columns=[*named, *numbers])
        table = table[~table["kind"].isin(["planted", "control"])].astype(dict.fromkeys(numbers, float))
        machines = [f"{self.runs[i]['host']}, {self.runs[i]['threads']} threads" for i in table["run"]]
        return table.assign(share=table["size"] / table["size_total"], machine=machines)


def packed(circuit: tlnp.Circuit) -> str:
    """Which leaf nodes are live, a bit each, in the order of the space: base64."""
    live = torch.cat([circuit.live(*key).flatten() for key in circuit.space.free()])
    return base64.b64encode(np.packbits(live.numpy()).tobytes()).decode()


def iou(a: str, b: str) -> float:
    """Of two packed circuits of one space; 1 where both are empty."""
    one, other = (np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8)).astype(bool) for text in (a, b))
    return float((one & other).sum() / (one | other).sum()) if (one | other).any() else 1.0


def machine() -> dict[str, Any]:
    """Where and with what a run is made."""
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True)
    packages = ("torch", "transformer_lens", "transformers", "tl_nodeprune")
    return {"started": time.strftime("%Y-%m-%d %H:%M:%S"), "commit": git.stdout.strip(), "host": platform.node(), "cpus": os.cpu_count(),
            "machine": platform.machine(), "cpu": cpu_name(), "threads": torch.get_num_threads(), "python": platform.python_version(),
            **{name: version(name) for name in packages}}


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0] if names else platform.processor()


def matches(frame: pd.DataFrame, kind: str = "paper") -> pd.DataFrame:
    """For each paper run that keeps something: our smallest circuit that is as faithful on the held-out prompts, else the full model.

    Times are compared on one machine with one number of threads only.
    """
    rows = []
    for _, paper in frame[(frame["kind"] == kind) & (frame["size"] > 0)].iterrows():
        same = frame[(frame["task"] == paper["task"]) & (frame["seed"] == paper["seed"])]
        grid, ours = same[same["kind"] == kind], same[(same["kind"] == "ours") & (same["kl"] <= paper["kl"])]
        row = {"task": paper["task"], "seed": paper["seed"], "lam": paper["lam"], "method": "the full model",
               "ratio": paper["size_total"] / paper["size"]}
        if len(ours):
            best = ours.sort_values(["size", "kl"]).iloc[0]
            timed = grid["machine"].nunique() == 1 and best["machine"] == paper["machine"]
            row |= {"method": best["method"], "ratio": best["size"] / paper["size"]}
            aimed = same[same["method"].str.split(", aim ").str[0].eq(f"ours, for {paper['method']}") & (same["method"] != best["method"])]
            seconds = best["seconds"] + aimed["seconds"].sum()
            row |= {"of_run": seconds / paper["seconds"]} if timed else {}
            row |= {"of_grid": seconds / grid["seconds"].sum()} if timed and len(grid) >= GRID else {}
        rows.append(row)
    return pd.DataFrame(rows, columns=["task", "seed", "lam", "method", "ratio", "of_grid", "of_run"])


def equal_size(frame: pd.DataFrame) -> pd.DataFrame:
    """Per task and seed: our KL at the equal-size budget over the best attribution's, and over that of random circuits."""
    places = frame.reset_index(drop=True)
    ours = places[["task", "seed"]].merge(places[places["method"] == budget_name(EQUAL_BUDGET)], how="left")["size"]
    larger = (places["kind"] == "attribution") & ~(places["size"] <= EQUAL * ours)  # whole MLPs do not come in every size
    by_method = places[~larger].pivot_table(index=["task", "seed"], columns="method", values="kl")
    attributions = [name for name in by_method if name.startswith("attribution")]
    kl = by_method.reindex(columns=[budget_name(EQUAL_BUDGET), *attributions, *TRAINED, RANDOM_MEAN, RANDOM_BEST])
    others = {"best attribution": kl[attributions].min(axis=1), **{name: kl[name] for name in (*attributions, *TRAINED)},
              "random mean": kl[RANDOM_MEAN], "random best": kl[RANDOM_BEST]}
    return pd.DataFrame({name: kl[budget_name(EQUAL_BUDGET)] / other for name, other in others.items()})


def agreement(frame: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """IoU of pairs of our circuits at the equal-size budget: over search seeds on one split, and over splits."""
    ours = frame[frame["method"] == budget_name(EQUAL_BUDGET)]
    again = frame[frame["kind"] == "stability"]
    one_split = pd.concat([again, ours.merge(again[["task", "seed"]].drop_duplicates())])
    return {"search seeds, one split": pairs(one_split), "seeds with splits of their own": pairs(ours)}


def pairs(frame: pd.DataFrame) -> pd.DataFrame:
    rows = [{"task": task, "iou": iou(a, b)}
            for task, group in frame.groupby("task") for a, b in combinations(group["circuit"], 2)]
    return pd.DataFrame(rows, columns=["task", "iou"])


def summary(results: Results, frame: pd.DataFrame) -> pd.DataFrame:
    """The bench's figures, each beside its bar."""
    equal = equal_size(frame)
    variants = "; ".join(f"{name.removeprefix('attribution, ')} {equal[name].median():.2f}" for name in equal if "attribution, " in name)
    ours = frame[(frame["kind"] == "ours") & frame["max_kl"].notna() & ~frame["method"].str.contains(", aim ")]  # made where one missed
    kept = (ours["kl"] / ours["max_kl"]).rename("ratio")
    lines = [
        *(one for kind in ("paper", "paper, summed") for one in against(frame, kind)),
        line("KL at equal size, ours / best attribution's, median", 1 / 3, equal["best attribution"].median(),
             f"worst {equal['best attribution'].max():.2f}; {len(equal)} splits; each variant's median: {variants}"),
        *(line(f"KL at equal size, ours / {name}, median", 1 / 2, equal[name].median(), f"worst {equal[name].max():.2f}")
          for name in TRAINED),
        line("KL at equal size, ours / random's best of 10, worst", 1.0, equal["random best"].max(),
             f"over random's mean {equal['random mean'].max():.2f}"),
        line("held-out KL / max_kl, median", 1.5, kept.median(),
             f"worst {kept.max():.2f}; {(kept <= 1.5).mean():.0%} of {len(kept)} runs within"),
        *claims(frame),
    ]
    for name, table in agreement(frame).items():
        lines.append(line(f"IoU at max_kl {EQUAL_BUDGET:g}, {name}, median", 0.7, table["iou"].median(),
                          f"lowest {table['iou'].min():.2f}; {len(table)} pairs", at_least=True))
    return pd.DataFrame(lines + today_lines(today_table(results.entries)) + planted_lines(results))


def claims(frame: pd.DataFrame) -> list[dict[str, str]]:
    """Of all runs with a budget that say `converged`, how far the KL on the bench's other half is from it."""
    asked = frame[frame["max_kl"].notna()]
    said = asked[asked["converged"].eq(True)]
    over = said["kl"] / said["max_kl"]
    untested = int(asked["converged"].isna().sum())
    return [line("of the runs that say converged: share within 1.25 x max_kl", 0.95, (over <= 1.25).mean() if len(over) else float("nan"),
                 f"{len(said)} of {len(asked)} runs say so; {untested} say untested", at_least=True),
            line("of the runs that say converged: held-out KL / max_kl, worst", 2.0, over.max())]


def today_lines(table: pd.DataFrame) -> list[dict[str, str]]:
    """The figures of issue 20 on stories3M, where the part `today` has been run."""
    if not len(table):
        return []
    nodes, seconds = table["finished, estimated, / today's"], table["s / today's"]
    at_today = table["order's size at today's KL / today's"]
    return [line("nodes at today's held-out KL / today's, estimated for the finished circuit, median", SMALLER_RATIO, nodes.median(),
                 f"worst {nodes.max():.2f}; bare order: median {at_today.median():.2f}, worst {at_today.max():.2f}; {len(table)} tasks"),
            line("the same, worst", 1.0, nodes.max()),
            line("CPU seconds / today's, median", TIME_RATIO, seconds.median(), f"{len(table)} tasks"),
            line("the same, worst", WORST_TIME, seconds.max())]


def against(frame: pd.DataFrame, kind: str) -> list[dict[str, str]]:
    """Ours against the runs of the reference method of a kind: size at equal held-out KL, and time."""
    found, paper = matches(frame, kind), frame[frame["kind"] == kind]
    compared = f"{len(found)} runs; {int((paper['size'] == 0).sum())} empty ones left out"
    fallen = int((found["method"] == "the full model").sum())
    return [
        line(f"size at the held-out KL of a run of `{kind}`, ours / theirs, median", 0.5, found["ratio"].median(), compared),
        line("the same, worst", 1.0, found["ratio"].max(), f"{int((found['ratio'] > 1).sum())} above 1; {worst(found)}; {fallen} with no "
                                                           "circuit of ours as faithful, the full model taken"),
        line(f"our time / that of all {GRID} lams, `{kind}`, median", 0.2, found["of_grid"].median(),
             f"worst {found['of_grid'].max():.2f}; {found['of_grid'].notna().sum()} runs, on the splits where all {GRID} were made"),
        line("our time / that of the one run, median", 1.0, found["of_run"].median(), f"worst {found['of_run'].max():.2f}"),
    ]


def line(figure: str, bar: float, measured: float, note: str = "", *, at_least: bool = False) -> dict[str, str]:
    shown = {"figure": figure, "bar": f"{'>=' if at_least else '<='} {bar:.3g}"}
    if pd.isna(measured):
        return shown | {"measured": "not measured", "reached": "", "note": ""}
    reached = measured >= bar if at_least else measured <= bar
    return shown | {"measured": f"{measured:.3g}", "reached": "yes" if reached else "NO", "note": note}


def worst(found: pd.DataFrame) -> str:
    if not len(found):
        return ""
    row = found.loc[found["ratio"].idxmax()]
    return f"worst {row['task']} seed {row['seed']} lam {row['lam']:g}"


def planted_lines(results: Results) -> list[dict[str, str]]:
    """Exact recoveries per granularity, and circuits claimed in the negative control."""
    entries = [entry for entry in results.entries if entry["task"] == "planted"]
    table, lines = pd.DataFrame(entries, columns=["method", "kind", "which", "exact", "converged", "seed"]), []
    for which, group in table[table["kind"] == "planted"].groupby("which", sort=False):
        missed = ", ".join(f"{r.method.split(',')[0]} seed {r.seed}" for r in group[~group["exact"].astype(bool)].itertuples())
        lines.append(line(f"planted, {which}: share recovered exactly", 1.0, group["exact"].astype(float).mean(),
                          f"{int(group['exact'].sum())} of {len(group)}" + f"; missed {missed}" * bool(missed), at_least=True))
    control = table[table["kind"] == "control"]["converged"].eq(True).astype(float)  # None: untested, nothing is claimed
    return [*lines, line("planted, negative control: circuits claimed", 0.0, control.sum(min_count=1), f"of {len(control)}")]


def per_task(frame: pd.DataFrame) -> pd.DataFrame:
    """Medians over seeds, a row per task and method in the order of running."""
    shown = frame[frame["kind"] != "stability"]
    groups = shown.groupby(["task", "method"], sort=False)
    medians = groups[[name for name in COLUMNS if name != "seeds"]].median()
    return medians.assign(seeds=groups.size(), note=groups["note"].first().fillna("")).reset_index()


def markdown(table: pd.DataFrame) -> str:
    rows = [list(table.columns), ["---"] * table.shape[1], *table.values.tolist()]
    return "\n".join("| " + " | ".join(map(cell, row)) + " |" for row in rows) + "\n"


def cell(value: Any) -> str:
    if isinstance(value, float):
        return "" if pd.isna(value) else f"{value:.0f}" if value == round(value) and abs(value) > 1 else f"{value:.3g}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def write(results: Results) -> None:
    """table.md and frontier.html for all that is there so far."""
    frame = results.frame()
    tasks = per_task(frame) if len(frame) else pd.DataFrame(columns=["task"])
    calls: dict[str, list[str]] = {}
    for run in results.runs:
        where = ", ".join(f"{name} {value}" for name, value in run.items() if name != "started")
        calls.setdefault(where, []).append(str(run["started"]))
    about = "\n".join(f"- {len(times)} call{'s' * (len(times) > 1)}, first on {min(times)}: {where}" for where, times in calls.items())
    parts = ["# Size against faithfulness\n", NOTES, f"Settings: {json.dumps(results.settings)}\n\n{about}\n", "## Figures to reach\n",
             markdown(summary(results, frame))]
    if len(before := today_table(results.entries)):
        parts += ["## Beside the search before issue 20 (main 97b3907)\n", markdown(before)]
    for task, table in tasks.groupby("task", sort=False):
        parts += [f"## {task}\n", markdown(table.drop(columns="task").rename(columns=COLUMNS))]
    (results.folder / "table.md").write_text("\n".join(parts))
    if len(frame):
        plot(frame).write_html(results.folder / "frontier.html", include_plotlyjs=True)


def plot(frame: pd.DataFrame) -> Any:
    """Live leaf nodes against held-out KL, a panel per task, a colour per method; a mark per run."""
    grouped = frame["kind"].isin(["paper", "ours", "stability"])
    shown = frame.assign(legend=frame["method"].where(~grouped, frame["kind"]))[frame["kl"] > 0]
    figure = px.scatter(
        shown, x="size", y="kl", color="legend", symbol="legend", facet_col="task", facet_col_wrap=3, log_x=True, log_y=True,
        hover_data=["method", "seed", "accuracy", "seconds"], labels={"size": "live leaf nodes", "kl": "held-out KL (nats)"},
        height=max(400, 320 * -(-shown["task"].nunique() // 3)))
    figure.for_each_annotation(lambda note: note.update(text=note.text.removeprefix("task=")))
    return figure.update_xaxes(matches=None, showticklabels=True).update_traces(marker_size=8)
