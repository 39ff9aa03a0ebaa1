"""Multi-granular node pruning for circuit discovery (arXiv:2512.10903) as a TransformerLens plug-in.

Importing this package gives TransformerBridge, and HookedTransformer where there is one, the methods `add_node_masks` and
`remove_node_masks`.
"""

from __future__ import annotations

from typing import Any

from tl_nodeprune.cli import shell

shell.end_quietly_while_starting("tl-nodeprune", __name__)  # before the imports that take seconds

# ruff: noqa: E402
from tl_nodeprune import mib, toy, viz
from tl_nodeprune.circuit import About, Circuit, Evaluation, NodeScores, evaluate, set_to, to_circuit
from tl_nodeprune.evidence import Comparison, Explanation, Report, compare, crosscheck, explain, hypotheses, known, report
from tl_nodeprune.masks import Ablation, HardConcrete, NodeMasks, add_node_masks, kl_divergence, remove_node_masks
from tl_nodeprune.masks import Step as StepGate
from tl_nodeprune.nodes import GRANULARITIES
from tl_nodeprune.prompts import PromptPairs, tasks
from tl_nodeprune.search import Estimate, PaperObjective, PruneResult, Sweep, estimate, prune, rank, sweep

__version__ = "0.1.0"
__all__ = [
    "GRANULARITIES", "About", "Ablation", "Circuit", "Comparison", "Estimate", "Evaluation", "Explanation", "HardConcrete", "NodeMasks",
    "NodeScores", "PaperObjective", "PromptPairs", "PruneResult", "Report", "StepGate", "Sweep", "add_node_masks", "compare", "crosscheck",
    "estimate", "evaluate", "explain", "hypotheses", "kl_divergence", "known", "mib", "prune", "rank", "remove_node_masks", "report",
    "sweep", "tasks", "toy", "viz",
]


def _model_classes() -> list[Any]:
    from transformer_lens.model_bridge import TransformerBridge

    try:
        from transformer_lens import HookedTransformer
    except ImportError:  # removed in TransformerLens 4
        return [TransformerBridge]
    return [TransformerBridge, HookedTransformer]


for _class in _model_classes():
    _class.add_node_masks, _class.remove_node_masks = add_node_masks, remove_node_masks
NodeMasks.prune, NodeMasks.to_circuit, NodeMasks.set_to = prune, to_circuit, set_to
