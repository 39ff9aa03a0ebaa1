"""Gates meet a model: what stands for a closed node, and the logits under masks.

node_masks    NodeMasks: one gate per node, attached to a model, trained, read, removed
gates         how a score becomes a mask: hard concrete, step
ablation      what takes a closed node's place: interchange, mean, zero, optimal
constants     the constants of optimal ablation, for masks that stay as they are
masked_model  a model under masks: the one place where logits under masks are made
reference     the same with the full model's logits, and stand-ins kept from step to step
landscape     losses and gradients of a flat vector of gates, for a search
losses        KL to the full model, and what is asked for beside it
"""

from __future__ import annotations

from tl_nodeprune.masks.ablation import ABLATIONS, FITTED, Ablation, as_ablation, check_constants
from tl_nodeprune.masks.constants import optimal_constants
from tl_nodeprune.masks.gates import Gate, HardConcrete, Step
from tl_nodeprune.masks.landscape import STEP_COST, Landscape, Losses, circuits_of
from tl_nodeprune.masks.losses import LossFn, distance, kl_divergence, shortfall
from tl_nodeprune.masks.masked_model import MaskedModel
from tl_nodeprune.masks.node_masks import NodeMasks, add_node_masks, gate_name, make_node_masks, masks_off, remove_node_masks
from tl_nodeprune.masks.reference import Reference

__all__ = [
    "ABLATIONS", "FITTED", "STEP_COST", "Ablation", "Gate", "HardConcrete", "Landscape", "LossFn", "Losses", "MaskedModel", "NodeMasks",
    "Reference", "Step", "add_node_masks", "as_ablation", "check_constants", "circuits_of", "distance", "gate_name", "kl_divergence",
    "make_node_masks", "masks_off", "optimal_constants", "remove_node_masks", "shortfall",
]
