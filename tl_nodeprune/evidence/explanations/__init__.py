"""What a circuit does, told: nodes by what cutting them changes, what they attend to and promote, and which feeds which.

explain          the function
explanation      Explanation: what it returns, as text, frames and HTML
sentences        its three sentences
node_roles       one node: attention by role, what it writes
top_neurons      the neurons of an MLP
attention_roles  what a token of a prompt is to the task
readout          direct logit attribution
path_patching    the effect of one connection
circuit_run      a circuit run again with one thing changed
"""

from __future__ import annotations

from tl_nodeprune.evidence.explanations.circuit_run import CircuitRun
from tl_nodeprune.evidence.explanations.explain import explain
from tl_nodeprune.evidence.explanations.explanation import LOGITS, TERMS, Explanation, Neuron, NodeRole

__all__ = ["LOGITS", "TERMS", "CircuitRun", "Explanation", "Neuron", "NodeRole", "explain"]
