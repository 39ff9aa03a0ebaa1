"""The notebooks of demos/ are committed with light outputs, which belong to the code beside them; they run on the embedded model. In the
fast suite their searches are cut short. SmolLM2's runs where `make smollm2` has made it.

Are the outputs current? The hash of the code that was run is that of the code that stands there (fast); each cell still gives outputs of
the same kinds, pictures where there were pictures (fast); and run in full, the same words and headings of tables (slow). Numbers and the
names of nodes are not compared: a search on another processor may keep other nodes. Nor are cells tagged "machine", which say what the
machine can reach.
"""

from __future__ import annotations

import copy
import json
import os
import re
import runpy
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

DEMOS = Path(__file__).parents[2] / "demos"
NOTEBOOKS = sorted(DEMOS.glob("*.ipynb"))
TOOL = runpy.run_path(str(DEMOS.parent / "docs" / "tools" / "notebooks.py"))
REAL = ("07_smollm2",)
"""Not on the embedded model."""
TOY = [path for path in NOTEBOOKS if path.stem not in REAL]
LARGEST = 300_000
"""Bytes of a picture."""
SHORT = """
import functools
import tl_nodeprune as tlnp

N = 24
tlnp.NodeMasks.prune = functools.partialmethod(tlnp.prune, steps=10, exact_tests=0)
"""
"""Runs after the cell of parameters in the fast suite."""


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def flaws(notebook: dict[str, Any]) -> list[str]:
    """What a committed notebook must not have."""
    cells = notebook["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    ids = [cell.get("id") for cell in cells]
    outputs = [output for cell in code for output in cell["outputs"]]
    kinds = {kind for output in outputs for kind in output.get("data", {})}
    pictures = [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    found = {
        "format is not 4.5": (notebook["nbformat"], notebook["nbformat_minor"]) != (4, 5),
        "ids missing or doubled": None in ids or len(set(ids)) != len(ids),
        "code changed since it was run": notebook["metadata"].get("source_hash") != TOOL["source_hash"](notebook),
        "no outputs": not outputs,
        "not run from top to bottom": [cell["execution_count"] for cell in code] != list(range(1, len(code) + 1)),
        "an error or a warning": any(output["output_type"] == "error" or output.get("name") == "stderr" for output in outputs),
        "outputs that are not light": bool(kinds - {"text/plain", "text/html", "image/png"}) or "<script" in json.dumps(outputs),
        "a large picture": any(len(picture) * 3 / 4 > LARGEST for picture in pictures),
        "metadata of an editor": any(set(cell["metadata"]) - {"tags"} for cell in cells),
        "an empty cell": any(not "".join(cell["source"]).strip() for cell in cells),
    }
    return [name for name, is_so in found.items() if is_so]


def kinds(notebook: dict[str, Any]) -> dict[str, set[str]]:
    """By cell, what its outputs are: text, table, picture."""
    return {cell["id"]: {_kind(output) for output in cell["outputs"] if output.get("name") != "stderr"} - {"widget"}
            for cell in notebook["cells"] if cell["cell_type"] == "code" and "machine" not in cell["metadata"].get("tags", [])}


def _kind(output: dict[str, Any]) -> str:
    data = output.get("data", {})
    if "application/vnd.jupyter.widget-view+json" in data:
        return "widget"
    if TOOL["FIGURE"] in data or "image/png" in data or "<script" in "".join(data.get("text/html", "")):
        return "picture"
    return "table" if "text/html" in data else "text"


def words(notebook: dict[str, Any]) -> dict[str, set[str]]:
    """By cell, the words that its text and tables are made of; not numbers, nor what has one in it, nor verdicts."""
    chosen = {"yes", "no", "none", "true", "false", "untested"}
    found = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code" and "machine" not in cell["metadata"].get("tags", []):
            texts = ["".join(output.get("text", output.get("data", {}).get("text/plain", ""))) for output in cell["outputs"]
                     if _kind(output) in ("text", "table") and output.get("name") != "stderr"]
            found[cell["id"]] = {word for text in texts for word in re.findall(r"(?<![\w.])[a-z]{4,}(?![\w.])", text.lower())} - chosen
    return found


def test_notebooks_are_numbered() -> None:
    assert [path.name[:3] for path in NOTEBOOKS] == [f"{i:02d}_" for i in range(1, len(NOTEBOOKS) + 1)] and len(NOTEBOOKS) >= 7


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_committed_as_it_was_run(path: Path) -> None:
    notebook = read(path)
    assert not flaws(notebook)
    assert path.read_text(encoding="utf-8") == json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def test_outputs_that_are_stale_or_heavy_are_seen() -> None:
    notebook = copy.deepcopy(read(NOTEBOOKS[0]))
    cell = next(cell for cell in notebook["cells"] if cell["cell_type"] == "code")
    cell |= {"execution_count": 9, "source": ["1 + 1"]}
    cell["outputs"] = [{"output_type": "stream", "name": "stderr", "text": ["UserWarning"]},
                       {"output_type": "display_data", "data": {TOOL["FIGURE"]: {}, "image/png": "A" * 500_000}}]
    cell["metadata"]["execution"] = {}
    notebook["cells"].append(cell)
    assert flaws(notebook) == [
        "ids missing or doubled", "code changed since it was run", "not run from top to bottom", "an error or a warning",
        "outputs that are not light", "a large picture", "metadata of an editor"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_asks_guesses_tests_and_says_what_came(path: Path) -> None:
    cells = read(path)["cells"]
    title = "".join(cells[0]["source"])
    assert title.startswith(f"# {int(path.name[:2])}. ") and all(f"**{word}.**" in title for word in ("Question", "Guess", "Test"))
    assert cells[-1]["cell_type"] == "markdown" and "".join(cells[-1]["source"]).startswith("## What came")
    assert cells[1]["metadata"].get("tags") == ["parameters"] and re.search(r"^MODEL = ", "".join(cells[1]["source"]), re.MULTILINE)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_says_how_to_install_and_links_to_what_is_there(path: Path) -> None:
    cells = read(path)["cells"]
    code = "".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    text = "".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    assert "pip install torch==2.13.0, then pip install -e ." in code
    assert "colab" not in text + code and "_OWNER_" not in text + code
    targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    assert all((DEMOS / target).exists() for target in targets)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the short runs run."""
    return tmp_path_factory.mktemp("notebooks")


@pytest.fixture(scope="module")
def kernel(folder: Path) -> Iterator[Any]:
    """One kernel for all short runs: to start one and import torch takes longer than they do."""
    manager = pytest.importorskip("jupyter_client", reason="nbclient and ipykernel are not installed; they are in the dev extra")
    pytest.importorskip("nbclient", reason="nbclient is not installed; it is in the dev extra")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed; it is in the dev extra")
    started = manager.KernelManager(kernel_name="python3")
    started.start_kernel(cwd=str(folder), env=os.environ | {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"})
    yield started
    started.shutdown_kernel(now=True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", TOY, ids=lambda path: path.stem)
def test_notebook_runs_with_short_searches(path: Path, kernel: Any, folder: Path) -> None:
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    notebook.cells.insert(0, nbformat.v4.new_code_cell("%reset -f"))
    notebook.cells.insert(3, nbformat.v4.new_code_cell(SHORT))
    NotebookClient(notebook, km=kernel, timeout=120).execute()
    came, stored = kinds(notebook), kinds(read(path))
    assert {cell: came[cell] for cell in stored} == stored, "run python docs/tools/notebooks.py"
    ignored = re.findall(r"^/demos/(.+)$", (DEMOS.parent / ".gitignore").read_text(encoding="utf-8"), re.MULTILINE)
    left = [file.name for file in folder.iterdir() if not any(file.match(pattern) for pattern in ignored)]
    assert not left, f"run in demos/ it leaves {', '.join(left)}, which .gitignore does not ignore"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_as_it_stands_says_the_same(path: Path) -> None:
    pytest.importorskip("nbclient", reason="nbclient is not installed; it is in the dev extra")
    if path.stem in REAL and not (DEMOS.parent / "out" / "models" / "smollm2").is_dir():
        pytest.skip("there is no out/models/smollm2; `make smollm2` makes it")
    start = time.perf_counter()
    notebook, stored = TOOL["executed"](path), read(path)
    seconds = time.perf_counter() - start
    print(f"{path.stem}: {seconds:.0f} s")
    assert kinds(notebook) == kinds(stored) and words(notebook) == words(stored), "run python docs/tools/notebooks.py"
    assert seconds < 300 or path.stem in REAL


def test_words_are_those_that_no_processor_changes() -> None:
    """The comparison sees another sentence and another column; it does not see another number, verdict or node."""

    def said(text: str) -> set[str]:
        outputs = [{"output_type": "stream", "text": [text]}]
        return words({"cells": [{"cell_type": "code", "id": "a", "metadata": {}, "outputs": outputs}]})["a"]

    assert said("Head 0.1 looks at it: kl 0.2, yes") == said("Head 1.12 looks at it: kl 0.31, no") == {"head", "looks"}
    assert said("effect 1") != said("effect 1 change")
