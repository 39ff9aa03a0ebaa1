"""What a circuit does: the nodes that matter most, what they attend to and promote, and which feeds which."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from tl_nodeprune.circuit import Circuit, PromptMetrics
from tl_nodeprune.evidence.explanations.circuit_run import CircuitRun
from tl_nodeprune.evidence.explanations.explanation import LOGITS, STANDS_OUT, Explanation, NodeRole
from tl_nodeprune.evidence.explanations.node_roles import describe
from tl_nodeprune.evidence.explanations.path_patching import Edge, path_effects
from tl_nodeprune.evidence.explanations.sentences import sentences_of
from tl_nodeprune.evidence.runs import CircuitRuns
from tl_nodeprune.evidence.units import Unit, closed, units_of
from tl_nodeprune.masks import masks_off
from tl_nodeprune.nodes import can_slice, check_counts, check_ready, check_types
from tl_nodeprune.prompts import PromptPairs, positions

PATHS = 16
"""Prompts that paths are measured on."""


def explain(model: Any, circuit: Circuit, prompts: PromptPairs, *, nodes: int = 10, batch_size: int = 64) -> Explanation:
    """What a circuit does, in three sentences and so many nodes: printed, as a frame, as HTML, and drawn by `viz.explanation`.

    Every kept head and block is cut from the circuit, one at a time, under the circuit's own ablation: `effect = m(circuit without it) -
    m(circuit)`, m the mean logit difference, and the rise of the KL from the full model beside it. Of the `nodes` with the largest effects
    you get: where a head attends from the answer position, by what each token is to the task (see `attention_roles.roles_of`); the tokens
    that its output promotes, and the logit difference that it writes by itself (direct logit attribution); an MLP's strongest neurons, and
    the prompts on which they are most active; and, by path patching on the first 16 prompts, which of these nodes feed which.

    A node stands out where its effect is a tenth or more of the logit difference between full and ablated model, and 0 is outside of its
    95 % interval. Where none does, or the circuit does not do the task, the sentences say so.
    Cost: a forward per kept head and block, a few more per node shown, two per path. Masks that are attached are left out for the while.

    nodes: how many to describe, at most. batch_size: rows (nodes x prompts) in one forward.
    Raises: ValueError where the circuit keeps no node, circuit or prompts do not fit the model, or corrupted prompts are missing under
    interchange ablation; TypeError for what is no Circuit or PromptPairs; RuntimeError where a circuit is applied already, or the model is
    in training mode with dropout, or in inference mode; FloatingPointError for NaN or inf.
    """
    check_types(explain, locals())
    check_counts(nodes=nodes, batch_size=batch_size)
    with masks_off(model), torch.no_grad():
        check_ready(model, gradient=True)
        circuit.check_fits(model)
        prompts.check_fits(model)
        prompts.check_corrupted(circuit.ablation.name)
        if not circuit.size:
            raise ValueError("the circuit is empty: it keeps no node, so there is nothing to explain.")
        units = [unit for unit in units_of(circuit.space) if unit.kept(circuit)]
        full, itself, ablated, without = _cut_all(model, circuit, prompts, units, batch_size)
        different = int(prompts.distinct().max()) + 1
        measured = sorted(_measured(units, itself, without, _span(full, ablated), different), key=lambda node: -abs(node.effect))
        sliced = can_slice(model, prompts.clean, positions(prompts))
        shown, notes = describe(model, circuit, prompts, measured[:nodes], batch_size=batch_size, sliced=sliced)
        paths = _paths(model, circuit, prompts[:PATHS], [node.unit for node in shown], batch_size, sliced)
    if any(unit.granularity == "layer" for unit in units):
        notes = [*notes, "Layers are shown as wholes; paths are between heads, attention blocks and MLPs."]
    effects = pd.DataFrame([{"node": node.name, "effect": node.effect, "kl": node.kl} for node in measured])
    edges = pd.DataFrame([{"sender": str(sender), "receiver": str(receiver or LOGITS), "effect": float(values.mean())}
                          for (sender, receiver), values in paths.items()], columns=["sender", "receiver", "effect"])
    edges = edges.sort_values("effect", key=lambda column: -column.abs(), kind="stable", ignore_index=True)
    draft = Explanation(("", "", ""), tuple(shown), effects, edges, itself.means, full.means, ablated.means,
                        circuit.ablation.name, len(prompts), min(len(prompts), PATHS), tuple(notes))
    return replace(draft, sentences=sentences_of(draft))


def _cut_all(model: Any, circuit: Circuit, prompts: PromptPairs, units: Sequence[Unit], batch_size: int) -> list[PromptMetrics]:
    """Metrics of the full model, the circuit, the ablated model, and the circuit without each unit."""
    runs = CircuitRuns(model, prompts, circuit.space, circuit.ablation, batch_size=batch_size)
    empty = Circuit.empty(circuit.space, circuit.ablation)
    found = runs(one for group in ([circuit, empty], (closed(circuit, [unit]) for unit in units)) for one in group)
    return [runs.full, *found.split(1, 1, len(units))]


def _measured(units: Sequence[Unit], itself: PromptMetrics, without: PromptMetrics, span: float, n: int) -> list[NodeRole]:
    """The units with their effects. n: how many different prompts there are, which the interval is over."""
    changes, kl = without.logit_diff - itself.logit_diff, (without.kl - itself.kl).mean(1)
    effects = changes.mean(1)
    error = 1.96 * changes.std(1) / math.sqrt(n) if n > 1 else torch.full_like(effects, math.nan)
    rows = zip(units, effects.tolist(), error.tolist(), kl.tolist(), strict=True)
    return [NodeRole(unit, effect, (effect - half, effect + half), rise, abs(effect) >= STANDS_OUT * span and not abs(effect) <= half)
            for unit, effect, half, rise in rows]


def _span(full: PromptMetrics, ablated: PromptMetrics) -> float:
    """What a circuit can keep of the logit difference; never 0."""
    return max(abs(float(full.logit_diff.mean() - ablated.logit_diff.mean())), 1e-6)


def _paths(model: Any, circuit: Circuit, prompts: PromptPairs, units: Sequence[Unit], batch_size: int, sliced: bool) -> dict[Edge, Tensor]:
    """Path effects prompt by prompt, so many prompts at a time that all senders of a receiver go into one forward."""
    parts = [path_effects(CircuitRun(model, circuit, batch, units, sliced=sliced), units)
             for batch in prompts.batches(max(1, batch_size // len(units)))]
    return {edge: torch.cat([part[edge] for part in parts]) for edge in parts[0]}

