"""Which neurons of an MLP do its work in a circuit, on which prompts they are active, and what they promote."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_nodeprune.circuit import Circuit
from tl_nodeprune.evidence.explanations.circuit_run import CircuitRun, adds_to_stream, output_hook
from tl_nodeprune.evidence.explanations.explanation import Neuron
from tl_nodeprune.evidence.explanations.readout import Readout, prompt_text, token_text, top_tokens
from tl_nodeprune.evidence.units import Unit
from tl_nodeprune.masks import Ablation
from tl_nodeprune.nodes import GateKey, HookFn
from tl_nodeprune.prompts import PromptPairs, positions

MOST = 3
PROMPTS = 3  # on which a neuron is most active


def top_neurons(model: Any, circuit: Circuit, prompts: PromptPairs, mlp: Unit, *, batch_size: int, sliced: bool) -> tuple[Neuron, ...]:
    """The kept neurons of an MLP with the largest effects: found to first order, all at once, then each cut.

    A neuron that is cut takes its stand-in; where neurons are not gated, that of the circuit's ablation if it is interchange, else 0.
    """
    batches = list(prompts.batches(max(1, batch_size // MOST)))
    runs = [CircuitRun(model, circuit, batch, [mlp], sliced=sliced) for batch in batches]
    total = torch.stack([_first_order(run, mlp) for run in runs]).sum(0)
    key = GateKey("mlp_neuron", mlp.layer)
    kept = circuit.live(*key) if key in circuit.space.shapes else torch.ones(len(total), dtype=torch.bool)
    order = (total.abs() * kept).argsort(descending=True)[: min(MOST, int(kept.sum()))]
    parts = [_looked_at(run, mlp, order) for run in runs]
    several = {name: torch.cat([getattr(part, name) for part in parts], 1) for name in ("change", "at_answer", "peak", "place")}
    promoted = [part.promoted for part in parts if part.promoted is not None]
    total_promoted = torch.stack(promoted).sum(0) if promoted else None
    found = [Neuron(mlp.layer, index, float(several["change"][i].mean()),
                    () if total_promoted is None else top_tokens(model, total_promoted[i]), float(several["at_answer"][i].mean()),
                    _most_active(model, prompts, several["peak"][i], several["place"][i])) for i, index in enumerate(order.tolist())]
    return tuple(sorted(found, key=lambda neuron: -abs(neuron.effect)))


@dataclass(frozen=True)
class _Look:
    """Neurons on some prompts. change: of the logit difference when each is cut; peak, place: its largest activation, and at which
    position; promoted: what one more of it adds to the logits, summed over the prompts, None where that cannot be seen."""

    change: Float[Tensor, "neuron prompt"]
    at_answer: Float[Tensor, "neuron prompt"]
    peak: Float[Tensor, "neuron prompt"]
    place: Int[Tensor, "neuron prompt"]
    promoted: Float[Tensor, "neuron d_vocab"] | None


def _hook(mlp: Unit) -> str:
    return f"blocks.{mlp.layer}.mlp.hook_post"


def _stand_in(run: CircuitRun, hook: str) -> Tensor:
    if hook in run.hooks:
        return run.stand_in(hook)
    ablation = Ablation("interchange" if run.circuit.ablation.name == "interchange" else "zero")
    return ablation.values(run.model, run.prompts, [hook])[hook]


def _first_order(run: CircuitRun, mlp: Unit) -> Float[Tensor, "d_mlp"]:
    """What cutting each neuron changes, first order, summed over prompts: `-sum over positions of gradient * (activation - stand-in)`."""
    held: list[Tensor] = []

    def leaf(activation: Tensor, hook: Any) -> Tensor:
        held.append(activation.detach().requires_grad_())
        return held[0]

    with torch.enable_grad():
        logits, _ = run(then=[(_hook(mlp), leaf)], freeze=True)
        (grad,) = torch.autograd.grad(run.prompts.logit_diff(logits).sum(), held)
    change = held[0].detach() - _stand_in(run, _hook(mlp)).to(grad)
    return -(grad * change).float().flatten(0, 1).sum(0).cpu()


def _looked_at(run: CircuitRun, mlp: Unit, neurons: Int[Tensor, "neuron"]) -> _Look:
    n, k, hook, out = len(run.prompts), len(neurons), _hook(mlp), output_hook(mlp)
    last = f"blocks.{run.circuit.space.n_layers - 1}.hook_resid_post"
    at, real = positions(run.prompts).cpu(), run.prompts.attention_mask.cpu()  # type: ignore[union-attr]
    logits, seen = run(keep={hook: lambda a: a.detach()[..., neurons.to(a.device)].float().cpu().permute(2, 0, 1),
                             out: run.at_answer, last: run.at_answer})
    cut = run(then=[(hook, _each(neurons, _stand_in(run, hook)))], times=k)[0]
    peak, place = seen[hook].masked_fill(~real, -math.inf).max(-1)
    promoted = None
    if adds_to_stream(run.circuit, mlp):
        more = run(then=[(hook, _each(neurons, None))], keep={out: lambda a: _rows_at(a, at.repeat(k))}, times=k)[1][out]
        try:
            readout = Readout(run.model, seen[last], logits)
            promoted = torch.stack([readout.logits(part - seen[out]).sum(0) for part in more.split(n)]).cpu()
        except ValueError:  # said of the blocks themselves
            promoted = None
    return _Look(run.score(cut) - run.score(logits), seen[hook][:, torch.arange(n), at], peak, place, promoted)


def _each(neurons: Tensor, value: Tensor | None) -> HookFn:
    """Each neuron in rows of its own: its stand-in, or 1 more than it is."""
    def act(activation: Tensor, hook: Any) -> Tensor:
        activation = activation.clone()
        for rows, index in zip(activation.chunk(len(neurons)), neurons.tolist(), strict=True):
            rows[..., index] = rows[..., index] + 1 if value is None else (value[..., index] if value.ndim else value).to(rows)
        return activation
    return act


def _rows_at(activation: Tensor, at: Tensor) -> Tensor:
    return activation.detach()[torch.arange(len(at), device=activation.device), at.to(activation.device)].float()


def _most_active(model: Any, prompts: PromptPairs, peak: Float[Tensor, "prompt"], place: Int[Tensor, "prompt"]
                 ) -> tuple[tuple[float, str, str], ...]:
    """The different prompts with the largest activations: how large, the prompt, the token."""
    found: dict[str, tuple[float, str, str]] = {}
    for row in peak.argsort(descending=True, stable=True).tolist():
        tokens = prompts.clean[row][prompts.attention_mask[row]].tolist()  # type: ignore[index]
        text = prompt_text(model, tokens)
        found.setdefault(text, (float(peak[row]), text, token_text(model, tokens[int(place[row])])))
        if len(found) == PROMPTS:
            break
    return tuple(found.values())
