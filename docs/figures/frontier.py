"""The plots of the results page, as SVG: `python docs/figures/frontier.py`.

Read from the tables of docs/explanation/frontier.md and tests/benchmarks/results/frontier/search-before.md, so that a plot shows what a
table says. Colours are readable on a light and on a dark page.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).parents[2]
PAGE, BEFORE = ROOT / "docs/explanation/frontier.md", ROOT / "tests/benchmarks/results/frontier/search-before.md"
SMOLLM2, STORIES = (Path(__file__).with_name(f"{name}_frontier.svg") for name in ("smollm2", "stories"))
TEXT, LINE, OURS, GRADIENTS, LEARNED, OLDER = "#7d8590", "#80808060", "#2f81f7", "#d9822b", "#a371f7", "#2ea043"
Points = list[tuple[float, float]]


def rows(page: Path, first: str) -> list[list[str]]:
    """The cells of the table whose head begins so, without head and rule."""
    table = page.read_text(encoding="utf-8").split(f"\n| {first}", 1)[1].split("\n\n")[0].split("\n")[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in table]


def number(cell: str) -> float:
    """The cell's first number; a percentage as such."""
    return float(cell.split()[0].replace(",", ""))


class Axes:
    """A panel with logarithmic axes: its place on the drawing, and the range of each axis."""

    def __init__(self, left: float, top: float, width: float, height: float, x: tuple[float, float], y: tuple[float, float]) -> None:
        self.left, self.top, self.width, self.height, self.x, self.y = left, top, width, height, x, y

    def at(self, x: float, y: float) -> tuple[float, float]:
        across, up = (math.log(value / low) / math.log(high / low) for value, (low, high) in ((x, self.x), (y, self.y)))
        return self.left + across * self.width, self.top + (1 - up) * self.height

    def grid(self, x_ticks: list[float], y_ticks: list[float], unit: str = "") -> Iterator[str]:
        for tick in y_ticks:
            _, y = self.at(self.x[0], tick)
            yield f'<path stroke="{LINE}" d="M{self.left:g} {y:.1f}h{self.width:g}"/>'
            yield text(self.left - 8, y + 4, f"{tick:g}", anchor="end")
        for tick in x_ticks:
            x, _ = self.at(tick, self.y[0])
            yield f'<path stroke="{LINE}" d="M{x:.1f} {self.top + self.height:g}v5"/>'
            yield text(x, self.top + self.height + 20, f"{tick:,g}{unit}", anchor="middle")

    def curve(self, points: Points, colour: str, *, dashed: bool = False) -> Iterator[str]:
        places = [self.at(*point) for point in points]
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        yield f'<path fill="none" stroke="{colour}" stroke-width="2"{dash} d="M{path}"/>'
        if not dashed:
            yield from (dot(x, y, colour) for x, y in places)


def text(x: float, y: float, words: str, *, size: int = 13, anchor: str = "start", fill: str = TEXT, weight: str = "normal") -> str:
    return (f'<text x="{x:.1f}" y="{y:.1f}" font-family="system-ui, sans-serif" font-size="{size}" font-weight="{weight}" '
            f'text-anchor="{anchor}" fill="{fill}">{escape(words)}</text>')


def dot(x: float, y: float, colour: str, *, hollow: bool = False) -> str:
    fill = f'fill="none" stroke="{colour}" stroke-width="2"' if hollow else f'fill="{colour}"'
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{5 if hollow else 4}" {fill}/>'


def svg(width: int, height: int, title: str, says: str, parts: list[str]) -> str:
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" role="img">\n'
            f"<title>{escape(title)}</title>\n<desc>{escape(says)}</desc>\n" + "\n".join(parts) + "\n</svg>\n")


def smollm2_svg() -> str:
    """SmolLM2's frontier beside baselines of as many passes."""
    long = [(number(share), number(kl)) for share, kl, _ in rows(PAGE, "share of the leaf nodes ")]
    table = rows(PAGE, "share | ours")
    ours, matryoshka, gradients = ([(number(row[0]), number(row[i])) for row in table] for i in (1, 2, 3))
    page = PAGE.read_text(encoding="utf-8")
    size, share = re.findall(r"^\| size \| ([\d,]+) leaf nodes, ([\d.]+) %", page, re.MULTILINE)[0]
    (kl,) = re.findall(r"^\| KL, held out \| ([\d.]+) nats", page, re.MULTILINE)
    axes = Axes(58, 66, 466, 300, (0.9, 56), (0.08, 40))
    parts = [text(14, 24, "SmolLM2-135M, IOI: what a circuit of each size loses", size=17, weight="600"),
             text(14, 46, "KL to the full model on held-out prompts, nats"),
             *axes.grid([1, 2, 4, 8, 15, 30, 50], [0.1, 0.3, 1, 3, 10, 30], " %"),
             *axes.curve(long, OURS, dashed=True), *axes.curve(ours, OURS), *axes.curve(gradients, GRADIENTS),
             *axes.curve(matryoshka, LEARNED)]
    x, y = axes.at(float(share), float(kl))
    parts += [dot(x, y, OURS, hollow=True), f'<path fill="none" stroke="{OURS}" d="M{x - 4:.1f} {y + 4:.1f}L{x - 38:.1f} {y + 30:.1f}"/>',
              text(x - 42, y + 40, f"{size} nodes, {kl} nats", anchor="end", fill=OURS, weight="600"),
              text(x - 42, y + 57, "the circuit for max_kl=0.25", anchor="end", fill=OURS)]
    for name, (place, colour) in {"Matryoshka Attribution": (matryoshka, LEARNED), "integrated gradients": (gradients, GRADIENTS)}.items():
        x, y = axes.at(*place[0])
        parts.append(text(x + 6, y - 12, name, fill=colour, weight="600"))
    x, y = axes.at(15, 0.33)
    parts += [text(x, y, "tl_nodeprune", fill=OURS, weight="600"),
              text(14, 408, "Share of the 80,640 leaf nodes kept. Solid: as many passes for ours as for"),
              text(14, 425, "Matryoshka Attribution. Dashed: the run of the circuit, three times as long.")]
    both = [f"{across:g} %: {low:g}, {middle:g}, {high:g}" for (across, low), (_, middle), (_, high) in
            zip(ours, gradients, matryoshka, strict=True)]
    return svg(544, 436, "SmolLM2-135M, IOI: size against KL",
               "KL in nats by share of leaf nodes kept: tl_nodeprune, integrated gradients, Matryoshka Attribution. " + "; ".join(both),
               parts)


def stories() -> dict[str, dict[str, tuple[float, float]]]:
    """By task and method, nodes and held-out KL."""
    found = {}
    for row in rows(PAGE, "task | nodes | KL, held out "):
        part = BEFORE.read_text(encoding="utf-8").split(f"\n## stories3M/{row[0]}\n")[1].split("\n## ")[0]

        def median(method: str, part: str = part) -> tuple[float, float]:
            cells = part.split(f"\n| {method} |")[1].split("\n")[0].split("|")
            return number(cells[0]), number(cells[2])

        found[row[0]] = {"prune": (number(row[1]), number(row[2])), "the search before": (number(row[5]), number(row[6])),
                         "paper's objective": median("paper, lam 0.99"), "the same, summed": median("paper, summed, lam 0.95"),
                         "integrated gradients": median("attribution, KL, integrated")}
    return found


def stories_svg() -> str:
    """Six tasks of the story model, a panel each, a point per method."""
    looks = {"prune": (OURS, False), "the search before": (OURS, True), "paper's objective": (LEARNED, False),
             "the same, summed": (LEARNED, True), "integrated gradients": (GRADIENTS, False)}
    parts = [text(14, 24, "stories3M, six tasks: nodes kept against held-out KL", size=17, weight="600")]
    for i, (name, (colour, hollow)) in enumerate(looks.items()):
        x, y = 20 + i % 3 * 172, 50 + i // 3 * 22
        parts += [dot(x, y - 4, colour, hollow=hollow), text(x + 12, y, name, fill=colour)]
    for i, (task, points) in enumerate(stories().items()):
        axes = Axes(54 + i % 2 * 258, 118 + i // 2 * 196, 220, 134, (100, 5376), (0.005, 2))
        parts += [text(axes.left, axes.top - 8, task, weight="600"), *axes.grid([100, 300, 1000, 3000], [0.01, 0.05, 0.2, 1])]
        for name in reversed(looks):
            x, y = axes.at(*points[name])
            parts.append(dot(x, y, looks[name][0], hollow=looks[name][1]))
    says = "; ".join(f"{task}: " + ", ".join(f"{name} {size:,g} nodes at {kl:g} nats" for name, (size, kl) in points.items())
                     for task, points in stories().items())
    parts.append(text(14, 692, "Across: leaf nodes kept, of 5,376. Up: KL to the full model, nats. Budget: 0.05."))
    return svg(544, 706, "stories3M: size against KL", says, parts)


def main() -> None:
    SMOLLM2.write_text(smollm2_svg(), encoding="utf-8")
    STORIES.write_text(stories_svg(), encoding="utf-8")


if __name__ == "__main__":
    main()
