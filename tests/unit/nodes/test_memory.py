"""Memory that runs out is no fault of what was asked for: its error comes through as it is, wherever another would be put in words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import tl_nodeprune as tlnp
from tl_nodeprune.nodes.attachment import ledger_of
from tl_nodeprune.nodes.probe import can_slice, find_nodes

Toy = tuple[Any, tlnp.PromptPairs]


def allocator() -> Exception:
    """What torch raises on the CPU where there is not enough memory."""
    try:
        torch.empty(1 << 60, dtype=torch.uint8)
    except RuntimeError as error:
        return error
    raise AssertionError("so much memory is nowhere")


USES: dict[str, Callable[[Any, tlnp.PromptPairs], Any]] = {
    "find_nodes": lambda model, prompts: find_nodes(model),
    "add_node_masks": lambda model, prompts: model.add_node_masks(),
    "from_nodes": lambda model, prompts: tlnp.Circuit.from_nodes(model, {"head": [(0, 1)]}),
    "padding": lambda model, prompts: [setattr(ledger_of(model), "causal", None), prompts.check_fits(model)],
    "correct": lambda model, prompts: prompts.correct(model),
    "can_slice": lambda model, prompts: can_slice(model, prompts.clean, prompts.answer_positions),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("error", [MemoryError("full"), torch.cuda.OutOfMemoryError("full"), allocator(), KeyboardInterrupt()], ids=type)
def test_it_stays_what_it_is(fresh_toy: Toy, use: str, error: BaseException) -> None:
    model, prompts = fresh_toy

    def full(*given: object) -> None:
        raise error

    handle = model.blocks[1].register_forward_hook(full)
    with pytest.raises(type(error)) as raised:
        USES[use](model, prompts)
    assert raised.value is error
    handle.remove()
    USES[use](model, prompts)


def test_other_errors_are_put_in_words(fresh_toy: Toy) -> None:
    model, prompts = fresh_toy

    def broken(*given: object) -> None:
        raise RuntimeError("broken")

    handle = model.blocks[1].register_forward_hook(broken)
    for use in ("find_nodes", "padding"):
        with pytest.raises(ValueError, match="this model's forward fails on . tokens, so .*RuntimeError: broken"):
            USES[use](model, prompts)
    handle.remove()
