"""The small trained transformer that comes with the package, so that everything runs with no model hub at hand.

train  how it was trained: `python -m tl_nodeprune.toy.train`
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from tl_nodeprune.nodes import check_types
from tl_nodeprune.prompts import PromptPairs, tasks

__all__ = ["load"]

FOLDER = Path(__file__).parent
NAME = "tl_nodeprune-toy"
CONFIG = partial(
    GPT2Config, n_layer=3, n_head=4, n_embd=96, n_positions=32, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0,
    bos_token_id=0, eos_token_id=0, tie_word_embeddings=True,
)


def special_tokens() -> dict[str, str]:
    """The tokenizer's special tokens in order of id."""
    return {"bos_token": "<s>", "pad_token": "<pad>", "unk_token": "<unk>"}


def load(task: str = "ioi", *, n: int = 200, seed: int = 0, model_class: str = "TransformerBridge") -> tuple[Any, PromptPairs]:
    """The embedded model and `n` prompts of a task that it knows: "ioi", "gendered_pronoun" or "greater_than".

    model_class: "TransformerBridge", or "HookedTransformer" where TransformerLens 3 is installed.

    Raises: ValueError for another task or class; ImportError where TransformerLens has no HookedTransformer.
    """
    check_types(load, locals())
    if task not in tasks.ROWS:
        raise ValueError(f"unknown task {task!r}; the embedded model knows {', '.join(tasks.ROWS)}.")
    if model_class not in ("TransformerBridge", "HookedTransformer"):
        raise ValueError(f"unknown model_class {model_class!r}; allowed: 'TransformerBridge', 'HookedTransformer'.")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(FOLDER)
    with torch.random.fork_rng(devices=[]):  # models are made with random weights first
        hf = GPT2LMHeadModel(CONFIG(vocab_size=len(tokenizer)))
        hf.load_state_dict(safetensors.torch.load_file(FOLDER / "model.safetensors"), strict=False)
        hf.tie_weights()
        model = (_bridge if model_class == "TransformerBridge" else _hooked)(hf.eval(), tokenizer)
    return model, tasks.make(task, model, n, seed)


def _bridge(hf: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    model = TransformerBridge.boot_transformers("gpt2", hf_model=hf, tokenizer=tokenizer, device="cpu")
    model.cfg.model_name = NAME  # booted under the name of an architecture that it is not
    return model.eval()


def _hooked(hf: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast) -> Any:
    from transformer_lens import HookedTransformer, HookedTransformerConfig  # ImportError says what to do on 4.x
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights

    c = hf.config
    cfg = HookedTransformerConfig(
        n_layers=c.n_layer, d_model=c.n_embd, n_heads=c.n_head, d_head=c.n_embd // c.n_head, d_mlp=4 * c.n_embd, n_ctx=c.n_positions,
        d_vocab=c.vocab_size, act_fn="gelu_new", eps=c.layer_norm_epsilon, normalization_type="LN", model_name=NAME,
        device="cpu",
    )
    model = HookedTransformer(cfg, tokenizer=tokenizer)
    model.load_and_process_state_dict(
        convert_gpt2_weights(hf, cfg), fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False)
    return model.eval()
