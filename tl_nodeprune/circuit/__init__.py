"""The result: a circuit, its file, its size, its faithfulness; and scores and effects of nodes, in a circuit's own keys.

circuit     Circuit: live nodes with the ablation that they were found under; made, joined, run, saved
live_nodes  which nodes are live: as masks, as nodes, as counts; and compared
view        a circuit seen at other granularities
about       where a circuit comes from and what was measured of it
conversion  from trained masks to a circuit and back
evaluation  how faithful a circuit is, beside the full and the ablated model
scores      NodeScores: an order of all nodes, whose best k are a circuit
effects     Effects: what patching a node adds to a metric
format      the bytes of a circuit's file, checked
files       files written whole or not at all
"""

from __future__ import annotations

from tl_nodeprune.circuit import files
from tl_nodeprune.circuit.about import About, figure, versions
from tl_nodeprune.circuit.circuit import Circuit
from tl_nodeprune.circuit.conversion import leaves_of, set_to, to_circuit
from tl_nodeprune.circuit.effects import DIRECTIONS, Effects
from tl_nodeprune.circuit.evaluation import Evaluation, Metrics, PromptMetrics, evaluate
from tl_nodeprune.circuit.scores import SIZES, NodeScores, check_sizes, ranks
from tl_nodeprune.circuit.view import common, tells_apart

__all__ = [
    "DIRECTIONS", "SIZES", "About", "Circuit", "Effects", "Evaluation", "Metrics", "NodeScores", "PromptMetrics", "check_sizes", "common",
    "evaluate", "figure", "files", "leaves_of", "ranks", "set_to", "tells_apart", "to_circuit", "versions",
]
