"""Every decoder family that transformers and TransformerLens' bridge both know, as a tiny random model. No network."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers
from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES
from transformer_lens.model_bridge import TransformerBridge
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import tl_nodeprune as tlnp

D_MODEL, HEADS, LAYERS = 32, 4, 3
_SIZES: dict[str, Any] = {
    "vocab_size": 50, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1, "initializer_range": 0.2, "init_std": 0.2,
    "max_position_embeddings": 32, "n_positions": 32,
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "attention_hidden_size", "word_embed_proj_dim"), D_MODEL),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads", "attention_heads"), HEADS),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_hidden_size", "ffn_dim"), 48),
    "num_key_value_heads": 2, "head_dim": 8, "rotary_dim": 4, "sliding_window": 16,
    # mixtures of experts
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), 4), "num_experts_per_tok": 2, "moe_k": 2,
    "moe_intermediate_size": 12, "shared_expert_intermediate_size": 16, "shared_intermediate_size": 16, "n_shared_experts": 1, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1,
    # latent attention
    "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8,
    # state spaces and linear attention
    **dict.fromkeys(("mamba_n_heads", "mamba_d_head", "mamba_d_state", "mamba_chunk_size", "mamba_num_heads", "mamba_head_dim",
                     "state_size", "chunk_size", "linear_key_head_dim", "linear_value_head_dim"), 8),
    "mamba_d_ssm": 64, "mamba_n_groups": 1, "mamba_expand": 2, "n_groups": 1, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
}
_LINEAR = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
_OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "deepseek_v2": {"q_lora_rank": None, "num_key_value_heads": HEADS},
    "deepseek_v3": {"num_key_value_heads": HEADS},
    "gemma4_text": {"vocab_size_per_layer_input": 50, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0, "global_head_dim": 8},
    "glm4_moe_lite": {"num_key_value_heads": HEADS},
    "glm_moe_dsa": {"num_key_value_heads": HEADS, "index_n_heads": 2, "index_head_dim": 8, "index_topk": 8},
    "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]]},
    "granite": {"residual_multiplier": 0.22},
    "granitemoe": {"residual_multiplier": 0.22},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba"], "residual_multiplier": 0.22, "position_embedding_type": "rope"},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_dt_rank": 4},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "llama4_text": {"intermediate_size_mlp": 48},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "nemotron_h": {"layers_block_type": ["mamba", "attention", "mlp"]},
    "qwen3_5_moe_text": _LINEAR,
    "qwen3_5_text": _LINEAR,
    "qwen3_next": {**_LINEAR, "mlp_only_layers": [0]},
    "recurrent_gemma": {"block_types": ["recurrent", "recurrent", "attention"], "lru_width": D_MODEL, "attention_window_size": 16},
    "youtu": {"num_key_value_heads": HEADS},
    "zamba2": {"hybrid_layer_ids": [1], "layer_types": ["mamba", "hybrid", "mamba"], "num_mem_blocks": 1,
               "adapter_rank": 4, "attention_hidden_size": 2 * D_MODEL,
               "attention_head_dim": 16, "num_key_value_heads": HEADS},
}
"""What a family needs beyond _SIZES: layers of each kind that it has, sizes that must agree."""


def families() -> dict[str, str]:
    """Model type and class of each: causal language models of text whose class TransformerLens registers an adapter for."""
    found = {}
    for kind, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        text = name.endswith(("ForCausalLM", "LMHeadModel"))  # "ForConditionalGeneration" wraps one of these with an encoder of images
        if text and name in SUPPORTED_ARCHITECTURES and getattr(transformers, name).config_class.model_type == kind:
            found[kind] = name
    return found


def hf_family(kind: str) -> Any:
    """A random model of a family in eval mode, the same at each call: LAYERS layers, D_MODEL wide, HEADS heads, 50 tokens."""
    cls = getattr(transformers, families()[kind])
    names = set(inspect.signature(cls.config_class).parameters) | set(cls.config_class.attribute_map)
    config = cls.config_class(**{name: value for name, value in _SIZES.items() if name in names} | _OWN.get(kind, {}),
                              architectures=[families()[kind]])
    torch.manual_seed(0)
    return cls._from_config(config).float().eval()


def bridge_of(hf: Any) -> Any:
    """A TransformerBridge around it, which changes it: copy it first."""
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(tlnp.toy.FOLDER)
    return TransformerBridge.boot_transformers(hf.config.model_type, hf_model=hf, tokenizer=tokenizer, device="cpu").eval()
