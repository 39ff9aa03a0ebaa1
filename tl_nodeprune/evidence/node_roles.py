"""What single nodes do in a circuit: where a head attends, what a node promotes, which neurons of an MLP do its work."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_nodeprune.circuit.circuit import Circuit
from tl_nodeprune.evidence.attention_roles import by_role, even, roles_of
from tl_nodeprune.evidence.circuit_run import CircuitRun, adds_to_stream, output_hook
from tl_nodeprune.evidence.explanation import Neuron, NodeRole
from tl_nodeprune.evidence.readout import Readout, answer_minus_wrong
from tl_nodeprune.evidence.units import Unit
from tl_nodeprune.masks.ablation import Ablation
from tl_nodeprune.masks.reference import positions
from tl_nodeprune.nodes.attachment import HookFn
from tl_nodeprune.nodes.space import GateKey
from tl_nodeprune.prompts.pairs import PromptPairs

NEURONS = 3  # of an MLP
TOKENS = 5
PROMPTS = 3  # of a neuron
MLPS = 3  # whose neurons are looked at


def describe(model: Any, circuit: Circuit, prompts: PromptPairs, nodes: Sequence[NodeRole], *, batch_size: int, sliced: bool
             ) -> tuple[list[NodeRole], list[str]]:
    """The nodes with all that can be seen of them, and in words what cannot."""
    units, notes = [node.unit for node in nodes], dict[str, None]()
    batches = list(prompts.batches(batch_size))
    parts = []
    for batch in batches:
        run = CircuitRun(model, circuit, batch, units, sliced=sliced)
        parts.append(_Batch(run, units, notes))
    mlps = [unit for unit in units if unit.granularity == "mlp" and GateKey("mlp_neuron", unit.layer) in circuit.space.present][:MLPS]
    neurons = {unit: _neurons(model, circuit, batches, unit, sliced) for unit in mlps}
    return [replace(node, **_seen(model, node.unit, parts, prompts), neurons=neurons.get(node.unit, ())) for node in nodes], list(notes)


class _Batch:
    """One run of the circuit on some prompts, and what is seen of the units in it.

    attention: [prompt pos] by head. direct: [prompt], the logit difference written, tops: on how many prompts the answer is what is promoted
    most, promoted: [d_vocab], the sum over prompts, each by unit.
    """

    def __init__(self, run: CircuitRun, units: Sequence[Unit], notes: dict[str, None]) -> None:
        self.run, self.n = run, len(run.prompts)
        self.attention: dict[Unit, Tensor] = {}
        self.direct: dict[Unit, Tensor] = {}
        self.tops: dict[Unit, int] = {}
        self.promoted: dict[Unit, Tensor] = {}
        heads = [unit for unit in units if unit.granularity == "head"]
        last = f"blocks.{run.circuit.space.n_layers - 1}.hook_resid_post"
        patterns = {f"blocks.{unit.layer}.attn.hook_pattern": self._from_answer for unit in heads}
        there = {name: take for name, take in patterns.items() if name in run.model.hook_dict}
        writers = [unit for unit in units if adds_to_stream(run.circuit, unit)]
        outputs = {output_hook(unit): run.at_answer for unit in writers}
        logits, seen = run(keep={last: run.at_answer, **there, **outputs})
        for unit in heads:
            if (pattern := seen.get(f"blocks.{unit.layer}.attn.hook_pattern")) is not None:
                self.attention[unit] = pattern[:, unit.index[0]].float().cpu()
            else:
                notes[f"Attention cannot be shown: the model's forward gives no pattern at blocks.{unit.layer}.attn.hook_pattern; load it "
                      "with attn_implementation=\"eager\" if its attention can be run so."] = None
        notes |= {f"What {unit} writes cannot be shown: {why}.": None for unit in units if unit not in writers
                  for why in [run.circuit.space.lacking.get("attn", "it is no head, attention block or MLP")]}
        try:
            readout = Readout(run.model, seen[last], logits)
        except ValueError as error:
            notes[str(error)] = None
            return
        for unit in writers:
            written = seen[output_hook(unit)]
            self._read(unit, readout, written - self._without(unit, written) if unit.granularity == "head" else written, logits)

    def _from_answer(self, pattern: Float[Tensor, "prompt head query key"]) -> Tensor:
        at = positions(self.run.prompts).to(pattern.device)
        return pattern.detach()[torch.arange(len(pattern), device=pattern.device), :, at]

    def _without(self, head: Unit, written: Tensor) -> Tensor:
        """What the attention block would write at the answer position if this head's z were 0."""
        def silence(z: Tensor, hook: Any) -> Tensor:
            z = z.clone()
            z[:, :, head.index[0]] = 0
            return z
        hook = output_hook(head)
        return self.run(then=[(f"blocks.{head.layer}.attn.hook_z", silence)], keep={hook: self.run.at_answer})[1][hook]

    def _read(self, unit: Unit, readout: Readout, written: Tensor, logits: Tensor) -> None:
        added = readout.logits(written)
        self.direct[unit] = answer_minus_wrong(added, logits, self.run.prompts).cpu()
        answers = self.run.prompts.answers
        best = added.argmax(1)
        self.tops[unit] = int((best[:, None] == (answers if answers.ndim == 2 else answers[:, None]).to(best.device)).any(1).sum())
        self.promoted[unit] = added.sum(0)


def _seen(model: Any, unit: Unit, parts: Sequence[_Batch], prompts: PromptPairs) -> dict[str, Any]:
    """The fields of a NodeRole that a unit has something for."""
    found: dict[str, Any] = {}
    if all(unit in part.attention for part in parts):
        attention, roles = torch.cat([part.attention[unit] for part in parts]), roles_of(prompts)
        to, at = int(attention[0].argmax()), int(positions(prompts)[0])
        found |= {"attends": by_role(attention, roles), "even": even(roles),
                  "example": (token_text(model, int(prompts.clean[0, at])), token_text(model, int(prompts.clean[0, to])))}
    if all(unit in part.direct for part in parts):
        promoted = torch.stack([part.promoted[unit] for part in parts]).sum(0)
        found |= {"direct": float(torch.cat([part.direct[unit] for part in parts]).mean()), "promotes": _tokens(model, promoted),
                  "demotes": _tokens(model, -promoted), "top": sum(part.tops[unit] for part in parts) / len(prompts)}
    return found


@dataclass
class _Seen:
    """What is added up of one neuron over batches."""

    change: Tensor
    at_answer: Tensor
    peak: Tensor
    place: Tensor
    promoted: Tensor | None


def _neurons(model: Any, circuit: Circuit, batches: Sequence[PromptPairs], mlp: Unit, sliced: bool) -> tuple[Neuron, ...]:
    """The kept neurons of an MLP with the largest effects: found to first order, then each cut."""
    hook, scores, runs = f"blocks.{mlp.layer}.mlp.hook_post", [], []
    for batch in batches:
        runs.append(CircuitRun(model, circuit, batch, [mlp], sliced=sliced))
        scores.append(_first_order(runs[-1], hook) * len(batch))
    total = torch.stack(scores).sum(0)
    kept = circuit.live("mlp_neuron", mlp.layer) if GateKey("mlp_neuron", mlp.layer) in circuit.space.shapes else torch.ones(len(total)).bool()
    order = (total.abs() * kept).argsort(descending=True)[: min(NEURONS, int(kept.sum()))].tolist()
    found: dict[int, list[_Seen]] = defaultdict(list)
    for run in runs:
        for index in order:
            found[index].append(_neuron(run, mlp, hook, index))
    neurons = [_joined(model, batches, mlp.layer, index, parts) for index, parts in found.items()]
    return tuple(sorted(neurons, key=lambda neuron: -abs(neuron.effect)))


def _stand_in(run: CircuitRun, hook: str) -> Tensor:
    """What a neuron takes when it is cut. Where no neuron is gated, the corrupted run's activation, or 0."""
    if hook in run.hooks:
        return run.stand_in(hook)
    ablation = Ablation("interchange" if run.circuit.ablation.name == "interchange" else "zero")
    return ablation.values(run.model, run.prompts, [hook])[hook]


def _first_order(run: CircuitRun, hook: str) -> Float[Tensor, "d_mlp"]:
    """Mean over prompts of what cutting each neuron changes, to first order: `-sum over positions of gradient * (activation - stand-in)`."""
    held: list[Tensor] = []

    def leaf(activation: Tensor, hook: Any) -> Tensor:
        held.append(activation.detach().requires_grad_())
        return held[0]

    with torch.enable_grad():
        logits, _ = run(then=[(hook, leaf)], freeze=True)
        (grad,) = torch.autograd.grad(run.prompts.logit_diff(logits).sum(), held)
    return -(grad * (held[0].detach() - _stand_in(run, hook).to(grad))).float().flatten(0, 1).sum(0).cpu() / len(run.prompts)


def _neuron(run: CircuitRun, mlp: Unit, hook: str, index: int) -> _Seen:
    stand_in, out = _stand_in(run, hook), output_hook(mlp)

    def put(value: Tensor | None) -> HookFn:
        def act(activation: Tensor, hook: Any) -> Tensor:
            activation = activation.clone()
            activation[..., index] = activation[..., index] + 1 if value is None else value.to(activation)
            return activation
        return act

    last = f"blocks.{run.circuit.space.n_layers - 1}.hook_resid_post"
    logits, seen = run(keep={hook: lambda a: a.detach()[..., index].float().cpu(), out: run.at_answer, last: run.at_answer})
    changed = run(then=[(hook, put(stand_in[..., index] if stand_in.ndim else stand_in))])[0]
    activations = seen[hook].masked_fill(~run.prompts.attention_mask.cpu(), -math.inf)  # type: ignore[union-attr]
    peak, place = activations.max(1)
    promoted = None
    if adds_to_stream(run.circuit, mlp):
        more = run(then=[(hook, put(None))], keep={out: run.at_answer})[1][out]
        try:
            promoted = Readout(run.model, seen[last], logits).logits(more - seen[out]).sum(0)
        except ValueError:
            promoted = None
    at = positions(run.prompts).cpu()
    return _Seen(run.score(changed)[0] - run.score(logits)[0], seen[hook][torch.arange(len(at)), at], peak, place, promoted)


def _joined(model: Any, batches: Sequence[PromptPairs], layer: int, index: int, parts: Sequence[_Seen]) -> Neuron:
    peak, place = (torch.cat([getattr(part, name) for part in parts]) for name in ("peak", "place"))
    rows = [(batch, i) for batch in batches for i in range(len(batch))]
    top = []
    for number in peak.argsort(descending=True, stable=True).tolist():
        batch, i = rows[number]
        tokens = batch.clean[i][batch.attention_mask[i]].tolist()  # type: ignore[index]
        text = prompt_text(model, tokens)
        if text not in [given for _, given, _ in top]:
            top.append((float(peak[number]), text, token_text(model, int(batch.clean[i, int(place[number])]))))
        if len(top) == PROMPTS:
            break
    promoted = [part.promoted for part in parts if part.promoted is not None]
    return Neuron(layer, index, float(torch.cat([part.change for part in parts]).mean()),
                  _tokens(model, torch.stack(promoted).sum(0)) if promoted else (),
                  float(torch.cat([part.at_answer for part in parts]).mean()), tuple(top))


def _tokens(model: Any, logits: Float[Tensor, "d_vocab"]) -> tuple[str, ...]:
    """The tokens of the largest values, without what the tokenizer has no text for."""
    best = logits.topk(min(4 * TOKENS, len(logits))).indices.tolist()
    texts = dict.fromkeys(text for token in best if (text := token_text(model, token).strip()))
    return tuple(texts)[:TOKENS]


def token_text(model: Any, token: int) -> str:
    """A token as text, with the space before it; its id where the model has no tokenizer."""
    if getattr(model, "tokenizer", None) is None:
        return str(token)
    once, twice = (str(model.tokenizer.decode([token] * n)) for n in (1, 2))  # a tokenizer may drop the first space of a text
    return twice[len(once):] or once


def prompt_text(model: Any, tokens: Sequence[int]) -> str:
    """Tokens as text; their ids where the model has no tokenizer."""
    return str(model.tokenizer.decode(tokens)) if getattr(model, "tokenizer", None) is not None else " ".join(map(str, tokens))
