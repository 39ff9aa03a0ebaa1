"""The notebooks of demos/: clean as committed, and they run on the embedded model. In the fast suite their searches are cut short."""

from __future__ import annotations

import copy
import json
import re
import runpy
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

DEMOS = Path(__file__).parents[2] / "demos"
NOTEBOOKS = sorted(DEMOS.glob("*.ipynb"))
BADGE = re.compile(r"\(https://colab\.research\.google\.com/github/([\w.-]+/[\w.-]+)/blob/main/demos/([\w]+)\.ipynb\)")
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
    found = {
        "format is not 4.5": (notebook["nbformat"], notebook["nbformat_minor"]) != (4, 5),
        "ids missing or doubled": None in ids or len(set(ids)) != len(ids),
        "outputs": any(cell["outputs"] for cell in code),
        "execution counts": any(cell["execution_count"] is not None for cell in code),
        "metadata of an editor": any(set(cell["metadata"]) - {"tags"} for cell in cells),
        "an empty cell": any(not "".join(cell["source"]).strip() for cell in cells),
    }
    return [name for name, is_so in found.items() if is_so]


def test_notebooks_are_numbered() -> None:
    assert [path.name[:3] for path in NOTEBOOKS] == [f"{i:02d}_" for i in range(1, len(NOTEBOOKS) + 1)] and len(NOTEBOOKS) >= 6


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_committed_clean(path: Path) -> None:
    notebook = read(path)
    assert not flaws(notebook)
    assert path.read_text(encoding="utf-8") == json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def test_a_notebook_that_was_run_is_not_clean() -> None:
    notebook = copy.deepcopy(read(NOTEBOOKS[0]))
    cell = next(cell for cell in notebook["cells"] if cell["cell_type"] == "code")
    cell |= {"execution_count": 1, "outputs": [{"output_type": "stream", "name": "stdout", "text": ["1"]}]}
    cell["metadata"]["execution"] = {}
    notebook["cells"].append(cell)
    assert flaws(notebook) == ["ids missing or doubled", "outputs", "execution counts", "metadata of an editor"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_has_a_title_a_badge_and_a_switch_to_gpt2(path: Path) -> None:
    title, first = read(path)["cells"][:2]
    assert "".join(title["source"]).startswith(f"# {int(path.name[:2])}. ")
    found = BADGE.search("".join(title["source"]))
    assert found and found[2] == path.stem
    assert first["metadata"].get("tags") == ["parameters"]
    assert "gpt2" in (code := "".join(first["source"])) and re.search(r"^MODEL = ", code, re.MULTILINE)


def test_badges_and_installs_name_the_repository_of_pyproject() -> None:
    tool = runpy.run_path(str(DEMOS.parent / "docs" / "tools" / "repository.py"))
    home = tool["repository"]((DEMOS.parent / "pyproject.toml").read_text(encoding="utf-8"))
    for path in NOTEBOOKS:
        text = path.read_text(encoding="utf-8")
        assert tool["named"](text) == {home} and len(tool["PLACES"].findall(text)) == 2, f"{path.name}: run docs/tools/repository.py"
    with pytest.raises(ValueError, match="pyproject.toml has no Repository = "):
        tool["repository"]("[project]")


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
    started.start_kernel(cwd=str(folder))
    yield started
    started.shutdown_kernel(now=True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_with_short_searches(path: Path, kernel: Any, folder: Path) -> None:
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    notebook.cells.insert(0, nbformat.v4.new_code_cell("%reset -f"))
    notebook.cells.insert(3, nbformat.v4.new_code_cell(SHORT))
    NotebookClient(notebook, km=kernel, timeout=120).execute()
    figures = [data for cell in notebook.cells for output in cell.get("outputs", [])
               if "application/vnd.plotly.v1+json" in (data := output.get("data", {})) or "circuitsvis" in data.get("text/plain", "")]
    assert figures or path.stem.startswith("06")
    ignored = re.findall(r"^/demos/(.+)$", (DEMOS.parent / ".gitignore").read_text(encoding="utf-8"), re.MULTILINE)
    left = [file.name for file in folder.iterdir() if not any(file.match(pattern) for pattern in ignored)]
    assert not left, f"run in demos/ it leaves {', '.join(left)}, which .gitignore does not ignore"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_as_it_stands(path: Path, tmp_path: Path) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook, start = nbformat.read(path, as_version=4), time.perf_counter()
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    seconds = time.perf_counter() - start
    print(f"{path.stem}: {seconds:.0f} s")
    assert seconds < 300
