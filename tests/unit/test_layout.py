"""The house: what one package takes from another it takes from its `__init__`, which says in a line each what its files are."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

import tl_nodeprune

ROOT = Path(tl_nodeprune.__file__).parent
PACKAGES = sorted(path.parent.name for path in ROOT.glob("*/__init__.py"))
ROOMS = sorted(path.parent.relative_to(ROOT).as_posix() for path in ROOT.glob("*/**/__init__.py") if path.parent.name != "search")


def imports_of(path: Path) -> list[tuple[str, str]]:
    """The modules and names that a file imports from this library."""
    tree = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return [(node.module or "", name.name) for node in tree if isinstance(node, ast.ImportFrom) for name in node.names
            if (node.module or "").startswith("tl_nodeprune")]


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_takes_from_another_what_its_init_offers(package: str) -> None:
    for path in (ROOT / package).rglob("*.py"):
        for module, name in imports_of(path):
            parts = module.split(".")
            if len(parts) > 1 and parts[1] != package:
                assert len(parts) == 2, f"{path.name} imports {name} from {module}; import it from tl_nodeprune.{parts[1]}"
                offered = importlib.import_module(module)
                assert name in offered.__all__, f"{path.name} imports {name}, which is not in {module}.__all__"


@pytest.mark.parametrize("room", ROOMS)
def test_an_init_has_a_line_for_each_file_and_there_are_few(room: str) -> None:
    folder = ROOT / room
    lesson = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
    files = {path.stem for path in folder.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()} - {"__init__"}
    told = {line.split("  ")[0] for line in lesson.splitlines() if "  " in line}
    assert files == told, f"{room}: these files and these lines: {files ^ told}"
    assert len(files) <= 10
