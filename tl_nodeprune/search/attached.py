"""A search that is given a model: masks are put on it for the length of the call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from tl_nodeprune.masks import NodeMasks, make_node_masks

T = TypeVar("T")


def on_model(search: Callable[..., T], masks: NodeMasks | nn.Module, *, granularities: Any, layers: Any, ablation: Any, **given: Any) -> T:
    """`search` with masks of these kinds on the model, which are taken off whatever happens.

    Raises: ValueError where masks are given that have granularities, layers and an ablation already.
    """
    if isinstance(masks, NodeMasks):
        asked = {"granularities": granularities, "layers": layers, "ablation": ablation}
        name, value = next((name, value) for name, value in asked.items() if value is not None)
        raise ValueError(f"{name}={value!r} goes with a model; these masks have theirs already. Give the model in place of the masks, "
                         f"or {name} to add_node_masks.")
    globals().pop("__warningregistry__", None)  # the search's warnings are said to come from here; the next call's are to show again
    own = make_node_masks(masks, granularities, layers, ablation or "interchange")
    with own.on(masks):
        return search(own, **given)
