"""What single nodes do in a circuit: where a head attends, what a node promotes, which neurons of an MLP do its work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_nodeprune.circuit import Circuit
from tl_nodeprune.evidence.explanations.attention_roles import by_role, even, roles_of
from tl_nodeprune.evidence.explanations.circuit_run import CircuitRun, adds_to_stream, output_hook
from tl_nodeprune.evidence.explanations.explanation import NodeRole
from tl_nodeprune.evidence.explanations.readout import Readout, token_text, top_tokens, weighted
from tl_nodeprune.evidence.explanations.top_neurons import top_neurons
from tl_nodeprune.evidence.units import Unit
from tl_nodeprune.nodes import GateKey
from tl_nodeprune.prompts import PromptPairs, positions

MLPS = 3  # whose neurons are looked at


def describe(model: Any, circuit: Circuit, prompts: PromptPairs, nodes: Sequence[NodeRole], *, batch_size: int, sliced: bool
             ) -> tuple[list[NodeRole], list[str]]:
    """The nodes with all that can be seen of them, and in words what cannot."""
    units, notes = [node.unit for node in nodes], dict[str, None]()
    parts = [_Batch(CircuitRun(model, circuit, batch, sliced=sliced), units, notes) for batch in prompts.batches(batch_size)]
    mlps = [unit for unit in units if unit.granularity == "mlp" and GateKey("mlp_neuron", unit.layer) in circuit.space.present][:MLPS]
    neurons = {unit: top_neurons(model, circuit, prompts, unit, batch_size=batch_size, sliced=sliced) for unit in mlps}
    return [replace(node, **_seen(model, node.unit, parts, prompts), neurons=neurons.get(node.unit, ())) for node in nodes], list(notes)


class _Batch:
    """One run of the circuit on some prompts, and what is seen of the units in it.

    attention: [prompt pos] by head. By unit: to_answer and to_wrong, [prompt], what it adds to the logit of the answer and of the wrong
    answer; promoted, [d_vocab], to all logits, summed over the prompts.
    """

    def __init__(self, run: CircuitRun, units: Sequence[Unit], notes: dict[str, None]) -> None:
        self.run, self.n = run, len(run.prompts)
        self.attention: dict[Unit, Tensor] = {}
        self.to_answer: dict[Unit, Tensor] = {}
        self.to_wrong: dict[Unit, Tensor] = {}
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
        added, prompts = readout.logits(written), self.run.prompts
        self.to_answer[unit] = weighted(added, logits, prompts.answers).cpu()
        self.to_wrong[unit] = weighted(added, logits, prompts.wrong_answers).cpu()
        self.promoted[unit] = added.sum(0)


def _seen(model: Any, unit: Unit, parts: Sequence[_Batch], prompts: PromptPairs) -> dict[str, Any]:
    """The fields of a NodeRole that a unit has something for."""
    found: dict[str, Any] = {}
    if all(unit in part.attention for part in parts):
        attention, roles = torch.cat([part.attention[unit] for part in parts]), roles_of(prompts)
        to, at = int(attention[0].argmax()), int(positions(prompts)[0])
        found |= {"attends": by_role(attention, roles), "even": even(roles),
                  "example": (token_text(model, int(prompts.clean[0, at])), token_text(model, int(prompts.clean[0, to])))}
    if all(unit in part.promoted for part in parts):
        promoted = torch.stack([part.promoted[unit] for part in parts]).sum(0)
        found |= {name: float(torch.cat([getattr(part, name)[unit] for part in parts]).mean()) for name in ("to_answer", "to_wrong")}
        found |= {"promotes": top_tokens(model, promoted), "demotes": top_tokens(model, -promoted)}
    return found
