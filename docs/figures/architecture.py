"""The picture of docs/contributing: packages from top to bottom, their files, and who imports whom: `python docs/figures/architecture.py`.

Read from the code itself: the order from the contract in pyproject.toml, the lesson from each package's `__init__`, the lines from the
imports. A line goes down from the package that imports; the more names it takes, the thicker.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).parents[2]
PACKAGE, TARGET = ROOT / "tl_nodeprune", Path(__file__).with_suffix(".svg")
TEXT, LINE, NAME = "#7d8590", "#80808090", "#2f81f7"
LONGEST = 88  # letters of a lesson in a box
WIDTH, BOX, ROW, GAP, MARGIN, BULGE = 900, 690, 58, 12, 14, 22


def layers() -> list[str]:
    """Packages, the topmost first."""
    (found,) = re.findall(r"^layers = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    return re.findall(r"\w+", found)


def lesson(package: str) -> str:
    """The first sentence of a package's docstring, or as much of it as has room."""
    doc = ast.get_docstring(ast.parse((PACKAGE / package / "__init__.py").read_text(encoding="utf-8"))) or ""
    sentence = " ".join(doc.split("\n\n")[0].split()).replace("`", "")
    return min((sentence.split(end)[0].rstrip(".") for end in (". ", ": ", "; ", ", ")), key=lambda part: (len(part) > LONGEST, -len(part)))


def files(package: str) -> list[str]:
    inside = (PACKAGE / package).iterdir()
    return sorted(path.stem + "/" * path.is_dir() for path in inside
                  if path.suffix == ".py" and path.stem != "__init__" or (path / "__init__.py").exists())


def imports() -> Counter[tuple[str, str]]:
    """How many names each package takes from each other one."""
    found: Counter[tuple[str, str]] = Counter()
    for path in PACKAGE.glob("*/**/*.py"):
        own = path.relative_to(PACKAGE).parts[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            parts = (node.module or "").split(".") if isinstance(node, ast.ImportFrom) else []
            if parts[:1] == ["tl_nodeprune"] and isinstance(node, ast.ImportFrom):
                taken = [parts[1]] * len(node.names) if len(parts) > 1 else [name.name for name in node.names]
                found.update((own, other) for other in taken if other != own)
    return found


def text(x: float, y: float, words: str, *, size: int, fill: str = TEXT, weight: str = "normal") -> str:
    return (f'<text x="{x:g}" y="{y:g}" font-family="system-ui, sans-serif" font-size="{size}" font-weight="{weight}" fill="{fill}">'
            f"{escape(words)}</text>")


def drawing() -> Iterator[str]:
    order, counts = layers(), imports()
    top = {package: MARGIN + i * (ROW + GAP) for i, package in enumerate(order)}
    for (upper, lower), n in sorted(counts.items()):
        start, end = top[upper] + ROW * 0.65, top[lower] + ROW * 0.35
        out = MARGIN + BOX + BULGE * (order.index(lower) - order.index(upper))
        yield (f'<path fill="none" stroke="{LINE}" stroke-width="{min(0.6 + n / 20, 4):.2g}" '
               f'd="M{MARGIN + BOX} {start:g}C{out} {start:g} {out} {end:g} {MARGIN + BOX} {end:g}"/>')
    for package, y in top.items():
        yield f'<rect x="{MARGIN}" y="{y}" width="{BOX}" height="{ROW}" rx="8" fill="none" stroke="{LINE}"/>'
        yield text(MARGIN + 14, y + 24, package, size=16, fill=NAME, weight="600")
        yield text(MARGIN + 110, y + 23, lesson(package), size=12)
        yield text(MARGIN + 110, y + 43, " · ".join(files(package)), size=11)


def svg() -> str:
    height = 2 * MARGIN + len(layers()) * (ROW + GAP) - GAP
    body = "\n".join(drawing())
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" role="img">\n'
            f"<title>The packages of tl_nodeprune; imports go down only</title>\n{body}\n</svg>\n")


if __name__ == "__main__":
    TARGET.write_text(svg(), encoding="utf-8")
