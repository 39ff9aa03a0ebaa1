"""What real.py prints: Markdown tables of its measurements, each figure beside what issue 20 asks for."""

from __future__ import annotations

from typing import Any

import pandas as pd
from real_prune import MATCH, PAPER, PRUNE
from report import line, markdown

OURS, HEADS, SPEED = "ours, the order of one run", "heads", "speed"
BARS = {0.04: 0.50, 0.08: 0.25, 0.15: 0.15, 0.30: 0.10}  # KL on fresh prompts at shares of the nodes, IOI on SmolLM2
RIGHT, BASELINES, PAPER_RATIO, MINUTES, PRUNE_MINUTES, STEP_RATIO = 0.97, 0.5, 0.5, 20, 30, 0.3


def text(entries: list[dict[str, Any]]) -> str:
    """All tables, a chapter per task and seed."""
    parts = []
    for task, seed in dict.fromkeys((e["task"], e["seed"]) for e in entries):
        some = {e["method"]: e for e in entries if (e["task"], e["seed"]) == (task, seed)}
        parts += [f"## {task}, seed {seed}, on {', '.join(dict.fromkeys(e['device'] for e in some.values()))}\n"]
        judged = {name: e for name, e in some.items() if e["kind"] == "frontier"}
        if judged:
            parts += [curves(judged, "kl", "KL on the fresh prompts"), curves(judged, "right", "Right choices on the fresh prompts")]
        if lines := figures(some):
            parts += ["Figures to reach\n", markdown(pd.DataFrame(lines))]
        circuits = [e for e in some.values() if e["kind"] == "circuit"]
        if circuits:
            parts += ["Circuits\n", markdown(circuits_table(circuits))]
        if HEADS in some:
            parts += ["The heads that our run ranks highest, and where they look from the last position\n",
                      markdown(pd.DataFrame(some[HEADS]["table"]).round(3))]
        parts += [f"{name}: {e['note']}\n" for name, e in some.items() if e["kind"] == "note"]
    return "\n".join(parts)


def curves(judged: dict[str, dict[str, Any]], what: str, title: str) -> str:
    """A row per method, a column per share of the nodes."""
    rows = [{"method": name, **{f"{share:.0%}": value for share, value in zip(e["shares"], e[what], strict=True)},
             "passes": e["passes"], "seconds": round(e["seconds"], 1)} for name, e in judged.items()]
    e = next(iter(judged.values()))
    return f"{title}, by share of the {e['nodes']:,} leaf nodes\n\n{markdown(pd.DataFrame(rows))}"


def circuits_table(circuits: list[dict[str, Any]]) -> pd.DataFrame:
    told = {True: "yes", False: "no", None: "untested"}
    return pd.DataFrame([{"method": e["method"], "live nodes": e["size"], "share": e["size"] / e["nodes"], "KL, fresh": e["kl"],
                          "right, fresh": e["right"], "KL, its held-out": e["own_kl"], "KL, searched": e["search_kl"],
                          "converged": told[e["converged"]], "minimal": "yes" if e["minimal"] else "no", "tested": e["tested"],
                          "ruled out": e["ruled_out"], "stopped": e["stopped"], "seconds": round(e["seconds"])} for e in circuits])


def figures(some: dict[str, dict[str, Any]]) -> list[dict[str, str]]:
    lines = []
    if OURS in some:
        lines += frontier_lines(some)
    if PRUNE in some:
        lines.append(line(f"{PRUNE}: minutes", PRUNE_MINUTES, some[PRUNE]["seconds"] / 60))
    if PAPER in some and MATCH in some and "size" in some[MATCH]:
        ours, paper = some[MATCH], some[PAPER]
        lines.append(line("our nodes / those of PaperObjective, at its held-out KL", PAPER_RATIO, ours["size"] / max(paper["size"], 1),
                          f"{ours['size']:,} and {paper['size']:,}; KL on fresh prompts {ours['kl']:.3f} and {paper['kl']:.3f}; "
                          f"{paper['history']} of {paper['asked_steps']} steps"))
    if SPEED in some:
        e = some[SPEED]
        peak = f", peak {e['peak_gib']:.1f} GiB" if e["peak_gib"] else ""
        lines += [line("seconds of a step / of a plain forward and backward", STEP_RATIO, e["ratio"],
                       f"{e['step']:.4f} and {e['plain']:.4f} s; {e['prompts']} prompts, {e['nodes']:,} nodes{peak}"),
                  line("steps a second (the 8B shape)", 5, e["steps_per_second"], at_least=True)]
    return lines


def frontier_lines(some: dict[str, dict[str, Any]]) -> list[dict[str, str]]:
    """KL and choices at the sizes that are asked for, and against the best baseline there."""
    ours, lines = some[OURS], []
    others = {name: e for name, e in some.items() if e["kind"] == "frontier" and name != OURS and "its own" not in name}
    for share, bar in BARS.items():
        at = ours["shares"].index(share)
        lines.append(line(f"KL at {share:.0%}", bar, ours["kl"][at]))
        lines.append(line(f"right choices at {share:.0%}", RIGHT, ours["right"][at], at_least=True))
        if others:
            best = min(others, key=lambda name: others[name]["kl"][at])
            lines.append(line(f"KL at {share:.0%} / best baseline's", BASELINES, ours["kl"][at] / max(others[best]["kl"][at], 1e-9),
                              f"{best}: {others[best]['kl'][at]:.3f}"))
    return [*lines, line("the whole run and judging it, minutes", MINUTES, (ours["seconds"] + ours["judge_seconds"]) / 60)]
