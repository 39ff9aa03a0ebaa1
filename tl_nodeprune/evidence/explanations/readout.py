"""Direct logit attribution: from what a node writes into the stream at the answer position to logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_nodeprune.nodes import temporary_hooks
from tl_nodeprune.prompts import FILL

_SCALE = "ln_final.hook_scale"
_CLOSE = 1e-2  # of the logits' spread: what the linear map may miss, with room for half precision


class Readout:
    """`logits(w) = norm(w) W_U`, the final norm's scale held at that of a run. Linear in w, so that what all nodes write adds up to the
    run's logits, but for the biases.

    stream: what the run's final norm reads at the answer positions. logits: the run's own.
    Raises: ValueError where norm and unembedding do not give these logits (a soft cap of them aside).
    """

    def __init__(self, model: Any, stream: Float[Tensor, "prompt d_model"], logits: Float[Tensor, "prompt d_vocab"]) -> None:
        self.model = model
        normed, self._scale = self._norm(stream)
        self._shift, self._shift_scale = self._norm(torch.zeros_like(stream))
        try:
            self.weight = model.W_U.detach()
            linear = (normed.to(self.weight) @ self.weight).float()
        except (AttributeError, RuntimeError) as error:
            raise ValueError(f"Direct effects on the logits cannot be shown: {error}") from error
        bias = getattr(model, "b_U", None)
        linear = linear + bias.detach().float().to(linear) if isinstance(bias, Tensor) else linear
        cap = float(getattr(model.cfg, "output_logits_soft_cap", 0) or 0)
        linear = cap * torch.tanh(linear / cap) if cap > 0 else linear
        if linear.shape != logits.shape or float((_centred(linear) - _centred(logits)).abs().max()) > _CLOSE * float(logits.std()):
            raise ValueError("Direct effects on the logits cannot be shown: more than a norm and a matrix lies between this model's "
                             "residual stream and its logits.")

    def logits(self, written: Float[Tensor, "prompt d_model"]) -> Float[Tensor, "prompt d_vocab"]:
        """What these vectors add to the logits, the mean over the vocabulary taken off."""
        normed, scale = self._norm(written)
        linear = (normed - self._shift) * (scale / self._scale)
        return _centred((linear.to(self.weight) @ self.weight).float())

    def _norm(self, stream: Tensor) -> tuple[Tensor, Tensor]:
        """The final norm of vectors, and the scale that it divides by."""
        scales = [torch.ones_like(stream[..., :1])]
        if _SCALE not in self.model.hook_dict:
            return stream, scales[0]
        dtype = next(iter(self.model.parameters())).dtype
        with torch.no_grad(), temporary_hooks(self.model, [(_SCALE, lambda scale, hook: scales.append(scale.detach()))]):
            normed = self.model.ln_final(stream.to(dtype)[:, None])[:, 0]
        return normed.float(), scales[-1].reshape(len(stream), -1)[:, :1].float()


def weighted(added: Float[Tensor, "prompt d_vocab"], logits: Float[Tensor, "prompt d_vocab"], tokens: Tensor) -> Float[Tensor, "prompt"]:
    """What is added to the logits of each row's tokens, an answer or several: exact for one; of several, each counts by its probability
    among them in the run, which is the first order of their log-sum-exp."""
    table = tokens if tokens.ndim == 2 else tokens[:, None]
    picked = logits.gather(1, table.clamp(min=0)).masked_fill(table == FILL, -torch.inf)
    return (added.gather(1, table.clamp(min=0)) * picked.softmax(1)).sum(1)


def top_tokens(model: Any, logits: Float[Tensor, "d_vocab"], most: int = 5) -> tuple[str, ...]:
    """The tokens of the largest values as texts, without those that the tokenizer has no text for."""
    best = logits.topk(min(4 * most, len(logits))).indices.tolist()
    texts = dict.fromkeys(text for token in best if (text := token_text(model, token).strip()))
    return tuple(texts)[:most]


def token_text(model: Any, token: int) -> str:
    """A token as text, with the space before it; its id where the model has no tokenizer."""
    if getattr(model, "tokenizer", None) is None:
        return str(token)
    once, twice = (str(model.tokenizer.decode([token] * n)) for n in (1, 2))  # a tokenizer may drop the first space of a text
    return twice[len(once):] or once


def prompt_text(model: Any, tokens: Sequence[int]) -> str:
    """Tokens as text; their ids where the model has no tokenizer."""
    return str(model.tokenizer.decode(tokens)) if getattr(model, "tokenizer", None) is not None else " ".join(map(str, tokens))


def _centred(logits: Tensor) -> Tensor:
    return logits - logits.mean(-1, keepdim=True)
