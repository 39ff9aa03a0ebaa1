"""All there is to see of one circuit, as items for `save_html`."""

from __future__ import annotations

from typing import Any

import pandas as pd

from tl_nodeprune.circuit import Circuit, evaluate
from tl_nodeprune.evidence import Report
from tl_nodeprune.nodes import check_types
from tl_nodeprune.prompts import PromptPairs
from tl_nodeprune.search import PruneResult, held_out_sentence
from tl_nodeprune.viz.curves import agreement, frontier, history
from tl_nodeprune.viz.graph import circuit_graph
from tl_nodeprune.viz.maps import mask_map, neuron_map
from tl_nodeprune.viz.page import Item
from tl_nodeprune.viz.tokens import kept_heads, kept_neurons, token_effects
from tl_nodeprune.viz.values import NEURONS, HasCircuit, Values, check_values, circuit_of, node_table, state

_MOST_ROWS = 50_000


def overview(model: Any, circuit: HasCircuit, prompts: PromptPairs, *, task: str = "", scores: Values | None = None,
             effects: Values | None = None) -> list[Item]:
    """Summary, figures, token views and the table of kept nodes of a circuit, for `save_html(path, *overview(...))`.

    prompts: judged on (`evaluate`); the first of them is shown token by token. A PruneResult adds what it has on prompts held out, its
    frontier and history, and its scores where none are given; a Report its verdicts.
    Raises: TypeError for what is no circuit or no PromptPairs; ValueError where something does not fit the model or the circuit;
    RuntimeError where a circuit is applied.
    """
    check_types(overview, locals())
    found, circuit = circuit, circuit_of(circuit)
    if scores is None and isinstance(found, PruneResult):
        scores = found.scores
    check_values(circuit, scores, "scores")
    check_values(circuit, effects, "effects")
    report = evaluate(model, circuit, prompts)
    of: dict[str, Any] = {"task": task, "scores": scores, "effects": effects}
    found_out = [f"{held_out_sentence(found)} {state(found).capitalize()}."] if isinstance(found, PruneResult) else []
    items: list[Item] = [_summary(circuit, task), *found_out,
                         f"On {report.n_prompts} prompts, {report.ablation} ablation:", report.to_frame(),
                         "Live nodes by layer:", circuit.summary(), mask_map(circuit, **of)]
    if isinstance(found, PruneResult):
        items += [frontier(found, task=task)] if not found.frontier.empty else []
        items += [history(found, task=task)] if found.history else []
    if isinstance(found, Report):
        items.append(str(found))
    if not circuit.size:
        return [*items, "The circuit is empty: no node is live, and there is nothing more to show."]
    items.append(circuit_graph(circuit, **of))
    counts = circuit.count()
    items += [neuron_map(circuit, name, **of) for name in NEURONS if counts.get(name)]
    items += [agreement(circuit, effects, scores=scores, task=task)] if effects is not None else []
    items.append(token_effects(model, circuit, prompts))
    items += [_heads(model, circuit, prompts)] if any(hook.endswith("hook_z") and circuit[hook].any() for hook in circuit) else []
    items += [kept_neurons(model, circuit, prompts)] if counts.get("mlp_neuron") else []
    return [*items, *_nodes(circuit, scores, effects)]


def _heads(model: Any, circuit: Circuit, prompts: PromptPairs) -> Item:
    try:
        return kept_heads(model, circuit, prompts)
    except ValueError as error:  # not every attention implementation gives its patterns
        return f"No attention patterns: {error}"


def _summary(circuit: Circuit, task: str) -> str:
    lines = [f"Task: {task}" if task else "", f"Model: {circuit.space.model_name}" if circuit.space.model_name else "",
             f"Ablation: {circuit.ablation.name}",
             f"Leaf nodes live: {circuit.size:,} of {circuit.size_total:,} ({1 - circuit.sparsity:.2%})",
             f"Weights that they need: {circuit.parameters:,} of {circuit.parameters_total:,}"]
    return "\n".join(line for line in lines if line)


def _nodes(circuit: Circuit, scores: Values | None, effects: Values | None) -> list[Item]:
    table = node_table(circuit, scores=scores, effects=effects)
    cut = f", the first {_MOST_ROWS:,} here, coarse to fine" if len(table) > _MOST_ROWS else ""
    text = f"Kept nodes: {len(table):,}{cut}. A click on a column sorts."
    head: pd.DataFrame = table.head(_MOST_ROWS)
    return [text, head]
