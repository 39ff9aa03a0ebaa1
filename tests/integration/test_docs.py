"""Every python block of the README and the docs runs as it stands, in a namespace and a folder of its own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
LONG = ("README.md",)
"""Pages whose searches run to their end."""


def blocks() -> list[Any]:
    """Each block with its page and the line of its fence; searches on LONG pages are slow."""
    found = []
    for page in PAGES:
        text, name = page.read_text(encoding="utf-8"), str(page.relative_to(ROOT))
        for match in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            line = text.count("\n", 0, match.start()) + 1
            marks = [pytest.mark.slow] if name in LONG and re.search(r"\b(prune|sweep)\(", match[1]) else []
            found.append(pytest.param(page, line, match[1], id=f"{name}:{line}", marks=marks))
    return found


@pytest.mark.parametrize(("page", "line", "code"), blocks())
def test_block_runs(page: Path, line: int, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile("\n" * line + code, str(page), "exec"), {"__name__": "__main__"})  # so that a traceback names the page's line


def test_no_block_is_missed() -> None:
    """A block that is fenced otherwise ("```py", indented) would pass unread."""
    fences = sum(len(re.findall(r"^\s*```\s*py", page.read_text(encoding="utf-8"), re.MULTILINE)) for page in PAGES)
    assert fences == len(blocks()) > 5
