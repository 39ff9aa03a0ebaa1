"""MkDocs hooks: the notebooks of demos/ are pages too, and the decisions stand in the navigation."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]


def on_config(config: Any) -> Any:
    """Fill the navigation's empty sections."""
    pages = {"Tutorials": "demos/*.ipynb", "Decisions": "docs/decisions/*.md"}
    for section in config.nav:
        for title in (title for title in pages if title in section):
            found = sorted(ROOT.glob(pages[title]))
            section[title] = [f"{page.parent.name}/{page.name}" for page in found]
    return config


@event_priority(100)  # before mkdocs-jupyter looks for notebooks
def on_files(files: Any, config: Any) -> Any:
    """Pages that do not lie below docs/."""
    for notebook in ROOT.glob("demos/*.ipynb"):
        path = notebook.relative_to(ROOT).as_posix()
        files.append(File(path, src_dir=str(ROOT), dest_dir=config.site_dir, use_directory_urls=config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links to notebooks, right in the repository, made right for the site, where demos/ lies beside the pages.

    Pages that are a section of their own get the room of its empty navigation.
    """
    if page.parent is None and not page.url.startswith("demos/"):
        page.meta["hide"] = ["navigation"]
    return re.sub(r"\]\(\.\./((?:\.\./)*demos/)", r"](\1", markdown)
