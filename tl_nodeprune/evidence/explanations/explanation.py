"""What an explanation of a circuit holds, and its forms: three sentences, a table, frames, HTML."""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pandas as pd

from tl_nodeprune.circuit import Metrics
from tl_nodeprune.evidence.units import Unit
from tl_nodeprune.nodes import figures

STANDS_OUT = 0.1
"""Of the logit difference that separates the full model from the ablated one: what cutting a node must change, at least, to be named."""
LEADS = 0.05
"""The same for a path."""
WHOLE_TASK = 0.5
"""Of that logit difference: what a circuit must keep to be said to do the task."""

LOGITS = "logits"
"""The receiver of paths that lead to the final norm and the unembedding."""

TERMS: dict[str, str] = {
    "circuit": "the nodes that are kept; every other node is ablated: something else stands in for its output",
    "node": "a part of the model that can be cut: here a head, an attention block or an MLP block, with all of it that is kept. "
            "Head 4.4 is head 4 of layer 4; MLP 0 is the MLP block of layer 0; layers and heads count from 0",
    "logit difference": "the logit of the answer minus that of the wrong answer, at the answer position, where the model predicts it; "
                        "mean over prompts; above 0 the answer is the more likely one",
    "effect": "what cutting the node from the circuit changes: the logit difference without it minus that with it. -2.00: cutting it "
              "lowers the logit difference by 2.00",
    "KL": "KL(full model || circuit) in nats, at the answer position: 0 where the circuit predicts exactly as the full model. Its rise is "
          "what cutting the node adds",
    "writes": "direct logit attribution: the logit difference that the node's output gives by itself, through the final norm and the "
              "unembedding, as a share of the circuit's",
    "attends to": "where the head's attention goes from the answer position, as a share of 1, by what a token is to the task; mean over "
                  "prompts, in the circuit",
    "promotes": "the tokens whose logits the node's output raises most by itself, above the mean of all tokens; mean over prompts",
    "path": "the effect of cutting one connection: the receiver sees the sender's stand-in, every other node sees the sender as it is",
}


@dataclass(frozen=True)
class Neuron:
    """An MLP neuron, layer.index. effect: as a node's. promotes: the tokens that it raises when it is more active. top: the clean prompts
    that it is most active on, with its largest activation there and the token that it has it at."""

    layer: int
    index: int
    effect: float
    promotes: tuple[str, ...]
    at_answer: float
    top: tuple[tuple[float, str, str], ...]

    def __str__(self) -> str:
        return f"{self.layer}.{self.index}"


@dataclass(frozen=True, eq=False)
class NodeRole:
    """What one kept node does.

    effect: logit difference of the circuit without it minus that of the circuit; interval: 95 %, over prompts (NaN for one prompt).
    kl: by how much the KL to the full model rises without it, nats. to_answer, to_wrong: what it adds itself to the logit of the answer and
    of the wrong answer, from the mean over all tokens; NaN where that cannot be seen. attends: attention from the answer position by role,
    the largest first; even: what a head that attends to all tokens alike would have. example: of what it attends to, on the first prompt:
    from which token to which.
    """

    unit: Unit
    effect: float
    interval: tuple[float, float]
    kl: float
    stands_out: bool
    to_answer: float = math.nan
    to_wrong: float = math.nan
    attends: Mapping[str, float] = field(default_factory=dict)
    even: Mapping[str, float] = field(default_factory=dict)
    example: tuple[str, str] = ("", "")
    promotes: tuple[str, ...] = ()
    demotes: tuple[str, ...] = ()
    neurons: tuple[Neuron, ...] = ()

    @property
    def name(self) -> str:
        return str(self.unit)

    @property
    def direct(self) -> float:
        """The logit difference that it writes itself, `to_answer - to_wrong`."""
        return self.to_answer - self.to_wrong

    def attention(self, most: int = 2) -> list[tuple[str, float, float]]:
        """The roles that get most of its attention, and more than even attention would give them: role, share, even share."""
        rows = [(role, part, self.even.get(role, 0.0)) for role, part in self.attends.items()]
        return [row for row in rows if row[1] > row[2]][:most]


@dataclass(frozen=True, eq=False, repr=False)
class Explanation:
    """What a circuit does, in three sentences and a few nodes; made by `tl_nodeprune.explain`. `print` it; a notebook shows it as HTML.

    sentences: three. nodes: those that matter most, by the size of their effect. effects: a frame with a row for every kept head and
    block: node, effect, kl. edges: a frame with a row for each path between the nodes, and from them to the logits: sender, receiver,
    effect; the largest first. circuit, full, ablated: metrics of the circuit, the full model and the model with every node of the circuit's
    space cut. n_prompts; n_paths: on how many of them the paths were measured. notes: what cannot be shown, and why.
    """

    sentences: tuple[str, str, str]
    nodes: tuple[NodeRole, ...]
    effects: pd.DataFrame
    edges: pd.DataFrame
    circuit: Metrics
    full: Metrics
    ablated: Metrics
    ablation: str
    n_prompts: int
    n_paths: int
    notes: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The three sentences."""
        return " ".join(self.sentences)

    def to_frame(self) -> pd.DataFrame:
        """A row per node: node, effect, low, high, kl, direct, attends_to, promotes, demotes, neurons."""
        rows = [{"node": node.name, "effect": node.effect, "low": node.interval[0], "high": node.interval[1], "kl": node.kl,
                 "direct": node.direct, "attends_to": dict(node.attends), "promotes": node.promotes, "demotes": node.demotes,
                 "neurons": tuple(map(str, node.neurons))} for node in self.nodes]
        return pd.DataFrame(rows)

    def table(self) -> pd.DataFrame:
        """`to_frame` in words, figures to three digits."""
        rows = [[node.name, figures(node.effect, sign=True), figures(node.kl, sign=True), share(node.direct, self.circuit.logit_diff),
                 _work(node), " ".join(node.promotes[:3])] for node in self.nodes]
        return pd.DataFrame(rows, columns=["node", *FIGURES, "attends to, or neurons (effect)", "promotes"])

    def __repr__(self) -> str:
        paragraphs = [textwrap.fill(text, 100) for text in self.sentences]
        notes = [textwrap.fill(note, 100) for note in (UNITS, *self.notes)]
        return "\n".join([*paragraphs, "", *_aligned(self.table()), "", *notes])

    def _repr_html_(self) -> str:
        head = "".join(f"<th style='text-align:left'>{html.escape(name)}</th>" for name in self.table())
        rows = "".join(f"<tr>{''.join(_cell(name, value) for name, value in row.items())}</tr>" for row in self.table().to_dict("records"))
        text = "".join(f"<p>{html.escape(sentence)}</p>" for sentence in self.sentences)
        notes = "".join(f"<p><small>{html.escape(note)}</small></p>" for note in (UNITS, *self.notes))
        return (f"<div class='explanation'>{text}<div style='overflow-x:auto'><table><thead><tr>{head}</tr></thead>"
                f"<tbody>{rows}</tbody></table></div>{notes}</div>")


FIGURES = ("effect", "KL rise", "writes")
UNITS = ("effect: the logit difference (answer minus wrong answer) without the node minus that with it. KL rise: what cutting the node "
         "adds to the KL from the full model, nats. writes: the logit difference that its output gives by itself, as a share of the "
         "circuit's.")


def share(part: float, of: float) -> str:
    """A part as a share; empty where it is not known or there is nothing to have a share of."""
    return "" if math.isnan(part) or abs(of) < 1e-6 else f"{part / of:.0%}".replace("-0%", "0%")


def listed(words: Sequence[str]) -> str:
    """a, b and c."""
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]])) if words else ""


def _work(node: NodeRole) -> str:
    if node.neurons:
        return ", ".join(f"{neuron} ({figures(neuron.effect, sign=True)})" for neuron in node.neurons)
    return "; ".join(f"{role} {part:.0%}" for role, part, _ in node.attention())


def _aligned(table: pd.DataFrame) -> list[str]:
    """Lines of a table of strings, figures to the right."""
    columns = [[name, *table[name]] for name in table]
    widths = [max(map(len, column)) for column in columns]
    return ["  ".join(f"{cell:>{width}}" if column[0] in FIGURES else f"{cell:<{width}}"
                      for cell, column, width in zip(row, columns, widths, strict=True)).rstrip() for row in zip(*columns, strict=True)]


def _cell(name: str, value: str) -> str:
    return f"<td style='text-align:{'right' if name in FIGURES else 'left'}'>{html.escape(str(value))}</td>"
