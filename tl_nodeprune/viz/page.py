"""One HTML page of figures, views and tables that needs no network."""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, TypeAlias

import circuitsvis
import jinja2
import pandas as pd
import plotly.graph_objects as go
from circuitsvis.utils.render import RenderedHTML
from markupsafe import Markup
from plotly.basedatatypes import BaseFigure
from plotly.offline import get_plotlyjs

from tl_nodeprune.circuit import files
from tl_nodeprune.evidence import Explanation
from tl_nodeprune.nodes import check_types

Item: TypeAlias = go.Figure | RenderedHTML | pd.DataFrame | Explanation | str
CAPTION = '<p class="caption">{}</p>\n'


class Heading(str):
    """A heading, where save_html takes a string."""


class Terms(str):
    """Words and what they mean, a line each, "word: meaning", where save_html takes a string."""

    def pairs(self) -> list[tuple[str, str]]:
        return [(word, meaning) for word, _, meaning in (line.partition(": ") for line in self.split("\n"))]


def save_html(path: str | Path, *figures: Item, title: str = "tl_nodeprune") -> Path:
    """Write figures, one below the other, as one page that opens without a network: plotly's JavaScript is in it once, and
    circuitsvis' once. All of it or nothing.

    figures: plotly figures, circuitsvis views, DataFrames (tables that filter as you type, and sort by a click on a column), explanations
        of `tlnp.explain` (sentences and table), and strings (a paragraph each).
    Returns the path. Raises: ValueError where nothing is given, or an empty name; TypeError for anything else; FileNotFoundError where
    the folder does not exist; FileExistsError at a symbolic link, a device or a pipe; OSError where the file cannot be written.
    """
    check_types(save_html, {"path": path, "title": title})
    if not figures:
        raise ValueError("save_html has nothing to write; give one figure or more.")
    for number, item in enumerate(figures):
        if not isinstance(item, BaseFigure | RenderedHTML | pd.DataFrame | Explanation | str):
            raise TypeError(f"figure {number} is a {type(item).__name__}; save_html takes plotly figures, circuitsvis views, DataFrames, "
                            "explanations and strings.")
    path = files.check_target(path)
    text = _template().render(
        title=title, items=[_fragment(item) for item in figures],
        plotly=Markup(get_plotlyjs()) if any(isinstance(item, BaseFigure) for item in figures) else "",
        circuitsvis=Markup(_bundle()) if any(isinstance(item, RenderedHTML) for item in figures) else "")
    return files.write(path, text)


def parts_of(view: RenderedHTML) -> tuple[str, str, str]:
    """A view's source before circuitsvis' JavaScript, that JavaScript, and the call after it. No string in the call can end the script.

    Raises: ValueError where the source is not as this circuitsvis writes it.
    """
    before, bundle, after = view.local_src.partition(_bundle())
    call, end, rest = after.rpartition("</script>")
    if not bundle or not end:
        raise ValueError("this view was not rendered by the circuitsvis installed here, so its JavaScript cannot be shared.")
    return before, bundle, call.replace("<", "\\u003c") + end + rest


@cache
def _bundle() -> str:
    """circuitsvis' JavaScript as its `local_src` has it."""
    path = Path(circuitsvis.__file__).parent / "dist" / "cdn" / "iife.js"
    return path.read_text(encoding="utf-8").replace("</script>", "")


def _template() -> jinja2.Template:
    source = resources.files("tl_nodeprune.viz").joinpath("page.html").read_text(encoding="utf-8")
    return jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True).from_string(source)


def _fragment(item: Item) -> dict[str, Any]:
    if isinstance(item, Explanation):
        return {"kind": "explained", "body": Markup(item._repr_html_())}
    if isinstance(item, Terms):
        return {"kind": "terms", "pairs": item.pairs()}
    if isinstance(item, Heading):
        return {"kind": "heading", "body": item}
    if isinstance(item, str):
        return {"kind": "text", "body": item}
    if isinstance(item, RenderedHTML):
        before, _, after = parts_of(item)
        return {"kind": "view", "body": Markup(before + after)}
    if isinstance(item, pd.DataFrame):
        return {"kind": "table", "body": Markup(_as_json(item)), "rows": len(item)}
    config = {"responsive": True, "displaylogo": False}
    return {"kind": "figure", "body": Markup(item.to_html(full_html=False, include_plotlyjs=False, config=config))}


def _as_json(table: pd.DataFrame) -> str:
    """Columns and rows; the index is a column of its own unless it only counts the rows."""
    if not isinstance(table.index, pd.RangeIndex):
        index = table.index.to_frame(index=False).set_axis([name or "" for name in table.index.names], axis=1)
        table = pd.concat([index, table.reset_index(drop=True)], axis=1)  # reset_index refuses an index named as a column
    values = table.set_axis(range(table.shape[1]), axis=1).to_json(orient="values", double_precision=15)
    names = json.dumps([str(name) for name in table.columns])
    return f'{{"columns": {names}, "data": {values}}}'.replace("<", "\\u003c")
