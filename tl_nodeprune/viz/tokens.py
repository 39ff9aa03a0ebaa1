"""circuitsvis views of what a circuit does on one prompt, token by token. They need no network: their JavaScript is inside."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import circuitsvis as cv
import torch
from circuitsvis.utils.render import RenderedHTML
from jaxtyping import Float
from torch import Tensor

from tl_nodeprune.circuit import Circuit
from tl_nodeprune.masks import MaskedModel, masks_off
from tl_nodeprune.nodes import capture, check_counts, check_finite, check_ready, check_types
from tl_nodeprune.prompts import PromptPairs
from tl_nodeprune.viz.page import CAPTION, parts_of
from tl_nodeprune.viz.values import HasCircuit, circuit_of

Neuron = tuple[int, int]  # layer, index
MOST_TOKENS, MOST_CELLS = 100, 150_000  # of attention patterns: queries and keys; in all, about a megabyte
MOST_ACTIVATIONS = 60_000  # of both prompts together


def kept_neurons(model: Any, circuit: HasCircuit, prompts: PromptPairs, *, prompt: int = 0, most: int = 50) -> RenderedHTML:
    """The full model's activations of the MLP neurons that the circuit keeps, each labelled layer.neuron, on a clean prompt and, below
    it, on its corrupted one.

    prompt: which of the prompts. most: neurons shown at most, those of the largest absolute activation on either prompt, over all
    layers, fewer of a very long prompt; the caption says what is left out.
    Raises: ValueError where the circuit has no live MLP neuron, or the circuit or the prompt does not fit the model, or there is
    no such prompt; TypeError for what is not a circuit or PromptPairs; RuntimeError where a circuit is applied.
    """
    check_types(kept_neurons, locals())
    return _strongest_neurons(model, circuit, prompts, prompt, most, live=True)


def pruned_neurons(model: Any, circuit: HasCircuit, prompts: PromptPairs, *, prompt: int = 0, most: int = 50) -> RenderedHTML:
    """Activations of the MLP neurons that were cut, as `kept_neurons` shows those that were kept.

    Raises: ValueError where the circuit gates no MLP neuron, or cuts none; and as `kept_neurons`.
    """
    check_types(pruned_neurons, locals())
    return _strongest_neurons(model, circuit, prompts, prompt, most, live=False)


def _strongest_neurons(model: Any, circuit: HasCircuit, prompts: PromptPairs, prompt: int, most: int, *, live: bool
                       ) -> RenderedHTML:
    circuit, one = _checked(model, circuit, prompts, prompt, most=most)
    kind = "live" if live else "pruned"
    layers = [layer for layer in circuit.space.layers if f"blocks.{layer}.mlp.hook_post" in circuit]
    nodes = [(layer, int(i)) for layer in layers for i in (circuit.live("mlp_neuron", layer) == live).nonzero()[:, 0]]
    if not nodes:
        raise ValueError(f"this circuit has no {kind} MLP neuron to show.")
    seen = _neurons(model, one, layers)
    peak = {layer: torch.stack([run[layer].abs().amax(0) for run in seen]).amax(0) for layer in layers}
    strength = torch.stack([peak[layer][i] for layer, i in nodes])
    most = min(most, max(MOST_ACTIVATIONS // (2 * int(_real(one).sum())), 1))
    order = strength.argsort(descending=True, stable=True)[:most].tolist()
    picked, weakest = [nodes[i] for i in order], float(strength[order[-1]])
    rest = f"; the {len(nodes) - len(picked):,} left out stay within ±{weakest:.3g}" if len(picked) < len(nodes) else ""
    return _neuron_view(model, one, seen, picked, f"The {len(picked):,} strongest of {len(nodes):,} {kind} MLP neurons{rest}")


def kept_heads(model: Any, circuit: HasCircuit, prompts: PromptPairs, *, prompt: int = 0, most: int = 40) -> RenderedHTML:
    """Attention patterns of the full model's heads that the circuit keeps, on a clean prompt; each is named layer.head (gate), the
    gate being the share of its dims that is live.

    most: heads shown at most, the largest gates first; fewer of long prompts, of which the last 100 tokens are shown, so that a notebook
        stays small. The caption says what is left out.
    Raises: ValueError where the circuit keeps no head, or the model has no hook_pattern; and as `kept_neurons`.
    """
    check_types(kept_heads, locals())
    circuit, one = _checked(model, circuit, prompts, prompt, most=most)
    gates = {(layer, int(head)): float(circuit[hook][head].mean()) for layer in circuit.space.layers
             if (hook := f"blocks.{layer}.attn.hook_z") in circuit for head in circuit[hook].any(1).nonzero()[:, 0]}
    if not gates:
        raise ValueError("this circuit keeps no head to show.")
    real = _real(one).nonzero()[:, 0]
    shown = real[-MOST_TOKENS:]
    most = min(most, max(MOST_CELLS // len(shown) ** 2, 1))
    picked = sorted(sorted(gates, key=lambda node: -gates[node])[:most])
    names = {layer: f"blocks.{layer}.attn.hook_pattern" for layer, _ in picked}
    with masks_off(model):
        seen = capture(model, one.clean, list(names.values()))
    if missing := sorted(set(names.values()) - set(seen)):
        raise ValueError(f"the model's forward gave no attention pattern at {missing[0]}; load it with attn_implementation=\"eager\".")
    for name, pattern in seen.items():
        check_finite(pattern, f"the attention pattern at {name}")
    patterns = torch.stack([seen[names[layer]][0, head][shown][:, shown].double().cpu().round(decimals=5) for layer, head in picked])
    rest = f", the largest gates of {len(gates):,}" if len(picked) < len(gates) else ""
    rest += f", on the last {len(shown):,} of {len(real):,} tokens" if len(shown) < len(real) else ""
    tokens = _tokens(model, one.clean[0][real])[-len(shown):]
    view = cv.attention.attention_heads(patterns, tokens,  # drawn on a canvas: escapes would show
                                        [f"{layer}.{head} ({gates[layer, head]:.2f})" for layer, head in picked])
    return _captioned(f"Attention of {len(picked):,} kept heads{rest}, named layer.head (gate: share of its dims that is live). "
                      f"Prompt: {_text(model, one.clean[0][real])}", view)


def token_effects(model: Any, circuit: HasCircuit, prompts: PromptPairs, *, prompt: int = 0,
                  batch_size: int = 64) -> RenderedHTML:
    """What the circuit's work at each token is worth: how much logit difference is lost when its nodes are ablated at that position.

    `effect(p) = m(circuit) - m(circuit with all its nodes ablated at position p too)`, m the logit difference at the answer position,
    one forward per position, under the circuit's own ablation. The second line is the same for the full model with all gated nodes
    ablated at p. Positive: the work at this token favours the answer. Both lines have one scale, the same for either sign.

    Raises: as `kept_neurons`, and where the ablation does not fit the prompt.
    """
    check_types(token_effects, locals())
    circuit, one = _checked(model, circuit, prompts, prompt, batch_size=batch_size)
    both = (circuit, Circuit.full(circuit.space, circuit.ablation))
    values = [position_effects(model, which, one, batch_size=batch_size) for which in both]
    real = _real(one)
    tokens = [html.escape(token) for token in _tokens(model, one.clean[0][real])]
    lines = [value[real.cpu()].tolist() for value in values]
    top = max(1e-9, *(abs(value) for line in lines for value in line))
    view = cv.tokens.colored_tokens(["circuit: ", *tokens, "\n", "full model: ", *tokens], [0.0, *lines[0], 0.0, 0.0, *lines[1]],
                                    min_value=-top, max_value=top)
    return _captioned(f"Logit difference lost when all nodes at one position are ablated ({circuit.ablation.name} ablation), of the "
                      f"circuit and of the full model; blue: lost, red: gained, up to {top:.3g}. Hover a token for its value.", view)


def position_effects(model: Any, circuit: Circuit, one: PromptPairs, *, batch_size: int = 64) -> Float[Tensor, "pos"]:
    """The effects of `token_effects` for one prompt, logits; 0 at padding. Under "interchange" they are exactly 0 before the first token
    in which clean and corrupted prompt differ."""
    width = one.clean.shape[1]
    with masks_off(model):
        check_ready(model)
        repeated = one[[0] * (width + 1)]  # the last row is the circuit itself
        runs = MaskedModel(model, repeated, circuit.ablation, circuit.space.hooks, batch_size=batch_size)
        with torch.no_grad():
            logits = torch.cat([runs.logits(rows, _masks_without(circuit, rows, width)) for rows in runs.chunks(torch.arange(width + 1))])
            logit_diff = repeated.logit_diff(logits).cpu()
    return (logit_diff[-1] - logit_diff[:-1]) * _real(one).cpu()


def _masks_without(circuit: Circuit, positions: Tensor, width: int) -> dict[str, Tensor]:
    """The circuit's masks row by row, closed at one position (nowhere, where it is past the end): hook name -> [row pos ...]."""
    open_at = torch.arange(width)[None] != positions[:, None]
    return {hook: open_at.view(*open_at.shape, *[1] * max(mask.ndim, 1)) * mask for hook, mask in circuit.items()}


def _checked(model: Any, circuit: Any, prompts: PromptPairs, prompt: int, **counts: int) -> tuple[Circuit, PromptPairs]:
    circuit = circuit_of(circuit)
    check_counts(**counts)
    if not -len(prompts) <= prompt < len(prompts):
        raise ValueError(f"prompt {prompt} does not exist; there are {len(prompts)}.")
    one = prompts[prompt]
    with masks_off(model):
        circuit.check_fits(model)
        one.check_fits(model)
    return circuit, one


def _real(one: PromptPairs) -> Tensor:
    assert one.attention_mask is not None
    return one.attention_mask[0]


def _text(model: Any, ids: Tensor) -> str:
    return str(model.tokenizer.decode(ids)) if _reads(model) else " ".join(map(str, ids.tolist()))


def _reads(model: Any) -> bool:
    return getattr(model, "tokenizer", None) is not None


def _tokens(model: Any, ids: Tensor) -> list[str]:
    """The text of each token, with the space before it also where the tokenizer adds spaces only between tokens; the ids where the model
    has no tokenizer."""
    if not _reads(model):
        return [f" {token}" for token in ids.tolist()]
    alone = list(model.to_str_tokens(ids))
    texts = [_text(model, ids[:i]) for i in range(len(ids) + 1)]
    spaced = [text[len(before):] for before, text in zip(texts, texts[1:], strict=False)]
    return spaced if all(text.strip() == token.strip() for text, token in zip(spaced, alone, strict=True)) else alone


def _neurons(model: Any, one: PromptPairs, layers: Sequence[int]) -> list[dict[int, Tensor]]:
    """Activations on the clean and on the corrupted prompt: layer -> [pos d_mlp], padding left out."""
    with masks_off(model):
        runs = [capture(model, tokens, [f"blocks.{layer}.mlp.hook_post" for layer in layers]) for tokens in (one.clean, one.corrupted)]
    for name, values in (pair for run in runs for pair in run.items()):
        check_finite(values, f"the activations at {name}")
    return [{layer: run[f"blocks.{layer}.mlp.hook_post"][0, _real(one)].float().cpu() for layer in layers} for run in runs]


def _neuron_view(model: Any, one: PromptPairs, seen: list[dict[int, Tensor]], picked: list[Neuron], what: str) -> RenderedHTML:
    activations = [torch.stack([run[layer][:, i] for layer, i in picked], dim=1).unsqueeze(1).double().round(decimals=6) for run in seen]
    tokens = [[html.escape(token) for token in _tokens(model, ids[0][_real(one)])] for ids in (one.clean, one.corrupted)]
    view = cv.activations.text_neuron_activations(
        tokens=tokens, activations=activations, first_dimension_name="Nodes", first_dimension_labels=["MLP neurons"],
        second_dimension_name="Layer.neuron", second_dimension_labels=[f"{layer}.{i}" for layer, i in picked])
    return _captioned(f"{what}, as they are in the full model. Above: the clean prompt; below: the corrupted one.", view)


def _captioned(caption: str, view: RenderedHTML) -> RenderedHTML:
    """With a line of text above; local in every form, so that a notebook does not ask the network for JavaScript either."""
    before, bundle, after = parts_of(view)
    source = CAPTION.format(html.escape(caption, quote=False)) + before + bundle + after
    return RenderedHTML(source, source)
