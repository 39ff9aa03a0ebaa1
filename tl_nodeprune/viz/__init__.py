"""Pictures of a circuit: plotly figures and circuitsvis views, each returned for you to restyle, or to save as one offline page.

Figures that take a circuit take a PruneResult as well. `scores` and `effects` are mappings from hook name to a tensor shaped as the
circuit's mask there, such as `Sweep.frequency` and `crosscheck.activation_patching` give; they are shown on hover, and by colour or
size where the figure says so. `task` is put in the title.

maps         every node of a circuit by layer: kept, cut, by colour
graph        the kept nodes as a graph, layer above layer
explanation  what `tlnp.explain` found, as a graph, and where a head looks
comparison   several circuits beside each other
curves       size against KL, the course of a search, how well two methods agree
tokens       what kept nodes do, token by token (circuitsvis)
overview     all of it for one result
page         figures and views as one offline page
values       what figures show of a node: its score, its effect, its state; and the table of all nodes
"""

from __future__ import annotations

from tl_nodeprune.viz.comparison import compare
from tl_nodeprune.viz.curves import agreement, frontier, history
from tl_nodeprune.viz.explanation import answer_attention, explanation
from tl_nodeprune.viz.graph import circuit_graph
from tl_nodeprune.viz.maps import mask_map, neuron_map
from tl_nodeprune.viz.overview import overview
from tl_nodeprune.viz.page import save_html
from tl_nodeprune.viz.tokens import kept_heads, kept_neurons, pruned_neurons, token_effects
from tl_nodeprune.viz.values import node_table

__all__ = [
    "agreement", "answer_attention", "circuit_graph", "compare", "explanation", "frontier", "history", "kept_heads", "kept_neurons",
    "mask_map", "neuron_map", "node_table", "overview", "pruned_neurons", "save_html", "token_effects",
]
