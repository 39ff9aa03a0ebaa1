"""What a closed node is, by plain torch hooks on a Hugging Face model: no line of this library or of TransformerLens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Change = Callable[[Tensor], Tensor]

_ATTN = ("self_attn", "attn", "self_attention", "attention", "linear_attn")
_MLP = ("mlp", "feed_forward", "block_sparse_moe", "ffn", "moe")
_O = ("o_proj", "out_proj", "c_proj", "dense", "Wo")
_DOWN = ("down_proj", "c_proj", "fc_out", "dense_4h_to_h", "fc2", "w2", "Wo", "o_proj")
_POST_NORM = {"attn": "post_attention_layernorm", "mlp": "post_feedforward_layernorm"}
_ADDED: dict[str, dict[str, str]] = {
    **dict.fromkeys(("gemma2", "gemma3_text", "gemma4_text", "olmo2", "olmo3", "olmo_hybrid", "exaone4", "flex_olmo"), _POST_NORM),
    "afmoe": {"attn": "post_attention_layernorm", "mlp": "post_mlp_layernorm"},
    "glm4": {"attn": "post_self_attn_layernorm", "mlp": "post_mlp_layernorm"},
    "bloom": {"attn": "self_attention.dense", "mlp": "mlp.dense_4h_to_h"},  # these modules add the stream themselves
    "mpt": {"mlp": "ffn.down_proj"},
}
"""The module in a decoder layer whose output is added to the stream, where it is not the attention or MLP module."""


class Oracle:
    """A Hugging Face model, of which nodes are scaled and replaced where its own modules read or write them."""

    def __init__(self, hf: Any) -> None:
        self.hf, self.kind = hf, hf.config.model_type
        self.n_layers, self.heads = int(hf.config.num_hidden_layers), getattr(hf.config, "num_attention_heads", 1)
        self.layers = next(m for m in hf.modules() if isinstance(m, nn.ModuleList) and len(m) == self.n_layers)

    def part(self, granularity: str, layer: int) -> tuple[nn.Module, bool]:
        """The module where a granularity's nodes are, and whether they are what it reads rather than what it gives."""
        block = self.layers[layer]
        pre_norm = self.kind == "olmo_hybrid" and not hasattr(block, "post_feedforward_layernorm")  # its layers of linear attention
        own = {} if pre_norm else _ADDED.get(self.kind, {})
        if granularity == "layer":
            return block, False
        if granularity in ("attn", "mlp", "mlp_out"):
            name = "attn" if granularity == "attn" else "mlp"
            added = block.get_submodule(own[name]) if name in own else self._module(block, name)
            return added, False
        if granularity == "mlp_neuron":
            mlp = self._module(block, "mlp")
            return (mlp if mlp is getattr(block, "fc2", None) else _first(mlp, _DOWN)), True
        return _first(self._module(block, "attn"), _O), True

    def _module(self, block: nn.Module, name: str) -> nn.Module:
        inner = _first(block, _ATTN if name == "attn" else (*_MLP, "fc2"))
        return getattr(inner, "attention", inner) if name == "attn" else inner  # GPT-Neo wraps its attention once more

    def values(self, tokens: Tensor, places: Iterable[tuple[str, int]]) -> dict[tuple[str, int], Tensor]:
        """What nodes are in a run, by granularity and layer: what their module reads or gives, of a layer what it adds."""
        seen: dict[tuple[str, int], Tensor] = {}

        def looking(place: tuple[str, int]) -> Change:
            def look(x: Tensor) -> Tensor:
                seen[place] = x.clone()  # Falcon adds to it in place
                return x
            return look

        self.run(tokens, {place: looking(place) for place in places})
        return seen

    def run(self, tokens: Tensor, changes: dict[tuple[str, int], Change]) -> Tensor:
        """Logits [batch pos d_vocab] with each change applied to the nodes of a granularity in a layer."""
        with torch.no_grad(), ExitStack() as stack:
            for (granularity, layer), change in changes.items():
                module, reads = self.part(granularity, layer)
                stack.enter_context(_changed(module, change, reads, adds=granularity == "layer"))
            return self.hf(tokens).logits  # type: ignore[no-any-return]

    def scaled(self, granularity: str, layer: int, index: tuple[int, ...], mask: float, ablated: Tensor | None) -> Change:
        """mask * clean + (1 - mask) * ablated at the nodes of an index, all of them for (); ablated: None for zero."""
        def change(x: Tensor) -> Tensor:
            heads = granularity in ("head", "attn_neuron")
            cut = x.clone().unflatten(-1, (self.heads, -1)) if heads else x.clone()
            other = torch.zeros_like(cut) if ablated is None else ablated.view_as(cut)
            at = (..., *index, *[slice(None)] * (1 + heads - len(index)))
            cut[at] = mask * cut[at] + (1 - mask) * other[at]
            return cut.view_as(x)
        return change


def _first(module: nn.Module, names: tuple[str, ...]) -> nn.Module:
    found = next((getattr(module, name) for name in names if isinstance(getattr(module, name, None), nn.Module)), None)
    assert found is not None, f"the oracle finds none of {names} in {type(module).__name__}"
    return found


@contextmanager
def _changed(module: nn.Module, change: Change, reads: bool, adds: bool) -> Iterator[None]:
    entered: list[Tensor] = []

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        stream = args[0] if args else kwargs["hidden_states"]
        entered[:] = [stream]
        return ((change(stream), *args[1:]), kwargs) if reads else None

    def after(_: nn.Module, args: Any, output: Any) -> Any:
        if reads:
            return None
        first = output[0] if isinstance(output, tuple) else output
        new = entered[0] + change(first - entered[0]) if adds else change(first)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handles = [module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
