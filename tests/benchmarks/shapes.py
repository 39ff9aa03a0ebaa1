"""Models of a real one's shape with random weights, for timing only: built on the device from a config, no file is read."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import tl_nodeprune as tlnp

SHAPES: dict[str, dict[str, int]] = {
    "8b": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336,
           "vocab_size": 128256},  # Llama-3.1-8B: 720,896 leaf nodes
    "1b": {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 8192,
           "vocab_size": 128256},
    "smollm2": {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536,
                "vocab_size": 49152},
    "tiny": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48,
             "vocab_size": 199},
}
TOKENS = 17


def build(shape: str, device: str, dtype: torch.dtype) -> Any:
    """A TransformerBridge of a Llama of this shape."""
    from transformer_lens.model_bridge import TransformerBridge

    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=2048, bos_token_id=0, eos_token_id=0,
                         tie_word_embeddings=shape == "smollm2")
    with torch.device(device):
        hf = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    tokenizer = tlnp.toy.load(n=1)[0].tokenizer  # never used: prompts are token ids
    with tempfile.TemporaryDirectory() as folder:
        config.architectures = ["LlamaForCausalLM"]
        config.save_pretrained(folder)
        return TransformerBridge.boot_transformers(folder, hf_model=hf, tokenizer=tokenizer, device=device, dtype=dtype).eval()


def random_prompts(shape: str, n: int, device: str) -> tlnp.PromptPairs:
    generator = torch.Generator().manual_seed(0)
    clean, corrupted = torch.randint(1, SHAPES[shape]["vocab_size"], (2, n, TOKENS), generator=generator)
    answers = torch.randint(1, SHAPES[shape]["vocab_size"] - 1, (n,), generator=generator)
    return tlnp.PromptPairs(clean, corrupted, answers, answers + 1).to(device)
