"""Runs the notebooks of demos/ and writes them back with light outputs.

`python docs/tools/notebooks.py [NAME ...]`, after a change to a notebook or to what it shows; without names all of them. Text and tables
stay as they came; figures and token views become PNG images, taken in Chromium; what goes to stderr is dropped. The
hash of the code that was run is kept in the metadata, so that a test can tell code that was changed since.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

DEMOS = Path(__file__).parents[2] / "demos"
FIGURE = "application/vnd.plotly.v1+json"
WIDTH = 900  # of a picture, pixels
Notebook = dict[str, Any]


def read(path: Path) -> Notebook:
    return json.loads(path.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def write(notebook: Notebook, path: Path) -> None:
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def source_hash(notebook: Notebook) -> str:
    """Of all code, cell by cell."""
    code = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return hashlib.sha256(json.dumps(code).encode()).hexdigest()[:16]


def executed(path: Path) -> Notebook:
    """The notebook with its outputs, run where it lies: what it writes there is ignored by git."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=1800, kernel_name="python3", resources={"metadata": {"path": str(DEMOS)}}).execute()
    return json.loads(nbformat.writes(notebook))  # type: ignore[no-any-return]


def light(notebook: Notebook, browser: Any) -> Notebook:
    """Pictures in place of what needs JavaScript; no trace of when and in what it was run."""
    for cell in notebook["cells"]:
        cell["metadata"].pop("execution", None)
        if cell["cell_type"] == "code":
            outputs = [output for output in cell["outputs"] if output.get("name") != "stderr"]
            cell["outputs"] = [_light(output, browser) for output in outputs if not _is_widget(output)]
    notebook["metadata"] = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
                            "language_info": {"name": "python"}, "source_hash": source_hash(notebook)}
    return notebook


def _is_widget(output: dict[str, Any]) -> bool:
    return "application/vnd.jupyter.widget-view+json" in output.get("data", {})


def _light(output: dict[str, Any], browser: Any) -> dict[str, Any]:
    data = output.get("data", {})
    page = "".join(data.get("text/html", ""))
    if FIGURE in data:
        from plotly import io

        figure = io.from_json(json.dumps(data[FIGURE]), skip_invalid=True)
        page = io.to_html(figure, include_plotlyjs=True, config={"displayModeBar": False})
    if FIGURE in data or "<script" in page:
        output |= {"data": {"image/png": picture(page, browser)}, "metadata": {}}
    elif "text/plain" in data:
        data["text/plain"] = re.sub(r" at 0x[0-9a-f]+", "", "".join(data["text/plain"])).splitlines(keepends=True)
    return output


def browser() -> Any:
    """Chromium without a window."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(argument)
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))


def picture(html: str, driver: Any) -> str:
    """A piece of HTML as it looks once its scripts have run, PNG in base64."""
    import time

    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "page.html"
        style = '<meta charset="utf-8"><style>body{margin:8px;background:#fff}</style>'
        page.write_text(f'{style}<div id="all">{html}</div>', encoding="utf-8")
        driver.set_window_size(WIDTH, 600)
        driver.get(page.as_uri())
        time.sleep(2)
        height = min(1600, driver.execute_script("return document.getElementById('all').getBoundingClientRect().bottom") + 8)
        clip = {"x": 0, "y": 0, "width": WIDTH, "height": height, "scale": 1}
        shot = driver.execute_cdp_cmd("Page.captureScreenshot", {"clip": clip, "captureBeyondViewport": True})
        return str(shot["data"])


def main() -> None:
    os.environ |= {"PLOTLY_RENDERER": "plotly_mimetype", "TQDM_DISABLE": "1"}
    names = sys.argv[1:] or [path.stem for path in sorted(DEMOS.glob("*.ipynb"))]
    driver = browser()
    try:
        for name in names:
            path = DEMOS / f"{name}.ipynb"
            notebook = light(executed(path), driver)
            write(notebook, path)
            sizes = [len(base64.b64decode(output["data"]["image/png"])) // 1000 for cell in notebook["cells"]
                     for output in cell.get("outputs", []) if "image/png" in output.get("data", {})]
            print(f"{name}: {path.stat().st_size / 1e3:.0f} kB, pictures {sizes} kB", flush=True)
    finally:
        driver.quit()


if __name__ == "__main__":
    main()
