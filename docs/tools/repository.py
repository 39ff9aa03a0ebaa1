"""Where the project lives stands in one place, `[project.urls] Repository` of pyproject.toml; this writes it into the notebooks.

`python docs/tools/repository.py`, after a change there: the Colab badges, and what notebooks install where the package is missing.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PLACES = re.compile(r"(?<=colab\.research\.google\.com/github/)[\w.-]+/[\w.-]+(?=/blob/)|(?<=git\+https://github\.com/)[\w.-]+/[\w.-]+")
"""OWNER/NAME in a badge's link and in an installation."""


def repository(pyproject: str) -> str:
    """OWNER/NAME on GitHub, the only host that Colab's badges take. Raises: ValueError."""
    found = re.search(r'^Repository = "https://github\.com/([\w.-]+/[\w.-]+)"', pyproject, re.MULTILINE)
    if not found:
        raise ValueError('pyproject.toml has no Repository = "https://github.com/OWNER/NAME" under [project.urls].')
    return found[1]


def named(notebook: str) -> set[str]:
    """The repositories that a notebook's text names."""
    return set(PLACES.findall(notebook))


def main() -> None:
    home = repository((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    for path in sorted((ROOT / "demos").glob("*.ipynb")):
        path.write_text(PLACES.sub(home, path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
