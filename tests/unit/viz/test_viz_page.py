"""The saved page: one file, each library in it once, all or nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import pytest
from plotly.offline import get_plotlyjs

import tl_nodeprune as tlnp
from tl_nodeprune.nodes.probe import find_nodes
from tl_nodeprune.search.result import Step
from tl_nodeprune.viz.page import parts_of, save_html

Toy = tuple[Any, tlnp.PromptPairs]


def figure(name: str = "a figure") -> go.Figure:
    return go.Figure(go.Scatter(x=[1, 2], y=[3, 4]), layout={"title": name})


def table_of(page: str) -> dict[str, Any]:
    (found,) = re.findall(r'<script type="application/json">(.*?)</script>', page, flags=re.DOTALL)
    return json.loads(found)  # type: ignore[no-any-return]


def test_each_library_is_there_once_and_nothing_comes_from_a_network(toy: Toy, tmp_path: Path) -> None:
    circuit = tlnp.Circuit.full(find_nodes(toy[0]))
    view = tlnp.viz.kept_neurons(toy[0], circuit, toy[1], most=2)
    heads = tlnp.viz.kept_heads(toy[0], circuit, toy[1])
    path = save_html(tmp_path / "page.html", figure("one"), view, heads, figure("two"), title="a <b>page</b>")
    page = path.read_text(encoding="utf-8")
    assert page.count(get_plotlyjs()) == 1 and page.count(parts_of(view)[1]) == 1
    assert page.count("Plotly.newPlot(") == 2 + get_plotlyjs().count("Plotly.newPlot(") and page.count("CircuitsVis.render(") == 2
    own = page.replace(get_plotlyjs(), "").replace(parts_of(view)[1], "")
    assert not re.search(r"""(src|href)\s*=|import\s|https?://(?!www.w3.org)""", own), "something to fetch"
    assert "<title>a &lt;b&gt;page&lt;/b&gt;</title>" in own and len(own) < 100_000


def test_only_what_is_needed_is_in_the_page(toy: Toy, tmp_path: Path) -> None:
    bundle = parts_of(tlnp.viz.token_effects(toy[0], tlnp.Circuit.full(find_nodes(toy[0]).restrict(("head",))), toy[1]))[1]
    page = save_html(tmp_path / "a.html", "words", pd.DataFrame({"a": [1]})).read_text(encoding="utf-8")
    assert len(page) < 10_000
    page = save_html(tmp_path / "a.html", figure()).read_text(encoding="utf-8")
    assert get_plotlyjs() in page and bundle not in page


def test_tables_and_texts_are_data_not_markup(tmp_path: Path) -> None:
    evil = "</script><script>run()</script>"
    frame = pd.DataFrame({"node": [evil, "head 1.2"], "layer": [1.25e-9, float("nan")]}, index=pd.Index(["x", "y"], name="layer"))
    page = save_html(tmp_path / "page.html", evil, frame).read_text(encoding="utf-8")
    assert evil not in page and "&lt;/script&gt;" in page
    assert table_of(page) == {"columns": ["layer", "node", "layer"], "data": [["x", evil, 1.25e-9], ["y", "head 1.2", None]]}


def test_tokens_cannot_end_the_script(markup_toy: Toy) -> None:
    model, prompts = markup_toy
    circuit = tlnp.Circuit.full(find_nodes(model))
    for view in (tlnp.viz.kept_heads, tlnp.viz.kept_neurons, tlnp.viz.token_effects):
        before, _, call = parts_of(view(model, circuit, prompts))  # type: ignore[operator]
        assert "img src=x" in call and "<img" not in before + call and call.count("</script>") == 1


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = save_html(tmp_path / "page.html", "old")
    old = path.read_text(encoding="utf-8")
    with pytest.raises(TypeError, match="figure 1 is a dict; save_html takes plotly figures, circuitsvis views, DataFrames, explan"):
        save_html(path, figure(), {"data": []})  # type: ignore[arg-type]
    with pytest.raises(UnicodeEncodeError):
        save_html(path, "a lone surrogate: \ud800")
    assert path.read_text(encoding="utf-8") == old and list(tmp_path.iterdir()) == [path]


def test_refuses(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to write; give one figure or more"):
        save_html(tmp_path / "page.html")
    with pytest.raises(FileNotFoundError, match="missing' does not exist; make it first"):
        save_html(tmp_path / "missing" / "page.html", figure())
    with pytest.raises(IsADirectoryError, match="is a folder; give the name of a file"):
        save_html(tmp_path, figure())
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="a folder that even root cannot write to is Linux's /proc")
def test_an_unwritable_folder_is_an_os_error() -> None:
    with pytest.raises(OSError, match="/proc/page.html cannot be written"):
        save_html("/proc/page.html", "text")


def test_overview_of_a_result_and_of_an_empty_circuit(each_toy: Toy, tmp_path: Path) -> None:
    model, prompts = each_toy
    space = find_nodes(model)
    steps = [Step(0, 1.0, 5, 0.1), Step(1, 0.5, 4, 0.1)]
    table = pd.DataFrame({"nodes": [9, 1728], "share": [0.1, 1.0], "search_kl": [1.0, 0.0], "kl": [1.5, 0.0], "low": [1.0, 0.0],
                          "high": [2.0, 0.0], "accuracy": [0.5, 1.0]})
    result = tlnp.PruneResult(tlnp.Circuit.full(space), None, 0.0, 0.0, steps, 1.0, 0, interval=(0.0, 0.1), accuracy=1.0, frontier=table,
                              searched=prompts[:6], held_out=prompts[6:])
    effects = tlnp.crosscheck.activation_patching(model, prompts[:2], progress=False)
    items = tlnp.viz.overview(model, result, prompts, task="ioi", effects=effects)
    titles = [item.layout.title.text.split("<br>")[0] for item in items if isinstance(item, go.Figure)]
    assert str(items[1]) == (f"KL 0 nats on {len(prompts) - 6} prompts held out (90 % interval 0 to 0.1), 100% answered "
                             "right; 0 on the 6 prompts searched. Untested.")
    assert titles == ["What feeds what", "Live nodes", "Size against faithfulness", "The search: KL 0 nats held out, in 1 s, untested",
                      "Kept heads and blocks: 15", "Live MLP neurons: 1,152 of 1,152", "Live attention neurons: 288 of 288",
                      "Live MLP output dims: 288 of 288", "Mask against effects of single nodes"]
    assert isinstance(items[-1], pd.DataFrame) and len(items[-1]) == sum(space.totals().values())
    assert "Leaf nodes live: 1,728 of 1,728 (100.00%)" in str(items[0])
    nothing = tlnp.viz.overview(model, tlnp.Circuit.empty(space), prompts)
    assert "circuit is empty" in str(nothing[-1]) and save_html(tmp_path / "empty.html", *nothing).stat().st_size > 1_000_000
    for only in (("head",), ("layer",)):
        assert save_html(tmp_path / "some.html", *tlnp.viz.overview(model, tlnp.Circuit.full(space.restrict(only)), prompts))
