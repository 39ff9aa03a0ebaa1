"""Time and saved tensors of one training step under masks, as ratios to a plain frozen forward and backward, in one run.

`make bench`, or `python tests/benchmarks/cost.py`. The shape is a GPT-2 of 6 layers, d_model 512, 16 prompts of 16 tokens; with the
argument "gpt2", GPT-2 small's. Plain: the same frozen model with the gradient flowing to the first residual stream, logits everywhere.
One row is a step of `prune` (gates of its own for each prompt, leaf granularities), one a user's own loop with hard concrete gates at all
seven granularities.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import tl_nodeprune as tlnp
from tl_nodeprune.masks.landscape import Landscape
from tl_nodeprune.masks.reference import Reference
from tl_nodeprune.nodes.attachment import temporary_hooks

REPEATS = 15
SHAPES = {"six": (6, 512, 8, 5000), "gpt2": (12, 768, 12, 50257)}  # layers, d_model, heads, vocabulary


def build(shape: str = "six") -> tuple[Any, tlnp.PromptPairs]:
    """A HookedTransformer where there is one, else a bridge, and prompts of random tokens."""
    torch.manual_seed(0)
    layers, d_model, heads, vocabulary = SHAPES[shape]
    try:
        from transformer_lens import HookedTransformer, HookedTransformerConfig

        model = HookedTransformer(HookedTransformerConfig(
            n_layers=layers, d_model=d_model, n_heads=heads, d_head=64, d_mlp=4 * d_model, n_ctx=64, d_vocab=vocabulary,
            act_fn="gelu_new")).eval()
    except ImportError:
        from transformer_lens.model_bridge import TransformerBridge

        hf = GPT2LMHeadModel(GPT2Config(n_layer=layers, n_embd=d_model, n_head=heads, vocab_size=vocabulary, n_positions=64)).eval()
        tokenizer = tlnp.toy.load(n=1)[0].tokenizer
        model = TransformerBridge.boot_transformers("gpt2", hf_model=hf, tokenizer=tokenizer, device="cpu").eval()
    clean, corrupted = torch.randint(0, vocabulary, (2, 16, 16))
    return model, tlnp.PromptPairs(clean, corrupted, torch.arange(16), torch.arange(16) + 100)


def plain_step(model: Any, prompts: tlnp.PromptPairs, reference: Reference) -> Callable[[], None]:
    """Frozen forward and backward with the loss at the last position, no masks."""
    def step() -> None:
        def start(stream: Tensor, hook: Any) -> Tensor:
            return stream.detach().requires_grad_(True)

        with temporary_hooks(model, [("blocks.0.hook_resid_pre", start)]):
            logits = model(prompts.clean)[:, -1]
            tlnp.kl_divergence(logits, reference.full).mean().backward()
    return step


def saved_bytes(step: Callable[[], None], weights: set[int]) -> int:
    """Bytes of the distinct storages that autograd keeps in one step, weights left out."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(kept.values())


def median_seconds(steps: dict[str, Callable[[], None]], repeats: int, settle: Callable[[], object] = lambda: None) -> dict[str, float]:
    """Of each step, taken in turns so that a noisy machine hits all alike. settle: wait for the device."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    for _ in range(repeats):
        for name, step in steps.items():
            settle()
            start = time.perf_counter()
            step()
            settle()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) for name, found in times.items()}


def measure(steps: dict[str, Callable[[], None]], weights: set[int]) -> dict[str, tuple[float, float]]:
    """Median seconds and saved MiB of each step."""
    seconds = median_seconds(steps, REPEATS)
    return {name: (seconds[name], saved_bytes(step, weights) / 2**20) for name, step in steps.items()}


def main(shape: str = "six") -> dict[str, tuple[float, float]]:
    """Measure, print the table, and return {row: (time ratio, saved ratio)}."""
    torch.set_num_threads(2)
    model, prompts = build(shape)
    masks = tlnp.add_node_masks(model)
    with masks.inactive():
        reference = Reference(model, prompts, masks.ablation, masks.space.hooks)
    landscape = Landscape(masks.space, reference)
    rows, flat, generator = torch.arange(16), torch.rand(16, landscape.n), torch.Generator().manual_seed(0)

    def search_step() -> None:
        with masks.inactive():
            landscape.gradient(flat, rows, step=0)

    def own_loop_step() -> None:
        with masks.sampling(generator), masks.standing_in(reference.stand_ins(rows)):
            tlnp.kl_divergence(reference.logits(rows), reference.full).mean().backward()

    def plain() -> None:
        with masks.inactive():
            plain_step(model, prompts, reference)()

    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    figures = measure({"plain frozen": plain, "prune": search_step, "own loop, 7 granularities": own_loop_step}, weights)
    base = figures["plain frozen"]
    ratios = {name: (seconds / base[0], saved / base[1]) for name, (seconds, saved) in figures.items()}
    for name, (seconds, saved) in figures.items():
        print(f"{name:28} {seconds * 1e3:7.1f} ms  x{ratios[name][0]:.2f}   {saved:6.1f} MiB  x{ratios[name][1]:.2f}   "
              f"{saved * 2**20 / 1e6 / prompts.clean.numel():.2f} MB/token")
    return ratios


if __name__ == "__main__":
    main(*sys.argv[1:])
