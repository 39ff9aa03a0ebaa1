"""Saved pages in a browser that reaches no network: figures have drawn, hover shows, the table filters, tokens are text; pages of the
command too, and figures of 48 layers on light and dark ground."""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import tl_nodeprune as tlnp
from tl_nodeprune.cli.main import main
from tl_nodeprune.nodes.probe import find_nodes
from tl_nodeprune.nodes.space import GateKey, NodeSpace
from tl_nodeprune.search.result import Step

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed; it is in the dev extra")
from selenium.common.exceptions import WebDriverException  # noqa: E402
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

Toy = tuple[Any, tlnp.PromptPairs]
COLOURS = {  # of each figure's marks
    "mask_map": (37, 125, 152), "neuron_map": (37, 125, 152), "history": (99, 110, 250), "frontier": (99, 110, 250),
    "agreement": (76, 120, 168), "circuit_graph": (242, 211, 56), "compare": (245, 133, 24),
}
FIGURES = tuple(COLOURS)
# the share of a screenshot's pixels that are near a colour, decoded by the browser itself
PIXELS = """
const [png, colour, done] = arguments, image = new Image();
image.onload = () => {
  const canvas = document.createElement("canvas"), draw = canvas.getContext("2d");
  [canvas.width, canvas.height] = [image.width, image.height];
  draw.drawImage(image, 0, 0);
  const { data } = draw.getImageData(0, 0, image.width, image.height);
  let near = 0;
  for (let i = 0; i < data.length; i += 4) near += colour.every((value, j) => Math.abs(value - data[i + j]) < 24);
  done(near / (data.length / 4));
};
image.src = "data:image/png;base64," + png;
"""
# rectangles of the labels on a figure's x or y axes, but for turned ones, which cover less than theirs
LABELS = """
const level = label => /rotate\\(0|^(?!.*rotate)/.test(label.getAttribute("transform") ?? "");
const labels = arguments[0].querySelectorAll(`g[class^="${arguments[1]}"][class$="tick"] text`);
return [...labels].filter(level).map(label => label.getBoundingClientRect().toJSON());
"""
# where in the window a point of a trace is
POINT = """
const [plot, name, i] = arguments, trace = plot._fullData.find(one => one.name === name), box = plot.getBoundingClientRect();
const at = letter => {
  const axis = plot._fullLayout[trace[letter + "axis"].replace(/^./, "$&axis")];
  return axis._offset + axis.d2p(trace[letter][i]);
};
return [box.x + at("x"), box.y + at("y")];
"""
# keeps what is written on canvases, which no element's text has
WRITTEN = """
window.written = [];
const write = CanvasRenderingContext2D.prototype.fillText;
CanvasRenderingContext2D.prototype.fillText = function (text, ...rest) {
  window.written.push(text);
  return write.call(this, text, ...rest);
};
"""


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    chromium = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
    chromedriver = shutil.which("chromedriver")
    if not chromium or not chromedriver:
        pytest.skip("chromium and chromedriver are not installed; on Debian: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1200,900", "--enable-unsafe-swiftshader",
                     "--host-resolver-rules=MAP * ~NOTFOUND", "--disable-background-networking", "--no-first-run"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    try:
        browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(chromedriver))
    except WebDriverException as error:
        pytest.skip(f"{chromium} does not start under {chromedriver}: {error.msg}")
    browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": WRITTEN})
    yield browser
    browser.quit()


@pytest.fixture(scope="module")
def circuit(markup_toy: Toy) -> tlnp.Circuit:
    space, g = find_nodes(markup_toy[0]), torch.Generator().manual_seed(0)
    return tlnp.Circuit(space, {key: torch.rand(shape, generator=g) < (0.6 if shape else 1.0) for key, shape in space.shapes.items()})


@pytest.fixture(scope="module")
def page(markup_toy: Toy, circuit: tlnp.Circuit, driver: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Every figure, every view and a table, open in the browser."""
    (model, prompts), viz = markup_toy, tlnp.viz
    effects = tlnp.crosscheck.activation_patching(model, prompts, progress=False)
    figures = every_figure(circuit, effects, task="<i>ioi</i>")
    views = [view(model, circuit, prompts, prompt=0) for view in (viz.kept_neurons, viz.pruned_neurons, viz.kept_heads, viz.token_effects)]
    path = tmp_path_factory.mktemp("page") / "page.html"
    viz.save_html(path, *figures, *views, viz.node_table(circuit, effects=effects), title="All of it")
    open_page(driver, path)
    return driver


def every_figure(circuit: tlnp.Circuit, effects: Any, task: str = "") -> list[Any]:
    """In the order of FIGURES."""
    viz, steps = tlnp.viz, [Step(i, 1 / (i + 1), 500 - i, 0.1) for i in range(30)]
    table = pd.DataFrame({"size": [10, 100], "kl": [1.0, 0.1], "method": "ours"})
    return [viz.mask_map(circuit, effects=effects, task=task), viz.neuron_map(circuit),
            viz.history(tlnp.PruneResult(circuit, True, 0.03, 0.02, steps, 1.0, 0)), viz.frontier(table), viz.agreement(circuit, effects),
            viz.circuit_graph(circuit, effects=effects), viz.compare(circuit, ~circuit)]


def open_page(driver: Any, path: Path) -> None:
    driver.get(path.as_uri())
    wait(driver, lambda d: d.execute_script("return document.readyState") == "complete")


def wait(driver: Any, condition: Callable[[Any], Any]) -> Any:
    return WebDriverWait(driver, 10).until(condition)


def plots(page: Any) -> list[Any]:
    found = page.find_elements("css selector", ".js-plotly-plot")
    assert len(found) == len(FIGURES)
    return list(found)


def in_view(page: Any, element: Any) -> Any:
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
    return element


def share_near(page: Any, element: Any, colour: tuple[int, int, int]) -> float:
    png = in_view(page, element).screenshot_as_base64
    return float(page.execute_async_script(PIXELS, png, list(colour)))


@pytest.mark.parametrize("name", FIGURES)
def test_each_figure_has_drawn(page: Any, name: str) -> None:
    has_drawn(page, name)


def has_drawn(page: Any, name: str) -> None:
    """Its title stands there, and its marks in their colour, on a canvas or as SVG."""
    plot = plots(page)[FIGURES.index(name)]
    assert wait(page, lambda _: plot.find_element("css selector", ".gtitle").text)
    assert wait(page, lambda _: share_near(page, plot, COLOURS[name]) > 2e-4)
    assert share_near(page, plot, (1, 255, 1)) == 0  # a colour that no figure has


def nothing_failed(page: Any) -> None:
    assert page.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)") == []
    assert [entry["message"] for entry in page.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_nothing_was_asked_of_a_network_and_nothing_failed(page: Any) -> None:
    nothing_failed(page)
    assert page.execute_script("return fetch('http://example.org').then(() => 'reached', () => 'not reached')") == "not reached"
    page.get_log("browser")  # takes out what the failed request left there


def hovered(page: Any, name: str) -> str:
    """What the mouse in the middle of a figure's first panel brings up."""
    plot = plots(page)[FIGURES.index(name)]
    panel = in_view(page, plot.find_element("css selector", '.nsewdrag[data-subplot="xy"]'))
    ActionChains(page).move_to_element(panel).perform()
    return str(wait(page, lambda _: [e.text for e in plot.find_elements("css selector", ".hovertext") if e.text])[0])


def test_hover_says_the_node_and_its_effect(page: Any) -> None:
    assert re.match(r"head 1\.[12]: 0 of 24 dims live\s*effect -?\d", hovered(page, "mask_map"))


def test_hover_on_a_canvas(page: Any, circuit: tlnp.Circuit) -> None:
    name, node = hovered(page, "neuron_map").split()
    assert name == "mlp_neuron" and tuple(map(int, node.split("."))) in circuit.nodes("mlp_neuron")


@pytest.mark.parametrize(("name", "trace", "said"), [
    ("history", "KL, nats", r"step 3\s*KL 0\.25\s*497 nodes open\s*coefficient 0\.1"),
    ("frontier", "ours", r"ours\s*100 leaf nodes\s*KL 0.1 nats"),
    ("agreement", "heads", r"head \d\.\d\s*effect -?\d"), ("circuit_graph", "heads", r"head \d\.\d: \d+ of 24 dims live\s*effect -?\d"),
    ("compare", "heads", r"head 1\.1: (only in a|only in b|in both|in neither)"),
])
def test_hover_of_the_other_figures(page: Any, name: str, trace: str, said: str) -> None:
    """With the mouse on a point of a trace; of heatmaps, on a column's and a row's."""
    plot = in_view(page, plots(page)[FIGURES.index(name)])
    x, y = page.execute_script(POINT, plot, trace, {"history": 3}.get(name, 1))
    ActionChains(page).move_to_element(plot).perform()
    mouse = ActionChains(page)
    mouse.w3c_actions.pointer_action.move_to_location(round(x), round(y))
    mouse.perform()
    text = wait(page, lambda _: [e.text for e in plot.find_elements("css selector", ".hovertext") if e.text])[0]
    assert re.match(said, text), text


def test_the_table_filters_and_sorts(page: Any, circuit: tlnp.Circuit) -> None:
    table = in_view(page, page.find_element("css selector", "section.table"))

    def rows() -> list[list[str]]:
        read = "return [...arguments[0].tBodies[0].rows].map(row => [...row.cells].map(cell => cell.textContent))"
        return page.execute_script(read, table.find_element("css selector", "table"))  # type: ignore[no-any-return]

    total = sum(circuit.count().values())
    count, box = table.find_element("css selector", ".count"), table.find_element("css selector", "input")
    assert count.text == f"{total} of {total}, the first 500 shown" and len(rows()) == 500
    box.send_keys("HEAD 2.")
    kept = [f"head 2.{head}" for layer, head in circuit.nodes("head") if layer == 2]
    assert [row[0] for row in rows()] == kept and count.text == f"{len(kept)} of {total}"
    table.find_elements("css selector", "th")[-1].click()  # by effect, the largest first
    effects = [float(row[-1]) for row in rows()]
    assert effects == sorted(effects, reverse=True) and len(effects) == len(kept)
    box.clear()
    box.send_keys("nothing is called so")
    assert rows() == [] and count.text == f"0 of {total}"


def test_tokens_are_shown_and_not_run(page: Any) -> None:
    evil = "</script><img src=x onerror=run()>"
    views = wait(page, lambda d: d.find_elements("css selector", "section.view"))
    assert len(views) == 4
    for view in views:
        wait(page, lambda _, view=view: "<s>" in view.text and evil in view.text)
        assert view.find_elements("css selector", "img") == [] and "&lt;" not in view.text
    assert page.find_element("css selector", ".gtitle").text.count("<i>ioi</i>") == 1
    assert "0.0 (" in views[2].text and views[2].find_elements("css selector", "canvas")
    written = page.execute_script("return window.written")
    assert "<s> (0)" in written and f"{evil.replace(' ', '')} (1)" in written  # the attention patterns' axes: circuitsvis drops blanks


def test_kept_neurons_clean_above_corrupted(page: Any, markup_toy: Toy) -> None:
    model, prompts = markup_toy
    view = page.find_elements("css selector", "section.view")[0]
    names = [model.to_str_tokens(tokens[0])[2] for tokens in (prompts[0].clean, prompts[0].corrupted)]
    assert names[0] != names[1] and 0 <= view.text.find(f" {names[0]}") < view.text.find(f" {names[1]}")
    assert len(view.find_elements("css selector", "option")) >= 50  # neurons to choose from


def test_a_table_is_not_markup(driver: Any, tmp_path: Path) -> None:
    evil = "<img src=x onerror=\"document.title='run'\">"
    open_page(driver, tlnp.viz.save_html(tmp_path / "t.html", evil, pd.DataFrame({evil: [evil] * 20}), title="quiet"))
    assert driver.title == "quiet" and driver.find_elements("css selector", "img") == []
    assert driver.find_element("css selector", "td").text == evil == driver.find_element("css selector", "th").text


@pytest.mark.parametrize(("template", "ground"), [("plotly_white", (255, 255, 255)), ("plotly_dark", (17, 17, 17))])
def test_figures_of_48_layers_draw_on_any_ground_and_no_labels_overlap(driver: Any, tmp_path: Path, template: str,
                                                                       ground: tuple[int, int, int]) -> None:
    shapes: dict[str, tuple[int, ...]] = {"layer": (), "attn": (), "mlp": (), "head": (25,), "attn_neuron": (25, 4), "mlp_neuron": (200,),
                                          "mlp_out": (100,)}
    present = {GateKey(name, layer): shape for layer in range(48) for name, shape in shapes.items()}
    space, g = NodeSpace(present, present, d_model=100, n_layers=48, kv_heads=25, gated_mlp=False), torch.Generator().manual_seed(0)
    circuit = tlnp.Circuit(space, {key: torch.rand(shape, generator=g) < (0.6 if shape else 1) for key, shape in space.shapes.items()})
    effects = {hook: torch.randn(mask.shape, generator=g) for hook, mask in circuit.items()}
    figures = [figure.update_layout(template=template) for figure in every_figure(circuit, effects)]
    open_page(driver, tlnp.viz.save_html(tmp_path / "deep.html", *figures))
    for name, plot in zip(FIGURES, plots(driver), strict=True):
        has_drawn(driver, name)
        assert share_near(driver, plot, ground) > 0.2
        for axis in "xy":
            labels = driver.execute_script(LABELS, plot, axis)
            assert len(labels) > 1, f"no labels of {name}"
            assert not [pair for pair in itertools.combinations(labels, 2) if overlap(*pair)], f"labels of {name} overlap"
    nothing_failed(driver)


def overlap(a: dict[str, float], b: dict[str, float]) -> bool:
    """Whether two rectangles share more than a pixel each way."""
    return all(min(a[at] + a[size], b[at] + b[size]) - max(a[at], b[at]) > 1 for at, size in (("x", "width"), ("y", "height")))


@pytest.mark.parametrize("command", ["demo", "show"])
def test_a_page_of_the_command(driver: Any, circuit: tlnp.Circuit, tmp_path: Path, command: str) -> None:
    """Every figure has drawn, every view is there, and the kept nodes can be searched. The demo's page is that of `make demo`."""
    page = Path(__file__).parents[2] / "out" / "demo.html"
    if command == "show":
        saved, page = tmp_path / "circuit.safetensors", tmp_path / "page.html"
        circuit.save(saved)
        assert main(["show", str(saved), "--model", "toy", "--task", "ioi", "--prompts", "8", "--html", str(page)]) == 0
    elif not page.is_file():
        pytest.skip("there is no out/demo.html; `make demo` makes it")
    open_page(driver, page)
    figures = driver.find_elements("css selector", ".js-plotly-plot")
    assert len(figures) == 7 + 2 * (command == "demo")  # the search's history is the demo's
    for figure in figures:
        assert wait(driver, lambda _, figure=figure: figure.find_element("css selector", ".gtitle").text)
        assert share_near(driver, figure, (255, 255, 255)) < 0.995  # there is more than a title
    views = wait(driver, lambda d: d.find_elements("css selector", "section.view"))
    assert len(views) == 4 and all(wait(driver, lambda _, view=view: "<s>" in view.text) for view in views)
    table = driver.find_elements("css selector", "section.table")[-1]
    in_view(driver, table.find_element("css selector", "input")).send_keys("mlp_neuron 1.")
    names = [cell.text for cell in table.find_elements("css selector", "tbody td:first-child")]
    assert names and all(name.startswith("mlp_neuron 1.") for name in names)
    nothing_failed(driver)
