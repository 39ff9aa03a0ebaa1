"""What the integration tests share: tiny models of many architectures, prompt pairs, and a count of hooks. No network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge

import tl_nodeprune as tlnp

try:
    from transformer_lens import HookedTransformer, HookedTransformerConfig
except ImportError:  # removed in TransformerLens 4
    HookedTransformer = HookedTransformerConfig = None

N_LAYERS, N_HEADS, D_HEAD, D_MODEL, D_MLP, D_VOCAB = 2, 4, 8, 32, 48, 50
NO_HOOKED = "TransformerLens 4 has no HookedTransformer"
_IDS = {"vocab_size": D_VOCAB, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1, "initializer_range": 0.2}
_GPT = {"n_layer": N_LAYERS, "n_head": N_HEADS, "n_embd": D_MODEL, "n_positions": 32, "n_inner": D_MLP}
_LLAMA = {"num_hidden_layers": N_LAYERS, "hidden_size": D_MODEL, "num_attention_heads": N_HEADS, "intermediate_size": D_MLP,
          "max_position_embeddings": 32}

HF_CONFIGS: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: transformers.GPT2Config(**_GPT, **_IDS),
    "llama": lambda: transformers.LlamaConfig(**_LLAMA, **_IDS, num_key_value_heads=2),
    "gemma2": lambda: transformers.Gemma2Config(**_LLAMA, **_IDS, num_key_value_heads=2, head_dim=D_HEAD, sliding_window=16),
    "neox": lambda: transformers.GPTNeoXConfig(**_LLAMA, **_IDS, use_parallel_residual=True),
    "gptj": lambda: transformers.GPTJConfig(**_GPT, **_IDS, rotary_dim=4),
    "mixtral": lambda: transformers.MixtralConfig(
        **_LLAMA, **_IDS, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2),
}
"""A decoder of two layers each, four query heads of 8; Llama, Gemma-2 and Mixtral have two key-value heads."""
_NATIVE: dict[str, dict[str, Any]] = {
    "attn_only": {"attn_only": True, "act_fn": "gelu"},
    "gated_mlp": {"gated_mlp": True, "d_mlp": D_MLP, "act_fn": "silu", "normalization_type": "RMS"},
}
ARCHITECTURES: tuple[str, ...] = (*HF_CONFIGS, *(f"native-{name}" for name in _NATIVE), *(f"hooked-{name}" for name in _NATIVE))


def hf_model(name: str) -> Any:
    """A random Hugging Face decoder in eval mode, the same at each call."""
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(HF_CONFIGS[name]()).float().eval()


def bridge(hf: Any, folder: Path) -> Any:
    """A TransformerBridge around a Hugging Face model, by way of a local folder as its name."""
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(tlnp.toy.FOLDER)
    hf.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return TransformerBridge.boot_transformers(str(folder), hf_model=hf, tokenizer=tokenizer, device="cpu").eval()


def build(name: str, folder: Path) -> Any | None:
    """One of ARCHITECTURES; None where this TransformerLens has no such class."""
    if name in HF_CONFIGS:
        return bridge(hf_model(name), folder)
    kind, _, which = name.partition("-")
    torch.manual_seed(0)
    settings = {"n_layers": N_LAYERS, "d_model": D_MODEL, "n_heads": N_HEADS, "d_head": D_HEAD, "n_ctx": 32, "d_vocab": D_VOCAB,
                "initializer_range": 0.2, "seed": 0, "device": "cpu", **_NATIVE[which]}
    if kind == "native":
        return TransformerBridge.boot_native(TransformerBridgeConfig(**settings)).eval()
    return HookedTransformer(HookedTransformerConfig(**settings)).eval() if HookedTransformer else None


def random_pairs(n: int = 3, width: int = 6, seed: int = 0) -> tlnp.PromptPairs:
    """Random prompts whose corrupted ones differ from the clean ones at position 1 only."""
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randint(4, D_VOCAB, (n, width), generator=generator)
    corrupted = clean.clone()
    corrupted[:, 1] = 4 + (clean[:, 1] - 4 + torch.randint(1, D_VOCAB - 4, (n,), generator=generator)) % (D_VOCAB - 4)
    return tlnp.PromptPairs(clean, corrupted, torch.full((n,), 2), torch.full((n,), 3))


def random_circuit(space: Any, ablation: str | tlnp.Ablation, seed: int, keep: float = 0.7) -> tlnp.Circuit:
    """Leaves kept at random, everything above open."""
    generator = torch.Generator().manual_seed(seed)
    leaves = set(space.finest())
    gates = {key: torch.rand(shape, generator=generator) < keep if key in leaves else torch.ones(shape)
             for key, shape in space.shapes.items()}
    return tlnp.Circuit(space, gates, tlnp.Ablation(ablation) if isinstance(ablation, str) else ablation)


def n_hooks(model: Any) -> int:
    """How many hook functions are on the model, ours or not."""
    return sum(len(point.fwd_hooks) + len(point.bwd_hooks) for point in {id(p): p for p in model.hook_dict.values()}.values())


def run(model: Any, tokens: Tensor) -> Tensor:
    """Logits [batch pos d_vocab] without gradient."""
    with torch.no_grad():
        return model(tokens)  # type: ignore[no-any-return]


def cache_of(model: Any, tokens: Tensor) -> Any:
    """TransformerLens' own cache of a forward."""
    with torch.no_grad():
        return model.run_with_cache(tokens)[1]
