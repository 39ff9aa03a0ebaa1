"""All there is to see of one circuit, as items for `save_html`."""

from __future__ import annotations

from typing import Any

import pandas as pd

from tl_nodeprune.circuit import Circuit, evaluate
from tl_nodeprune.evidence import TERMS, Explanation, Report, explain
from tl_nodeprune.nodes import check_types
from tl_nodeprune.prompts import PromptPairs
from tl_nodeprune.search import PruneResult, held_out_sentence
from tl_nodeprune.viz.curves import agreement, frontier, history
from tl_nodeprune.viz.explanation import answer_attention, explanation
from tl_nodeprune.viz.graph import circuit_graph
from tl_nodeprune.viz.maps import mask_map, neuron_map
from tl_nodeprune.viz.page import Heading, Item, Terms
from tl_nodeprune.viz.tokens import kept_heads, kept_neurons, token_effects
from tl_nodeprune.viz.values import NEURONS, HasCircuit, Values, check_values, circuit_of, node_table, state

_MOST_ROWS = 50_000
_EXPLAINED = 64  # prompts that the explanation is measured on
_TERMS = TERMS | {
    "leaf node": "a node with nothing, or not everything, gated below it: sizes count these. Finer than heads and MLPs are attention "
                 "neurons (one dimension of a head), MLP neurons, and MLP output dims",
    "live": "kept, with everything above it kept",
    "held out": "prompts that the search never saw. On the prompts searched on, figures are better than that",
    "converged": "the circuit is within its budget on the prompts held out, with a margin for chance",
    "faithfulness": "the share of the logit difference, from the ablated to the full model, that the circuit keeps",
    "accuracy": "share of prompts with the answer's logit above that of the wrong answer",
    "exact match": "share of prompts with the full model's most likely token",
    "ablation": "what stands in for a node that is cut: interchange, its output on the corrupted prompt; mean, its mean over prompts; "
                "zero; optimal, a constant that was learned",
    "score": "how strongly the search wanted to keep the node",
}


def overview(model: Any, circuit: HasCircuit, prompts: PromptPairs, *, task: str = "", command: str = "",
             scores: Values | None = None, effects: Values | None = None) -> list[Item]:
    """What was asked, what the circuit does, figures, token views and the table of kept nodes, for `save_html(path, *overview(...))`.

    prompts: judged on (`evaluate`), the first 64 of them explained (`explain`); the first is shown token by token. task, command: said at
    the top, with what `circuit.about` knows. A PruneResult adds what it has on prompts held out, its frontier and history, and its scores
    where none are given; a Report its verdicts.
    Raises: TypeError for what is not a circuit or PromptPairs; ValueError where something does not fit the model or the circuit;
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
    found_out = found_out or [text for text in [str(circuit.about)] if text]
    asked = {"Task": task or circuit.about.task, "Budget": circuit.about.budget, "Command": command}
    items: list[Item] = [_summary(circuit, asked), *found_out]
    items += _explained(model, circuit, prompts[:_EXPLAINED], task) if circuit.size else []
    items += [Heading("How good the circuit is"), f"On {report.n_prompts} prompts, {report.ablation} ablation:", report.to_frame(),
              "Live nodes by layer:", circuit.summary(), mask_map(circuit, **of)]
    if isinstance(found, PruneResult):
        items += [frontier(found, task=task)] if not found.frontier.empty else []
        items += [history(found, task=task)] if found.history else []
    if isinstance(found, Report):
        items.append(str(found))
    if not circuit.size:
        return [*items, *_words(), "The circuit is empty: no node is live, and there is nothing more to show."]
    items.append(circuit_graph(circuit, **of))
    counts = circuit.count()
    items += [neuron_map(circuit, name, **of) for name in NEURONS if counts.get(name)]
    items += [agreement(circuit, effects, scores=scores, task=task)] if effects is not None else []
    items.append(Heading("Token by token"))
    items.append(token_effects(model, circuit, prompts))
    items += [_heads(model, circuit, prompts)] if any(hook.endswith("hook_z") and circuit[hook].any() for hook in circuit) else []
    items += [kept_neurons(model, circuit, prompts)] if counts.get("mlp_neuron") else []
    return [*items, *_words(), *_nodes(circuit, scores, effects)]


def _explained(model: Any, circuit: Circuit, prompts: PromptPairs, task: str) -> list[Item]:
    """What the circuit does: sentences, table, graph, the strongest head's attention, the effects of all kept heads and blocks."""
    found = explain(model, circuit, prompts)
    items: list[Item] = [Heading("What the circuit does"), found]
    items += [explanation(found, task=task)] if len(found.edges) else []
    items += _strongest_head(model, circuit, prompts, found)
    effects = found.effects.rename(columns={"effect": "effect (logit difference)", "kl": "KL rise (nats)"})
    return [*items, f"Effects of cutting each of the {len(effects):,} kept heads and blocks, the largest first:", effects]


def _strongest_head(model: Any, circuit: Circuit, prompts: PromptPairs, found: Explanation) -> list[Item]:
    heads = [node.unit for node in found.nodes if node.attends]
    return [answer_attention(model, circuit, prompts, (heads[0].layer, heads[0].index[0]))] if heads else []


def _words() -> list[Item]:
    return [Heading("Words on this page"), Terms("\n".join(f"{word}: {meaning}" for word, meaning in _TERMS.items())),
            Heading("Kept nodes")]


def _heads(model: Any, circuit: Circuit, prompts: PromptPairs) -> Item:
    try:
        return kept_heads(model, circuit, prompts)
    except ValueError as error:  # not every attention implementation gives its patterns
        return f"No attention patterns: {error}"


def _summary(circuit: Circuit, asked: dict[str, str]) -> str:
    lines = [*(f"{name}: {given}" for name, given in (asked | {"Model": circuit.space.model_name}).items() if given),
             f"Ablation: {circuit.ablation.name}",
             f"Leaf nodes live: {circuit.size:,} of {circuit.size_total:,} ({1 - circuit.sparsity:.2%})",
             f"Weights that they need: {circuit.parameters:,} of {circuit.parameters_total:,}"]
    return "\n".join(line for line in lines if line)


def _nodes(circuit: Circuit, scores: Values | None, effects: Values | None) -> list[Item]:
    table = node_table(circuit, scores=scores, effects=effects)
    by = next((name for name in ("effect", "score") if name in table and table[name].notna().any()), None)
    table = table.sort_values(by, key=lambda column: -column.abs(), kind="stable", ignore_index=True) if by else table
    cut = f", the first {_MOST_ROWS:,} here" if len(table) > _MOST_ROWS else ""
    order = f", the largest {by} first" if by else ""
    text = f"Kept nodes: {len(table):,}{cut}{order}. A click on a column sorts."
    head: pd.DataFrame = table.head(_MOST_ROWS)
    return [text, head]
