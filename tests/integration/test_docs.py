"""Every python block of the README and the docs runs unchanged, in a namespace and a folder of its own; links, reference, drawings."""

from __future__ import annotations

import inspect
import os
import pkgutil
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

import tl_nodeprune as tlnp
from tl_nodeprune.cli.main import _parser
from tl_nodeprune.nodes.probe import find_nodes

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]


def blocks() -> list[Any]:
    """Each block with its page and the line of its fence."""
    found = []
    for page in PAGES:
        text, name = page.read_text(encoding="utf-8"), str(page.relative_to(ROOT))
        for match in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            line = text.count("\n", 0, match.start()) + 1
            found.append(pytest.param(page, line, match[1], id=f"{name}:{line}"))
    return found


@pytest.mark.parametrize(("page", "line", "code"), blocks())
def test_block_runs(page: Path, line: int, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile("\n" * line + code, str(page), "exec"), {"__name__": "__main__"})  # so that a traceback names the page's line


def test_no_block_is_missed() -> None:
    """A block that is fenced otherwise ("```py", indented, a bare fence) would pass unread; those of a shell are read below, and patches by
    test_adding.py."""
    fences = [fence for page in PAGES for fence in re.findall(r"^.*```.*$", page.read_text(encoding="utf-8"), re.MULTILINE)]
    opened = fences[::2]
    assert set(fences[1::2]) == {"```"} and set(opened) <= {"```python", "```sh", "```diff"}
    assert opened.count("```python") == len(blocks()) > 5


def commands() -> list[Any]:
    """Each command in the pages' shell blocks, as words; the brackets of what is optional are taken off."""
    found = []
    for page in PAGES:
        for block in re.findall(r"^```sh\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(re.sub(r"[][&]|\.\.\.|\w+=\$i", "", line).replace("$i", "0"), comments=True)
                if words and words[0] not in ("for", "done"):
                    found.append(pytest.param(words, id=f"{page.relative_to(ROOT)}: {' '.join(words[:3])}"))
    return found


@pytest.mark.parametrize("words", commands())
def test_command_is_there(words: list[str]) -> None:
    """Targets of make, arguments of the command, scripts and their options."""
    if words[0] == "make":
        run = subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
    elif words[0] == "tl-nodeprune":
        _parser().parse_args([word.split("|")[0] for word in words[1:]])
    else:
        assert words[0] == "python"
        source = (ROOT / words[1]).read_text(encoding="utf-8")
        assert not [word for word in words[2:] if word.startswith("--") and f'"{word}"' not in source]


def links(page: Path) -> list[str]:
    """Targets of a page's links and images, without those in code."""
    text = re.sub(r"^```[\s\S]*?^```$|^ {4,}.*$|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return re.findall(r"\]\(([^)\s]+)\)", text)


def anchors(page: Path) -> set[str]:
    """The names that a page's headings have on GitHub and in MkDocs."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page: Path) -> None:
    broken = []
    for target in links(page):
        path, _, anchor = target.partition("#")
        led = page.parent / path if path else page
        if "://" not in target and (not led.exists() or anchor and anchor not in anchors(led)):
            broken.append(target)
    assert not broken


def test_links_are_found_at_all() -> None:
    found = links(ROOT / "README.md")
    assert "docs/figures/circuit.svg" in found and "docs/how-to/budget.md#when-it-does-not-converge" in found
    assert "decisions/0005-nested-search.md" in links(ROOT / "docs" / "index.md")
    assert len(links(ROOT / "docs" / "one-page.md")) >= 7 and "when-it-does-not-converge" in anchors(ROOT / "docs" / "how-to" / "budget.md")


def documented() -> set[int]:
    """What the reference pages show, by identity: objects, and of a module its chosen members."""
    shown: set[int] = set()
    for page in (ROOT / "docs" / "reference").glob("*.md"):
        for match in re.finditer(r"^::: (\S+)\n(?:    options:\n      members: \[(.*)\])?", page.read_text(encoding="utf-8"), re.MULTILINE):
            thing = pkgutil.resolve_name(match[1])
            shown |= {id(thing), *(id(getattr(thing, name)) for name in re.findall(r"\w+", match[2] or ""))}
    return shown


@pytest.mark.parametrize("module", [tlnp, tlnp.crosscheck, tlnp.known, tlnp.mib, tlnp.viz], ids=lambda module: module.__name__)
def test_every_public_name_is_in_the_reference(module: ModuleType) -> None:
    shown = documented()
    constants = {"GRANULARITIES", "COARSE", "SIZES"}
    missing = [name for name in module.__all__ if name not in constants and id(getattr(module, name)) not in shown]
    assert not missing, f"docs/reference has no ::: for {', '.join(missing)} of {module.__name__}"


def test_drawing_says_what_it_shows() -> None:
    """docs/figures/circuit.svg: as many squares kept as its title says."""
    svg = (ROOT / "docs" / "figures" / "circuit.svg").read_text(encoding="utf-8")
    kept, total = (int(number.replace(",", "")) for number in re.search(r"A circuit: ([\d,]+) of ([\d,]+) nodes", svg).groups())  # type: ignore[union-attr]
    drawn = {name: sum(path.count("M") for path in re.findall(rf'<path class="{name}"[^>]* d="([^"]*)"', svg)) for name in ("kept", "cut")}
    assert drawn == {"kept": kept, "cut": total - kept}


def test_the_readme_says_of_its_picture_what_the_picture_says() -> None:
    svg, readme = ((ROOT / name).read_text(encoding="utf-8") for name in ("docs/figures/circuit.svg", "README.md"))
    kl = re.search(r"KL to the full model 0(\.\d+) nats", svg)
    assert kl and f"the picture's circuit has {kl[1]}." in readme


def test_drawing_is_made_from_a_circuit(toy: Any) -> None:
    make, space = runpy.run_path(str(ROOT / "docs" / "figures" / "make.py")), find_nodes(toy[0])
    generator = torch.Generator().manual_seed(0)
    gates = {key: torch.rand(shape, generator=generator) < (0.5 if shape else 2) for key, shape in space.shapes.items()}
    circuit = tlnp.Circuit(space, gates)
    svg = make["circuit_svg"](circuit, "a <prompt> &", "answer", "faithful")
    ElementTree.fromstring(svg)
    assert sum(path.count("M") for path in re.findall(r'<path class="kept"[^>]* d="([^"]*)"', svg)) == circuit.size
    ElementTree.fromstring(make["floors_svg"]())


def test_the_picture_of_the_packages_is_that_of_the_code() -> None:
    make = runpy.run_path(str(ROOT / "docs" / "figures" / "architecture.py"))
    svg = make["svg"]()
    ElementTree.fromstring(svg)
    assert svg == make["TARGET"].read_text(encoding="utf-8"), "the code has changed: run python docs/figures/architecture.py"
    order = make["layers"]()
    assert all(order.index(upper) < order.index(lower) for upper, lower in make["imports"]())


def test_the_plots_show_what_the_results_page_says() -> None:
    make = runpy.run_path(str(ROOT / "docs" / "figures" / "frontier.py"))
    for target, drawing in ((make["SMOLLM2"], make["smollm2_svg"]()), (make["STORIES"], make["stories_svg"]())):
        ElementTree.fromstring(drawing)
        assert drawing == target.read_text(encoding="utf-8"), "the tables have changed: run python docs/figures/frontier.py"


@pytest.mark.parametrize("function", [tlnp.prune, tlnp.rank, tlnp.sweep, tlnp.estimate, tlnp.report, tlnp.evaluate, tlnp.add_node_masks],
                         ids=lambda function: function.__name__)
def test_every_argument_has_a_line_of_its_own(function: Any) -> None:
    described = re.findall(r"^    (\w+): ", function.__doc__, re.MULTILINE)
    assert set(inspect.signature(function).parameters) <= set(described)


def test_docstrings_become_lists() -> None:
    pytest.importorskip("griffe", reason="griffe is not installed; it comes with the docs extra")
    as_markdown = runpy.run_path(str(ROOT / "docs" / "tools" / "docstrings.py"))["as_markdown"]
    text = "What it does.\n\nsteps: at\n    most. seed: of draws. note: no name.\n\nRaises: ValueError.\n\nmore\nlines: here."
    want = "What it does.\n\n\n- `steps`: at most.\n- `seed`: of draws. note: no name.\n\n**Raises** ValueError.\n\nmore lines: here."
    assert as_markdown(text, {"steps", "seed"}) == want
    assert as_markdown(text, {"steps": " (`int`)", "seed": ""}) == want.replace("`steps`", "`steps` (`int`)")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; to build it without a warning is a test in itself."""
    for module in ("mkdocs", "material", "mkdocstrings_handlers.python", "mkdocs_jupyter"):
        pytest.importorskip(module, reason=f"{module} is not installed; it is in the docs extra")
    built = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-f", ".mkdocs.yml", "-d", str(built)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"})
    assert run.returncode == 0, run.stdout + run.stderr
    assert "WARNING" not in run.stdout + run.stderr
    return built


def test_site_has_the_reference(site: Path) -> None:
    assert 'id="tl_nodeprune.search.prune.prune"' in (site / "reference" / "search.html").read_text(encoding="utf-8")


def test_a_page_of_the_site_loads_nothing_from_a_network(site: Path) -> None:
    for name in ("index.html", "how-to/budget.html"):
        loaded = re.findall(r'<(?:script|img|iframe)[^>]* src="([^"]*)"', (site / name).read_text(encoding="utf-8"))
        assert loaded and not [target for target in loaded if "//" in target]


def test_search_works_in_a_site_opened_from_a_folder(site: Path) -> None:
    assert "interchange" in (site / "search" / "search_index.js").read_text(encoding="utf-8")
    pytest.importorskip("selenium.webdriver", reason="selenium is not installed; it is in the dev extra")
    from selenium.common.exceptions import WebDriverException
    from selenium.webdriver.support.ui import WebDriverWait

    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("chromium and chromedriver are not installed; on Debian: apt-get install chromium chromium-driver")
    try:
        driver = runpy.run_path(str(ROOT / "docs" / "tools" / "notebooks.py"))["browser"]()
    except WebDriverException as error:
        pytest.skip(f"chromium does not start: {error.msg}")
    try:
        driver.set_window_size(1300, 900)
        driver.get((site / "how-to" / "budget.html").as_uri())
        box = driver.find_element("css selector", "input.md-search__input")
        driver.execute_script("document.querySelector('[data-md-toggle=search]').click(); arguments[0].focus()", box)
        WebDriverWait(driver, 10).until(lambda _: box.is_displayed())
        box.send_keys("interchange")
        found = WebDriverWait(driver, 20).until(lambda _: driver.find_elements("css selector", ".md-search-result__item a"))
        targets = {Path(link.get_attribute("href").removeprefix("file://").partition("#")[0].partition("?")[0]) for link in found}
        assert len(targets) > 2 and all(target.is_file() for target in targets)
    finally:
        driver.quit()
