"""Whether a hook point is a node, in any architecture: told by changing it in one forward, for `find_nodes`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tl_nodeprune.nodes.attachment import HookFn, failed, inactive, temporary_hooks
from tl_nodeprune.nodes.space import HOOKS

_PRE, _POST, _ATTN, _MLP, _Z, _HIDDEN = ("hook_resid_pre", *(HOOKS[name] for name in ("layer", "attn", "mlp", "head", "mlp_neuron")))
_PATTERN = "attn.hook_pattern"
# One prompt, a row per question. In every block each row starts from the first row's stream, and so shows what one change does there.
_ROWS = 8
_MORE_ATTN, _MORE_MLP, _NO_Z, _NO_HIDDEN, _MORE_POST, _LARGE, _TWICE = range(1, _ROWS)
_EDITS = {_ATTN: (_MORE_ATTN, True), _MLP: (_MORE_MLP, True), _Z: (_NO_Z, False), _HIDDEN: (_NO_HIDDEN, False), _POST: (_MORE_POST, True)}
_CLOSE = 1e-2  # of what a change moves: half precision's rounding stays below, what is wrong does not


class Probe:
    """One forward of a model in which each block's hook points are changed, and what came of it.

    A block is a layer node if its output is its input plus what it adds, and the next block starts from that output as it was changed.
    Its attention and MLP outputs are nodes if a change of one moves the block's output by just that change (and what the MLP makes of it).
    Heads and neurons are nodes if one weight matrix reads the hook point, heads are as many as attention patterns, and without any of
    them the output is the same at all positions: nothing else goes into it.

    d_model: the stream's width. lacking: why the block asked for last lacks a granularity.
    """

    def __init__(self, model: Any) -> None:
        self._n_layers, self._n_heads = int(model.cfg.n_layers), int(model.cfg.n_heads)
        self._table, self._readers = dict(model.hook_dict), _readers(model)
        wanted = [f"blocks.{layer}.{name}" for layer in range(self._n_layers) for name in (_PRE, _POST)]
        if not wanted or any(name not in self._table for name in wanted):
            raise ValueError(f"{type(model).__name__} does not have hook_resid_pre and hook_resid_post in each of its {self._n_layers} "
                             "layers; only decoder-only models with one stack of `blocks` have nodes here.")
        self._seen: dict[str, Tensor] = {}
        self._chained: dict[int, bool] = {}
        self.lacking: dict[str, str] = {}
        tokens = torch.arange(min(3, int(model.cfg.n_ctx))) % int(model.cfg.d_vocab)
        device = next(iter(model.parameters())).device
        try:
            with torch.no_grad(), inactive(model), temporary_hooks(model, list(self._hooks())):
                model(tokens.to(device).expand(_ROWS, -1))
        except Exception as error:
            raise failed(model, tokens, "its nodes cannot be found", error) from error
        if any(not self._has(layer, name) for layer in range(self._n_layers) for name in (_PRE, _POST)):
            raise ValueError(f"{type(model).__name__} does not call hook_resid_pre and hook_resid_post with [batch pos d_model] in each "
                             "layer, so there is no stream of which its blocks could be nodes.")
        self.d_model = int(self._get(0, _POST).shape[-1])

    def layer(self, layer: int) -> dict[str, tuple[int, ...]]:
        """The gate shapes of one block's nodes, by granularity; `lacking` says why others are not there."""
        if why := self._why_no_layer(layer):
            self.lacking = dict.fromkeys(HOOKS, why)
            return {}
        self.lacking = {}
        shapes: dict[str, tuple[int, ...]] = {"layer": ()}
        for name, what, row in (("attn", _ATTN, _MORE_ATTN), ("mlp", _MLP, _MORE_MLP)):
            if why := self._why_no_part(layer, what, row):
                self.lacking |= dict.fromkeys((name, "mlp_out") if name == "mlp" else (name,), why)
            else:
                shapes |= {"attn": ()} if name == "attn" else {"mlp": (), "mlp_out": (self.d_model,)}
        if why := self._why_no_heads(layer):
            self.lacking |= dict.fromkeys(("head", "attn_neuron"), why)
        else:
            heads = tuple(self._get(layer, _Z).shape[2:])
            shapes |= {"head": heads[:1], "attn_neuron": heads}
        if why := self._why_no_neurons(layer):
            self.lacking["mlp_neuron"] = why
        else:
            shapes["mlp_neuron"] = tuple(self._get(layer, _HIDDEN).shape[2:])
        return shapes

    def _hooks(self) -> Iterator[tuple[str, HookFn]]:
        for layer in range(self._n_layers):
            for short in (_PRE, _ATTN, _MLP, _Z, _HIDDEN, _PATTERN, _POST):
                name = f"blocks.{layer}.{short}"
                if name in self._table and (short not in (_Z, _HIDDEN) or self._reader(name) is not None):
                    yield name, self._hook(layer, short, name)

    def _hook(self, layer: int, short: str, name: str) -> HookFn:
        def start(stream: Tensor, hook: Any) -> Tensor:
            if layer and self._has(layer - 1, _POST):
                self._chained[layer - 1] = _same(self._get(layer - 1, _POST).to(stream.device), stream)
            scale = stream.new_tensor([1.0] * (_ROWS - 2) + [_large(stream), 2 * _large(stream)]).view(-1, *[1] * (stream.ndim - 1))
            self._seen[name] = stream[:1] * scale
            return self._seen[name]

        def keep(activation: Tensor, hook: Any) -> Tensor | None:
            if not _is_rows(activation):
                return None
            self._seen[name] = activation.clone()
            if short not in _EDITS:
                return None
            row, more = _EDITS[short]
            self._seen[name][row] *= _large(activation) if more else 0
            return self._seen[name].clone()

        return start if short == _PRE else keep

    def _get(self, layer: int, short: str) -> Tensor:
        return self._seen[f"blocks.{layer}.{short}"]

    def _has(self, layer: int, short: str) -> bool:
        return f"blocks.{layer}.{short}" in self._seen

    def _reader(self, name: str) -> tuple[int, ...] | None:
        """The shape of the one weight matrix that reads a hook point's activation; () where a model names it and no matrix."""
        return self._readers.get(id(self._table[name]))

    def _moves(self, layer: int, short: str, row: int, base: int = 0) -> Tensor:
        """By how much a row's activation differs from another's; 0 where the block has no such hook point."""
        if not self._has(layer, short):
            return torch.zeros((), device=self._get(layer, _POST).device)
        return self._get(layer, short)[row].float() - self._get(layer, short)[base].float()

    def _unexplained(self, layer: int, row: int, base: int = 0) -> Tensor:
        """What of a row's change in the block's output its input, attention and MLP do not explain."""
        change = self._moves(layer, _POST, row, base)
        return change - sum(self._moves(layer, short, row, base) for short in (_PRE, _ATTN, _MLP))

    def _negligible(self, rest: Tensor, change: Tensor, layer: int) -> bool:
        """Whether a rest is rounding, next to the change that it is the rest of. Broken models pass: they are named where they are used."""
        stream = self._get(layer, _POST)
        if not torch.isfinite(stream[0]).all():
            return True
        rounding = 8 * torch.finfo(stream.dtype).eps * float(stream.abs().max())
        return float(rest.abs().max()) <= _CLOSE * float(change.abs().max()) + rounding

    def _why_no_layer(self, layer: int) -> str:
        if not self._negligible(self._unexplained(layer, _TWICE, _LARGE), self._moves(layer, _PRE, _TWICE, _LARGE), layer):
            return (f"block {layer} does not give its input plus what it adds: a post-norm model such as BERT, or a stream that is "
                    "scaled or normalised on its way")
        if not self._chained.get(layer, True):
            return f"block {layer + 1} does not start from what block {layer} puts out at hook_resid_post"
        return ""

    def _why_no_part(self, layer: int, short: str, row: int) -> str:
        name = f"blocks.{layer}.{short}"
        if not self._has(layer, short):
            return f"TransformerLens has no {name} there"
        if self._get(layer, short).shape != self._get(layer, _POST).shape:
            return f"{name} has another shape than the residual stream"
        if not self._negligible(self._unexplained(layer, row), self._moves(layer, short, row), layer):
            return f"a change at {name} does not change the block's output by just as much"
        return ""

    def _why_no_heads(self, layer: int) -> str:
        name = f"blocks.{layer}.{_Z}"
        if why := self._why_not_read(layer, _Z, 4):
            return why
        n, width = self._get(layer, _Z).shape[2:]
        heads = self._get(layer, _PATTERN).shape[1] if self._has(layer, _PATTERN) else self._n_heads
        if n != heads:
            return (f"{name} is cut into {n} parts of {width}, and the attention has {heads} heads: value heads of another width, as in "
                    "latent attention")
        return self._why_not_all(layer, _ATTN, _NO_Z, name)

    def _why_no_neurons(self, layer: int) -> str:
        return self._why_not_read(layer, _HIDDEN, 3) or self._why_not_all(layer, _MLP, _NO_HIDDEN, f"blocks.{layer}.{_HIDDEN}")

    def _why_not_read(self, layer: int, short: str, ndim: int) -> str:
        name = f"blocks.{layer}.{short}"
        if name not in self._table:
            return f"TransformerLens has no {name} there"
        reader = self._reader(name)
        if reader is None:
            return f"{name} is not what one weight matrix reads, as in a mixture of experts"
        if not self._has(layer, short) or self._get(layer, short).ndim != ndim:
            return f"{name} is not [{'batch pos head d_head' if ndim == 4 else 'batch pos d_mlp'}]"
        if reader and math.prod(self._get(layer, short).shape[2:]) not in reader:
            return f"{name} has another width than the weight matrix that reads it"
        return ""

    def _why_not_all(self, layer: int, part: str, row: int, name: str) -> str:
        """Empty where a part's output is the same at all positions once nothing comes through a hook point."""
        out = self._get(layer, part)[row].float() if self._has(layer, part) else None
        if out is None or out.ndim < 2:
            return f"TransformerLens has no blocks.{layer}.{part} there"
        if not self._negligible(out - out[:1], self._moves(layer, part, row), layer):
            return f"more goes into blocks.{layer}.{part} than {name}"
        return ""


def matrices(module: nn.Module) -> int:
    """How many entries the weight matrices in a module have; the copies that a bridge makes of fused ones are not counted."""
    return sum(p.numel() for p in {id(p): p for p in _matrices(module)}.values())


def _matrices(module: nn.Module) -> Iterator[nn.Parameter]:
    if isinstance(wrapped := module._modules.get("_original_component"), nn.Module):
        yield from _matrices(wrapped)
        return
    for name, parameter in module._parameters.items():
        if parameter is not None and parameter.ndim > 1 and not name.startswith("b_") and "bias" not in name:
            yield parameter
    for name, child in module._modules.items():
        if child is not None and "norm" not in name:
            yield from _matrices(child)


def _readers(model: Any) -> dict[int, tuple[int, ...]]:
    """By id of a hook point: the shape of the weight matrix that reads it. On a HookedTransformer () for all of its own hook points."""
    found: dict[int, tuple[int, ...]] = {}
    bridged = hasattr(model, "original_model")
    for module in model.modules():
        point, wrapped = getattr(module, "hook_in", None), module._modules.get("_original_component")
        weight = getattr(wrapped, "weight", None)
        if point is not None and isinstance(weight, Tensor) and weight.ndim == 2:
            found[id(point)] = tuple(weight.shape)
    return found if bridged else {id(point): () for point in model.hook_dict.values()}


def _large(activation: Tensor) -> float:
    """A factor so large that what a block makes of a stream's norm is small beside the stream, and that half precision bears."""
    room = torch.finfo(activation.dtype).max / 16 / max(float(activation[0].abs().max()), 1e-6)
    return max(2.0, min(1024.0, room))


def _is_rows(activation: Any) -> bool:
    return isinstance(activation, Tensor) and activation.ndim > 2 and activation.shape[0] == _ROWS


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())
