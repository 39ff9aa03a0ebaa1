"""Which kept nodes feed which: path patching (Wang et al. 2022, arXiv:2211.00593; Goldowsky-Dill et al. 2023, arXiv:2304.05969)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_nodeprune.evidence.explanations.circuit_run import CircuitRun, adds_to_stream, detached, output_hook
from tl_nodeprune.evidence.units import Unit
from tl_nodeprune.nodes import GateKey, HookFn

Edge = tuple[Unit, Unit | None]
"""Sender and receiver; None: the logits."""


def path_effects(run: CircuitRun, units: Sequence[Unit]) -> dict[Edge, Float[Tensor, "prompt"]]:
    """What cutting the path from one unit to another changes in the logit difference of the circuit, prompt by prompt.

    `effect(s -> r) = m(circuit, r computed as if s were cut) - m(circuit)`: the receiver r alone sees the sender's stand-in at all
    positions, every other node sees the sender as it is; what r then puts out differently goes on to all that read it. The receiver None
    is the final norm and the unembedding. Heads and attention blocks feed their own layer's MLP where the model works so.

    run: its `cuts` must have the units. Left out are units whose output cannot be seen as it enters the stream.
    """
    seen = [unit for unit in units if adds_to_stream(run.circuit, unit)]
    logits, base = run(keep={output_hook(unit): detached for unit in seen})
    before = run.score(logits)[0]
    changes = {unit: base[output_hook(unit)] - _cut(run, unit) for unit in seen}
    found: dict[Edge, Tensor] = {}
    for receiver in (*seen, None):
        senders = [unit for unit in seen if receiver is None or _feeds(unit, receiver)]
        if receiver is not None and receiver.granularity == "mlp" and not _attention_is_seen(run, receiver):
            continue
        if senders:
            after = run.score(_patched(run, senders, receiver, changes))
            found |= {(sender, receiver): row - before for sender, row in zip(senders, after, strict=True)}
    return found


def _cut(run: CircuitRun, unit: Unit) -> Tensor:
    return run(without=[unit], keep={output_hook(unit): detached})[1][output_hook(unit)]


def _feeds(sender: Unit, receiver: Unit) -> bool:
    return sender.layer < receiver.layer or (sender.layer == receiver.layer and sender.granularity != "mlp"
                                             and receiver.granularity == "mlp")


def _attention_is_seen(run: CircuitRun, mlp: Unit) -> bool:
    """Whether the attention before an MLP can be held as it is; where the block has another mixer in its place, it cannot."""
    return GateKey("attn", mlp.layer) in run.circuit.space.present


def _patched(run: CircuitRun, senders: Sequence[Unit], receiver: Unit | None, changes: dict[Unit, Tensor]) -> Tensor:
    """Logits of the circuit with one path cut, sender by sender."""
    n = len(senders)
    if receiver is None:
        last = f"blocks.{run.circuit.space.n_layers - 1}.hook_resid_post"
        return run(then=[(last, _less(torch.cat([changes[sender] for sender in senders])))], times=n)[0]
    early = torch.cat([changes[sender] if sender.layer < receiver.layer else torch.zeros_like(changes[sender]) for sender in senders])
    own = torch.cat([changes[sender] if sender.layer == receiver.layer else torch.zeros_like(changes[sender]) for sender in senders])
    then = [(f"blocks.{receiver.layer}.hook_resid_pre", _less(early))]
    if receiver.granularity == "mlp":  # its attention stays as it is
        attention = output_hook(Unit("attn", receiver.layer))
        held = run(keep={attention: detached})[1][attention].repeat(n, 1, 1)
        then.append((attention, _replace(held - own)))
    hook, index = _output(receiver)
    new = run(then=then, keep={hook: lambda out: out.detach()[..., index, :]}, times=n)[1][hook]
    return run(then=[(hook, _replace(new, index))], times=n)[0]


def _output(unit: Unit) -> tuple[str, int | slice]:
    """Where a receiver's own output is set, and which part of the dim before the last; heads at hook_z."""
    if unit.granularity == "head":
        return f"blocks.{unit.layer}.attn.hook_z", unit.index[0]
    return output_hook(unit), slice(None)


def _less(change: Tensor) -> HookFn:
    def subtract(stream: Tensor, hook: Any) -> Tensor:
        return stream - change.to(stream)
    return subtract


def _replace(new: Tensor, index: int | slice = slice(None)) -> HookFn:
    def put(activation: Tensor, hook: Any) -> Tensor:
        activation = activation.clone()
        activation[..., index, :] = new.to(activation)
        return activation
    return put
