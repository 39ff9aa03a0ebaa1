"""What a model has, and how to reach into it: this package alone knows what a hook point is.

space          the nodes: granularities, hook points, shapes, what lies below what, what is live
parameters     how many weights live nodes need
probe          finds a model's nodes by one forward, and says whether the model can be used
architecture   the probe of one layer: which of its hook points do what closing a node means
hooks          what a hook does: keep an activation, mix in a stand-in, apply a mask, cut to the answer positions
attachment     puts hooks on a model and takes them off again, whatever happens in between
scope          a `with` block that ends even where an interrupt strikes
checks         arguments of a wrong type or value, named in words
three_figures  numbers as they are printed
"""

from __future__ import annotations

from tl_nodeprune.nodes.attachment import Attachment, HookFn, find_attachment, inactive, ledger_of, temporary_hooks
from tl_nodeprune.nodes.checks import (
    check_agreement,
    check_counts,
    check_device,
    check_finite,
    check_level,
    check_list,
    check_logits,
    check_model,
    check_node,
    check_number,
    check_plain,
    check_seed,
    check_several,
    check_types,
    reraise_memory,
)
from tl_nodeprune.nodes.hooks import answer_logits, capture, capture_nodes, mask_hooks
from tl_nodeprune.nodes.parameters import count_parameters
from tl_nodeprune.nodes.probe import can_slice, check_causal, check_ready, device_of, find_nodes, model_name, peak_memory, rounding
from tl_nodeprune.nodes.scope import Exit, Scope, Scoped
from tl_nodeprune.nodes.space import (
    GRANULARITIES,
    HOOKS,
    PARENTS,
    GateKey,
    Gates,
    NodeSpace,
    any_below,
    check_granularities,
    check_layers,
    combine,
    node_name,
    settle,
    spread,
)
from tl_nodeprune.nodes.three_figures import Figured, figures

__all__ = [
    "GRANULARITIES", "HOOKS", "PARENTS", "Attachment", "Exit", "Figured", "GateKey", "Gates", "HookFn", "NodeSpace", "Scope", "Scoped",
    "answer_logits", "any_below", "can_slice", "capture", "capture_nodes", "check_agreement", "check_causal", "check_counts",
    "check_device", "check_finite", "check_granularities", "check_layers", "check_level", "check_list", "check_logits", "check_model",
    "check_node", "check_number", "check_plain", "check_ready", "check_seed", "check_several", "check_types", "combine",
    "count_parameters", "device_of", "figures", "find_attachment", "find_nodes", "inactive", "ledger_of", "mask_hooks", "model_name",
    "node_name", "peak_memory", "reraise_memory", "rounding", "settle", "spread", "temporary_hooks",
]
