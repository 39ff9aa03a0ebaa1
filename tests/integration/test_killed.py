"""A search that is killed outright and started again ends in the circuit of one that was not."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import tl_nodeprune as tlnp

SEARCH = """
import sys, torch
import tl_nodeprune as tlnp
from tl_nodeprune.search import checkpoint
checkpoint.EVERY = 0.0
torch.set_num_threads(1)
model, prompts = tlnp.toy.load("ioi", n=24)
result = model.add_node_masks().prune(prompts, max_kl=0.1, steps=40, checkpoint=sys.argv[1], progress=False)
result.circuit.save(sys.argv[2])
print(result.kl.hex(), result.search_kl.hex())
"""


COMMAND = """
import sys, torch
from tl_nodeprune.cli.main import main
from tl_nodeprune.search import checkpoint
checkpoint.EVERY = 0.0
torch.set_num_threads(1)
options = "--model toy --task ioi --prompts 48 --max-kl 0.5 --steps 40 --granularities head mlp".split()
sys.exit(main(["prune", *options, "--checkpoint", sys.argv[1], "--out", sys.argv[2], "--html", sys.argv[2] + "/page.html"]))
"""


def started(folder: Path, out: Path, script: str = SEARCH) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-W", "ignore", "-c", script, str(folder), str(out)], env=environment, text=True,
                            stdout=subprocess.PIPE)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL here")
def test_a_killed_search_goes_on_to_the_same_circuit(tmp_path: Path) -> None:
    """Killed three times, each time at a later moment. No file is left half-written: every start reads what is there."""
    whole = started(tmp_path / "whole", tmp_path / "whole.safetensors")
    figures = whole.communicate()[0]
    assert whole.returncode == 0
    state = tmp_path / "broken" / "search.safetensors"
    for wait in (0.0, 0.15, 0.4):
        process, before = started(state.parent, tmp_path / "broken.safetensors"), state.stat().st_mtime_ns if state.exists() else 0
        while process.poll() is None and (not state.exists() or state.stat().st_mtime_ns == before):
            time.sleep(0.005)
        time.sleep(wait)
        process.kill()
        process.wait()
        assert process.returncode == -signal.SIGKILL, "it ended before it was killed"
    again = started(state.parent, tmp_path / "broken.safetensors")
    assert again.communicate()[0] == figures
    assert tlnp.Circuit.load(tmp_path / "broken.safetensors") == tlnp.Circuit.load(tmp_path / "whole.safetensors")
    assert [path.name for path in state.parent.iterdir() if not path.name.startswith(".")] == ["search.safetensors"]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL here")
def test_a_killed_command_leaves_whole_files_and_goes_on(tmp_path: Path) -> None:
    """Killed at eight random times, from before its search to after its files; each file is there whole or not at all."""
    whole = started(tmp_path / "state", tmp_path / "whole", COMMAND)
    begun = time.monotonic()
    whole.communicate()
    assert whole.returncode == 0
    length, draw, out, killed = time.monotonic() - begun, random.Random(0), tmp_path / "out", 0
    for _ in range(8):
        process = started(tmp_path / "broken", out, COMMAND)
        time.sleep(length * draw.uniform(0.5, 1.0))
        process.kill()
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
        if (out / "circuit.safetensors").exists():
            tlnp.Circuit.load(out / "circuit.safetensors")
        if (out / "report.json").exists():
            json.loads((out / "report.json").read_text())
        assert not (out / "page.html").exists() or (out / "page.html").read_text().rstrip().endswith("</html>")
    again = started(tmp_path / "broken", out, COMMAND)
    again.communicate()
    assert again.returncode == 0 and killed >= 4
    assert tlnp.Circuit.load(out / "circuit.safetensors") == tlnp.Circuit.load(tmp_path / "whole" / "circuit.safetensors")
    reports = [json.loads((folder / "report.json").read_text()) for folder in (out, tmp_path / "whole")]
    assert reports[0]["kl"] == reports[1]["kl"] and reports[0]["live"] == reports[1]["live"]
    print(f"\n{killed} commands killed")
