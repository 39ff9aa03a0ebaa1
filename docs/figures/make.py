"""The drawings of the README and the docs, as SVG: `python docs/figures/make.py`, about a minute.

circuit.svg: every leaf node of the embedded model, and which of them the circuit of the README's lines keeps. floors.svg: where in a
block the granularities are. Colours are readable on a light and on a dark page.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import torch
from torch import Tensor

import tl_nodeprune as tlnp

FOLDER = Path(__file__).parent
KEPT, CUT, TEXT, LINE = "#2f81f7", "#80808040", "#7d8590", "#80808090"
PITCH, SIDE, PANEL, GAP, MARGIN = 7, 6, 224, 34, 16
COLUMNS = {"attn_neuron": 6, "mlp_neuron": 32, "mlp_out": 32}  # of nodes beside each other


def text(x: float, y: float, words: str, *, size: int = 12, anchor: str = "start", weight: str = "normal", mono: bool = False) -> str:
    family = "ui-monospace, Consolas, monospace" if mono else "system-ui, sans-serif"
    return (f'<text x="{x:g}" y="{y:g}" font-family="{family}" font-size="{size}" font-weight="{weight}" text-anchor="{anchor}" '
            f'fill="{TEXT}">{escape(words)}</text>')


def svg(width: int, height: int, title: str, parts: Iterable[str]) -> str:
    body = "\n".join(parts)
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" role="img">\n'
            f"<title>{escape(title)}</title>\n{body}\n</svg>\n")


def squares(live: Tensor, x: int, y: int, columns: int) -> Iterator[str]:
    """A grid of nodes, live [node] bool: one path for those kept, one for those cut."""
    for name, colour, which in (("kept", KEPT, live), ("cut", CUT, ~live)):
        cells = [f"M{x + i % columns * PITCH} {y + i // columns * PITCH}h{SIDE}v{SIDE}h-{SIDE}z" for i in which.nonzero()[:, 0].tolist()]
        if cells:
            yield f'<path class="{name}" fill="{colour}" d="{"".join(cells)}"/>'


def layer_parts(circuit: tlnp.Circuit, layer: int, x: int, y: int) -> Iterator[str]:
    """One layer: heads with their dims, MLP neurons, MLP output dims."""
    def count(granularity: str) -> str:
        live = circuit.live(granularity, layer)
        return f"{int(live.sum())} of {live.numel()}"

    yield text(x, y, f"layer {layer}", size=13, weight="600")
    yield text(x, y + 20, f"heads and their dims: {count('attn_neuron')}", size=11)
    heads = circuit.live("attn_neuron", layer)
    step = (PANEL - COLUMNS["attn_neuron"] * PITCH) / max(len(heads) - 1, 1)
    for i, dims in enumerate(heads):
        yield from squares(dims, round(x + i * step), y + 28, COLUMNS["attn_neuron"])
    yield text(x, y + 76, f"MLP neurons: {count('mlp_neuron')}", size=11)
    yield from squares(circuit.live("mlp_neuron", layer), x, y + 84, COLUMNS["mlp_neuron"])
    yield text(x, y + 188, f"MLP output dims: {count('mlp_out')}", size=11)
    yield from squares(circuit.live("mlp_out", layer), x, y + 196, COLUMNS["mlp_out"])


def circuit_svg(circuit: tlnp.Circuit, prompt: str, answer: str, faithful: str) -> str:
    """Every leaf node of a small model by layer, those kept in colour."""
    width = 2 * MARGIN + len(circuit.space.layers) * (PANEL + GAP) - GAP
    title = f"A circuit: {circuit.size:,} of {circuit.size_total:,} nodes"
    parts = [text(MARGIN, 26, title, size=17, weight="600"), text(MARGIN, 48, f"{prompt} → {answer}", size=13, mono=True),
             text(MARGIN, 68, faithful, size=12)]
    for i, layer in enumerate(circuit.space.layers):
        parts += layer_parts(circuit, layer, MARGIN + i * (PANEL + GAP), 100)
    legend = 342
    parts += [f'<path fill="{KEPT}" d="M{MARGIN} {legend - 9}h10v10h-10z"/>', text(MARGIN + 16, legend, "kept", size=11),
              f'<path fill="{CUT}" d="M{MARGIN + 56} {legend - 9}h10v10h-10z"/>',
              text(MARGIN + 72, legend, "cut: it takes the activation that it has on a prompt with other names", size=11)]
    return svg(width, legend + 14, title, parts)


def quickstart() -> tuple[Any, tlnp.PromptPairs, tlnp.Circuit]:
    """The README's search. Returns model, held-out prompts, circuit."""
    model, prompts = tlnp.toy.load()
    train, test = prompts.split(0.75, seed=0)
    masks = model.add_node_masks()
    result = masks.prune(train, max_kl=0.05)
    model.remove_node_masks()
    return model, test, result.circuit


def box(x: float, y: float, width: float, height: float, *, dashed: bool = False, radius: int = 8) -> str:
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius}" fill="none" stroke="{LINE}"{dash}/>'


def wire(points: str, *, arrow: bool = False) -> str:
    end = ' marker-end="url(#end)"' if arrow else ""
    return f'<polyline points="{points}" fill="none" stroke="{LINE}" stroke-width="2"{end}/>'


def gate(x: float, y: float) -> str:
    return f'<circle cx="{x:g}" cy="{y:g}" r="6" fill="{KEPT}"/>'


def named(x: float, y: float, granularity: str, where: str) -> list[str]:
    """A granularity's name beside its gate, and below it its hook point and shape."""
    return [gate(x, y), text(x + 12, y + 4, granularity, size=13, weight="600", mono=True), text(x + 12, y + 20, where, size=10, mono=True)]


def floors_svg() -> str:
    """One block, its branches and the stream, a gate at every granularity."""
    generator = torch.Generator().manual_seed(0)
    parts = [f'<defs><marker id="end" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" markerHeight="6" orient="auto">'
             f'<path d="M0 0L8 4L0 8z" fill="{LINE}"/></marker></defs>',
             box(70, 14, 730, 366, dashed=True), *named(88, 36, "layer", "hook_resid_post []: all that the block adds"),
             wire("16,346 872,346", arrow=True), text(16, 336, "resid_pre", size=11, mono=True),
             text(868, 336, "resid_post", size=11, anchor="end", mono=True)]
    for x, width, what in ((110, 270, "attention"), (440, 300, "MLP")):
        end = x + width - 20
        parts += [text(x, 88, what, size=12), box(x, 96, width, 188), wire(f"{x + 20},346 {x + 20},286", arrow=True),
                  wire(f"{end},284 {end},337", arrow=True),
                  f'<circle cx="{end}" cy="346" r="8" fill="none" stroke="{LINE}" stroke-width="2"/>', wire(f"{end},339 {end},353")]
    parts += [*named(128, 122, "head", "attn.hook_z [head]"), *named(128, 224, "attn_neuron", "attn.hook_z [head, d_head]"),
              *named(360, 310, "attn", ""), text(348, 314, "hook_attn_out []", size=10, anchor="end", mono=True)]
    for i in range(4):
        parts += [box(128 + i * 60, 152, 52, 40, radius=4),
                  *squares(torch.rand(24, generator=generator) < (0.7, 0, 0.4, 0.9)[i], 133 + i * 60, 158, 6)]
    parts += [*named(458, 122, "mlp_neuron", "mlp.hook_post [d_mlp]"), *squares(torch.rand(148, generator=generator) < 0.2, 458, 152, 37),
              *named(458, 224, "mlp_out", "hook_mlp_out [d_model]"), *squares(torch.rand(37, generator=generator) < 0.5, 458, 254, 37),
              *named(720, 310, "mlp", ""), text(708, 314, "hook_mlp_out []", size=10, anchor="end", mono=True)]
    return svg(888, 394, "A block and the gates on its nodes", parts)


def main() -> None:
    (FOLDER / "floors.svg").write_text(floors_svg(), encoding="utf-8")
    model, test, circuit = quickstart()
    found = tlnp.evaluate(model, circuit, test)
    prompt = model.tokenizer.decode(test.clean[0][test.attention_mask[0]], skip_special_tokens=True).replace(" ,", ",")
    faithful = (f"On {found.n_prompts} prompts that the search has not seen: KL to the full model {found.kl:.3f} nats (nothing kept: "
                f"{found.ablated.kl:.1f}), right name in {found.accuracy:.0%}")
    drawing = circuit_svg(circuit, prompt, model.tokenizer.decode(test.answers[0]), faithful)
    (FOLDER / "circuit.svg").write_text(drawing, encoding="utf-8")


if __name__ == "__main__":
    main()
