"""`find_nodes`: the nodes of a model; and what else is asked of a model: its device, its memory, whether two forwards agree."""

from __future__ import annotations

import sys
from collections.abc import Container
from typing import Any

import torch
from torch import Tensor

from tl_nodeprune.nodes.architecture import Probe, matrices
from tl_nodeprune.nodes.attachment import failed, hooks_of_others, inactive, ledger_of
from tl_nodeprune.nodes.checks import reraise_memory
from tl_nodeprune.nodes.hooks import answer_logits, capture
from tl_nodeprune.nodes.space import GRANULARITIES, GateKey, NodeSpace


def find_nodes(model: Any) -> NodeSpace:
    """Every node of a HookedTransformer or TransformerBridge, from one probe forward of three tokens.

    A granularity is there in a layer where the probe shows that changing its hook point does what closing such a node means, whatever
    the model is called: see `Probe`. `NodeSpace.lacking` says of the first layer that lacks one why.

    Raises: TypeError where `model` is not a TransformerLens model; ValueError where the forward fails, or the model has no single stack of
    `blocks` that add to the residual stream; RuntimeError in training mode with dropout, in which nothing seems to be a node.
    """
    ledger_of(model)  # names what is no model
    check_ready(model)
    probe, n_layers = Probe(model), int(model.cfg.n_layers)
    shapes: dict[GateKey, tuple[int, ...]] = {}
    lacking: dict[str, str] = {}
    weights: list[tuple[str, int, int]] = []
    for layer in range(n_layers):
        found = probe.layer(layer)
        if not found and (theirs := hooks_of_others(model)):
            raise ValueError(f"{probe.lacking['layer']}. Or do your own hooks do that, at {theirs}? model.reset_hooks() takes them off.")
        shapes |= {GateKey(name, layer): found[name] for name in GRANULARITIES if name in found}
        lacking = probe.lacking | lacking  # the first layer's reason stands
        weights += _weights(model.blocks[layer], layer, found)
    if not shapes:
        raise ValueError(f"{lacking['layer']}. So nothing in this model is a node; supported are blocks with resid_post = resid_pre + what "
                         "they add.")
    heads = {shape[0] for key, shape in shapes.items() if key.granularity == "head"}
    kv_heads = int(getattr(model.cfg, "n_key_value_heads", None) or model.cfg.n_heads)
    return NodeSpace(
        shapes, shapes, d_model=probe.d_model, n_layers=n_layers, kv_heads=kv_heads if all(n % kv_heads == 0 for n in heads) else 1,
        gated_mlp=bool(getattr(model.cfg, "gated_mlp", False)), model_name=model_name(model), weights=tuple(weights),
        lacking=lacking,
    )


def model_name(model: Any) -> str:
    """What its configuration calls a model; empty where it does not say."""
    return str(getattr(model.cfg, "model_name", None) or "")


def device_of(model: Any) -> torch.device:
    """Where a model takes its tokens."""
    return next(iter(model.parameters())).device  # type: ignore[no-any-return]


def peak_memory(model: Any) -> int:
    """Bytes: the process's peak on CPU since its start (0 on Windows), the allocator's on CUDA."""
    if device_of(model).type == "cuda":
        return torch.cuda.max_memory_allocated(device_of(model))
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def check_ready(model: Any, *, gradient: bool = False) -> None:
    """Raises RuntimeError where the model is in training mode with dropout, so that no two forwards would agree, or with gradient
    checkpointing, which runs hooks twice. gradient: one is needed, so it is raised in inference mode too."""
    rates = ("p", "attention_dropout", "attn_dropout", "dropout")
    dropouts = [name for name, module in model.named_modules()
                if module.training and any(_rate(module, attribute) > 0 for attribute in rates)]
    if dropouts:
        raise RuntimeError(f"the model is in training mode with dropout (at {dropouts[0]} and {len(dropouts) - 1} more places); "
                           "call model.eval() first.")
    if any(module.training and getattr(module, "gradient_checkpointing", False) is True for module in model.modules()):
        raise RuntimeError("the model is in training mode with gradient checkpointing, which runs hooks a second time in the backward "
                           "pass; call model.original_model.gradient_checkpointing_disable(), or model.eval(), first.")
    if gradient and (torch.is_inference_mode_enabled() or any(p.is_inference() for p in model.parameters())):
        raise RuntimeError("this needs gradients, and there are none in torch.inference_mode(): leave it for this call, and load the "
                           "model outside of it.")


def check_causal(model: Any, attention_mask: Tensor) -> None:
    """Raises ValueError where prompts have padding and the model is not causal, that is, a later token changes what comes before it."""
    if bool(attention_mask.all()):
        return
    ledger = ledger_of(model)
    if ledger.causal is None:
        size, device = int(model.cfg.d_vocab), device_of(model)
        tokens = torch.tensor([[0, 1, 1, 1], [0, 2, 2, 2]], device=device) % size
        name = f"blocks.{int(model.cfg.n_layers) - 1}.hook_resid_post"
        try:
            with inactive(model):
                one, other = capture(model, tokens, [name])[name][:, 0].float()
        except Exception as error:
            raise failed(model, tokens, "whether it is causal cannot be seen", error) from error
        if not torch.isfinite(one + other).all():
            return  # a broken model is named where its logits are looked at
        causal = float((one - other).abs().max()) <= rounding(model, torch.stack([one, other]))
        if not hooks_of_others(model):  # they may hide it, and come off again
            ledger.causal = causal
    else:
        causal = ledger.causal
    if not causal:
        raise ValueError("the prompts have padding, and attention in this model is not causal: padding would be attended to. "
                         "Give prompts of one length, without padding.")


def rounding(model: Any, values: Tensor) -> float:
    """Differences up to this, of values that a model's output gives, are rounding: their mean size times the square root of the model's
    machine precision, or in half precision, where that would be .03 to .09, times twice the precision (.002; bfloat16 .016)."""
    eps = torch.finfo(next(iter(model.parameters())).dtype).eps
    return float(max(2 * eps, min(eps**0.5, 1e-3)) * values.abs().mean())


def can_slice(model: Any, tokens: Tensor, positions: Tensor) -> bool:
    """Whether cutting the residual before the unembedding leaves this model's logits as they are: tried on one prompt."""
    one, at = tokens[:1], positions[:1]
    with torch.no_grad():
        whole = answer_logits(model, one, at, sliced=False)
        try:
            cut = answer_logits(model, one, at)
        except (RuntimeError, ValueError, IndexError) as error:
            reraise_memory(error)
            return False
    return cut.shape == whole.shape and torch.allclose(cut, whole, rtol=1e-4, atol=1e-4, equal_nan=True)


def _weights(block: Any, layer: int, found: Container[str]) -> list[tuple[str, int, int]]:
    """Rows of `NodeSpace.weights`: what is in no attention or MLP node is the block's own."""
    parts = getattr(block, "submodules", None) or block._modules
    counts: dict[str, int] = {}
    for name, modules in (("attn", ("attn", "linear_attn")), ("mlp", ("mlp",))):
        for part in [parts[m] for m in modules if name in found and parts.get(m) is not None]:
            inside = part.submodules.values() if getattr(part, "name", "") is None else [part]  # OPT's MLP is no module of its own
            counts[name] = counts.get(name, 0) + sum(map(matrices, inside))
    counts["layer"] = matrices(block) - sum(counts.values())
    return [(name, layer, n) for name, n in counts.items() if n]


def _rate(module: Any, attribute: str) -> float:
    value = getattr(module, attribute, 0.0) if not isinstance(module, torch.nn.ModuleDict) else 0.0
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else 0.0
