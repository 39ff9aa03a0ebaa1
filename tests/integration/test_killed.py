"""A search that is killed outright and started again ends in the circuit of one that was not."""

from __future__ import annotations

import os
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


def started(folder: Path, circuit: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-W", "ignore", "-c", SEARCH, str(folder), str(circuit)], env=environment, text=True,
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
