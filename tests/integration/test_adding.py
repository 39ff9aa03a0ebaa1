"""What docs/how-to says of adding things, tried as written: the page's patch on a copy of the package, then its lines there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ABLATION = """
import torch
import tl_nodeprune as tlnp
model, prompts = tlnp.toy.load(n=4)
circuit = tlnp.Circuit.from_nodes(model, {"head": [(0, 0)]}, "first_token")
_, cache = model.run_with_cache(prompts.clean)
with circuit.applied(model, prompts):
    _, inside = model.run_with_cache(prompts.clean)
name = "blocks.0.attn.hook_z"
assert torch.equal(inside[name][:, :, 0], cache[name][:, :, 0]), "kept"
assert torch.equal(inside[name][:, :, 1], cache[name][:, :1, 1].expand_as(inside[name][:, :, 1])), "cut"
circuit.save("circuit.safetensors")
print(tlnp.Circuit.load("circuit.safetensors"), tlnp.evaluate(model, circuit, prompts).kl)
"""


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / "docs" / "how-to" / f"{page}.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def run_patched(page: str, code: str, folder: Path) -> str:
    """The output of code with the page's patch applied to a copy of the package."""
    shutil.copytree(ROOT / "tl_nodeprune", folder / "tl_nodeprune", ignore=shutil.ignore_patterns("__pycache__"))
    (patch,) = blocks(page, "diff")
    applied = subprocess.run(["git", "apply", "-C1", "-"], cwd=folder, input=patch, capture_output=True, text=True)
    assert applied.returncode == 0, f"the patch of docs/how-to/{page}.md does not fit the code any more: {applied.stderr}"
    run = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True,
                         env=os.environ | {"PYTHONPATH": str(folder)})
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.slow
def test_a_granularity_is_added_as_its_page_says(tmp_path: Path) -> None:
    (code,) = blocks("add-a-granularity", "python")
    out = run_patched("add-a-granularity", code, tmp_path)
    assert "'attn_out': 288" in out and "attn_out" in out.splitlines()[3] and out.endswith("True\n")


@pytest.mark.slow
def test_an_ablation_is_added_as_its_page_says(tmp_path: Path) -> None:
    assert "first_token" in run_patched("add-an-ablation", ABLATION, tmp_path)
