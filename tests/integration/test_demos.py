"""The demos run on the embedded model, in small, and say what they should."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "demos"))
import reproduce_paper  # noqa: E402


def test_the_paper_is_reproduced_in_small(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--model", "toy", "--prompts", "24", "--steps", "8", "--steps-scale", "0.001", "--device", "cpu"]
    tables = reproduce_paper.main([*small, "--tasks", "gendered_pronoun", "--lam", "0.975"])
    table = tables["gendered_pronoun"]
    assert table.index.tolist() == ["paper, GPT-2, lam 0.975", "its objective here, lam 0.975", "ours, max_kl 0.355"]
    assert table.loc["paper, GPT-2, lam 0.975", ["cut %", "accuracy", "KL"]].tolist() == [96.1, 0.95, 0.355]
    assert table["cut %"].between(0, 100).all() and (table["KL"] >= 0).all() and table["of"].dropna().eq(1728).all()
    shown = capsys.readouterr().out
    assert "gendered_pronoun, toy:" in shown and all(name in shown for name in table.index)


@pytest.mark.parametrize(("task", "steps", "hinge"), [("ioi", 6500, 4.0), ("gendered_pronoun", 1500, 0.1), ("greater_than", 3250, None)])
def test_the_settings_are_the_papers(task: str, steps: int, hinge: float | None) -> None:
    objective = reproduce_paper.PAPER[task].at(0.9, 1.0)
    assert (objective.steps, objective.warmup, objective.hinge, objective.lam) == (steps, 1000, hinge, 0.9)


def test_a_lam_that_the_paper_has_no_numbers_for_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        reproduce_paper.main(["--model", "toy", "--lam", "0.95"])
    assert "nothing for gendered_pronoun, greater_than at lam 0.95" in capsys.readouterr().err
