"""A report as one reads it: text, frame, Markdown."""

from __future__ import annotations

import html
import math
import re
from dataclasses import dataclass, replace

import pandas as pd

from tl_nodeprune.evidence.reports.verdicts import MARKS, Findings, Verdict, verdicts_of
from tl_nodeprune.nodes import check_types, figures


@dataclass(frozen=True, eq=False)
class Report(Findings):
    """What a circuit is worth; made by `tl_nodeprune.report`. Printed, it says so in words, a line per verdict. Fields: see `Findings`."""

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        """What was found, in words, and whether it speaks for the circuit."""
        return verdicts_of(self)

    def verdict(self, name: str) -> Verdict:
        """The verdict of a name. Raises KeyError where there is none."""
        check_types(Report.verdict, locals())
        found = {verdict.name: verdict for verdict in self.verdicts}
        if name not in found:
            raise KeyError(f"there is no verdict {name!r}; there are {', '.join(found)}.")
        return found[name]

    def to_frame(self) -> pd.DataFrame:
        """A row per measure: its value, the low and high end of its 95 % interval, p_value, and what the verdict of its name says."""
        rows: dict[str, dict[str, float]] = {
            name: {"value": getattr(self.evaluation, name), "low": low, "high": high} for name, (low, high) in self.intervals.items()}
        rows |= {"task": {"p_value": self.task_p}, "completeness": {"value": self.completeness.left},
                 "incompleteness": {"value": self.completeness.gap_share},
                 "random circuits": {"value": self.null.median, "p_value": self.null.p_value}}
        rows |= {test.name: {"value": test.statistic, "p_value": test.p_value}
                 for test in (self.equivalence, self.independence, self.minimality)}
        rows["redundancy"] = {"value": float(len(self.redundancies))}
        passed = {verdict.name: verdict.passed for verdict in self.verdicts}
        table = pd.DataFrame.from_dict(rows, orient="index").reindex(columns=["value", "low", "high", "p_value"]).astype(float)
        return table.assign(passed=pd.Series(passed, dtype=object).reindex(table.index)).rename_axis("measure")

    def to_markdown(self) -> str:
        """The whole report: settings, verdicts, tables."""
        verdicts = pd.DataFrame({"for it": [MARKS[one.passed] for one in self.verdicts], "found": [one.sentence for one in self.verdicts]},
                                index=pd.Index([one.name for one in self.verdicts], name="verdict"))
        parts = ["# Evidence for a circuit", f"Holds for {replace(self.settings, model=_escaped(self.settings.model))}", _table(verdicts),
                 *(f"- {_escaped(note)}" for note in self.notes),
                 "## Measures", _table(self.to_frame().drop(columns="passed")), "## On the prompts judged on",
                 _table(self.evaluation.to_frame())]
        if self.searched is not None:
            parts += ["## On the prompts of the search", _table(self.searched.to_frame())]
        parts += ["## Under each ablation", _table(self.ablations), "## What removing a unit does", _table(self.effects)]
        return "\n\n".join(parts) + "\n"

    def _repr_markdown_(self) -> str:
        return self.to_markdown()

    def __str__(self) -> str:
        return "\n".join([f"Holds for {self.settings}", *map(str, self.verdicts), *(f"Note: {note}" for note in self.notes)])

    __repr__ = __str__


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is, on one line: a model's name may hold anything."""
    return re.sub(r"([\\`*\[\]|~$]|(?<!\w)_|_(?!\w))", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def _table(frame: pd.DataFrame) -> str:
    """A frame as a Markdown table; pandas' own needs one more package."""
    rows = [[str(frame.index.name or ""), *map(str, frame.columns)]]
    rows += [[str(label), *map(_cell, row)] for label, row in zip(frame.index, frame.itertuples(index=False), strict=True)]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def _cell(value: object) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else figures(value)
    return str(value)
