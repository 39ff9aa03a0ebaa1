"""What a model is like: its nodes, found by one probe forward, its device, and whether two forwards of it agree."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tl_nodeprune.attachment import hooks_of_others, inactive, ledger_of
from tl_nodeprune.hooks import answer_logits, capture
from tl_nodeprune.nodes import GRANULARITIES, HOOKS, GateKey, NodeSpace


def find_nodes(model: Any) -> NodeSpace:
    """Every node of a HookedTransformer or TransformerBridge, from one probe forward of two tokens.

    Raises: TypeError where `model` is no TransformerLens model; ValueError where it has no single stack of `blocks`
    or its blocks do not add to the residual stream.
    """
    ledger_of(model)  # names what is no model
    n_layers, table = int(model.cfg.n_layers), model.hook_dict
    shorts = ("hook_resid_pre", *dict.fromkeys(HOOKS.values()))
    names = [name for layer in range(n_layers) for s in shorts if (name := f"blocks.{layer}.{s}") in table]
    if f"blocks.{n_layers - 1}.hook_resid_post" not in names:
        raise ValueError(f"{type(model).__name__} has no blocks.{n_layers - 1}.hook_resid_post; only decoder-only models "
                         "with one stack of `blocks` have nodes here.")
    tokens = torch.zeros((1, 2), dtype=torch.long, device=device_of(model))
    with inactive(model):
        seen = _probe(model, tokens, names)
    shapes: dict[GateKey, tuple[int, ...]] = {}
    for layer in range(n_layers):
        _check_additive(layer, seen, model)
        shapes |= _shapes_in_layer(layer, seen, {name: table[name] for name in names})
    return NodeSpace(
        shapes, shapes, d_model=seen["blocks.0.hook_resid_post"].shape[-1], n_layers=n_layers,
        kv_heads=int(getattr(model.cfg, "n_key_value_heads", None) or model.cfg.n_heads),
        gated_mlp=bool(getattr(model.cfg, "gated_mlp", False)), model_name=model_name(model),
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
        with inactive(model):
            one, other = _probe(model, tokens, [name])[name][:, 0].float()
        ledger.causal = float((one - other).abs().max()) <= rounding(model, torch.stack([one, other]))
    if not ledger.causal:
        raise ValueError("the prompts have padding, and attention in this model is not causal: padding would be attended to. "
                         "Give prompts of one length, without padding.")


def _probe(model: Any, tokens: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """Activations on a few tokens. Raises RuntimeError that names a user's own hooks where there are some and the forward fails."""
    try:
        return capture(model, tokens, names)
    except Exception as error:
        if not (theirs := hooks_of_others(model)):
            raise
        raise RuntimeError(f"the model fails on the {tokens.shape[1]} tokens that it is probed with ({type(error).__name__}: {error}). "
                           f"There are hooks of your own on it, at {', '.join(theirs[:3])}: make them work for prompts of any length, or "
                           "take them off for this call (model.reset_hooks()).") from error


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
        except (RuntimeError, ValueError, IndexError):
            return False
    return cut.shape == whole.shape and torch.allclose(cut, whole, rtol=1e-4, atol=1e-4, equal_nan=True)


def _shapes_in_layer(layer: int, seen: Mapping[str, Tensor], points: Mapping[str, Any]) -> dict[GateKey, tuple[int, ...]]:
    def get(short: str) -> Tensor | None:
        return seen.get(f"blocks.{layer}.{short}")

    z, post, out = get("attn.hook_z"), get("mlp.hook_post"), get("hook_mlp_out")
    shapes: dict[str, tuple[int, ...]] = {"layer": ()}
    if get("hook_attn_out") is not None:
        shapes["attn"] = ()
    if z is not None and z.ndim == 4:
        shapes |= {"head": (z.shape[2],), "attn_neuron": (z.shape[2], z.shape[3])}
    if out is not None:
        shapes |= {"mlp": (), "mlp_out": (out.shape[-1],)}
    # Mixtral's hook_post is the very hook point of hook_mlp_out: no neurons there
    shared = points.get(f"blocks.{layer}.mlp.hook_post") is points.get(f"blocks.{layer}.hook_mlp_out")
    if post is not None and post.ndim == 3 and not shared:
        shapes["mlp_neuron"] = (post.shape[-1],)
    return {GateKey(name, layer): shapes[name] for name in GRANULARITIES if name in shapes}


def _check_additive(layer: int, seen: Mapping[str, Tensor], model: Any) -> None:
    zero = torch.zeros((), device=seen[f"blocks.{layer}.hook_resid_pre"].device)
    pre, attn, mlp, post = (seen.get(f"blocks.{layer}.{name}", zero).float()
                            for name in ("hook_resid_pre", "hook_attn_out", "hook_mlp_out", "hook_resid_post"))
    if not torch.isfinite(post).all():
        return  # a broken model is named where its logits are looked at
    if not torch.allclose(pre + attn + mlp, post, rtol=1e-2, atol=1e-2 * float(post.abs().max())):
        theirs = hooks_of_others(model)
        raise ValueError(
            f"block {layer} does not add its attention and MLP outputs to the residual stream (a post-norm model such as "
            "BERT?), so they are not nodes. Supported: models with resid_pre + attn_out + mlp_out = resid_post."
            + (f" Or do your own hooks change that, at {', '.join(theirs[:3])}? model.reset_hooks() takes them off." if theirs else "")
        )


def _rate(module: Any, attribute: str) -> float:
    value = getattr(module, attribute, 0.0) if not isinstance(module, torch.nn.ModuleDict) else 0.0
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else 0.0
