"""Whatever is added, run, interrupted, copied, applied and removed, in any order: with nothing attached the model is the plain model."""

from __future__ import annotations

import contextlib
import copy
import sys
import warnings
from pathlib import Path
from types import FrameType
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

import tl_nodeprune as tlnp

FOLDER = str(Path(tlnp.__file__).parent)
ABLATIONS = st.sampled_from(["interchange", "mean", "zero"])
GRANULARITIES = st.sampled_from([("head",), ("mlp", "attn"), ("layer", "mlp_neuron")])


class Machine(RuleBasedStateMachine):
    """One model, its masks if any, and circuits applied in blocks that are left in order."""

    plain: tuple[Any, tlnp.PromptPairs, torch.Tensor] | None = None

    @initialize()
    def load(self) -> None:
        if Machine.plain is None:
            model, prompts = tlnp.toy.load("ioi", n=8)
            with torch.no_grad():
                Machine.plain = model, prompts, model(prompts.clean)
        model, self.prompts, self.logits = Machine.plain
        self.model = copy.deepcopy(model)
        self.masks: tlnp.NodeMasks | None = None
        self.applied = contextlib.ExitStack()
        self.circuit: tlnp.Circuit | None = None
        self.inside = False

    def teardown(self) -> None:
        self.applied.close()

    @precondition(lambda self: self.masks is None and not self.inside)
    @rule(granularities=GRANULARITIES, ablation=ABLATIONS, closed=st.booleans())
    def add(self, granularities: tuple[str, ...], ablation: str, closed: bool) -> None:
        self.masks = self.model.add_node_masks(granularities, ablation=ablation)
        self.circuit = tlnp.Circuit.empty(self.masks.space)
        if closed:
            self.masks.set_to(self.circuit)

    @precondition(lambda self: self.masks is not None or self.inside)
    @rule()
    def add_twice(self) -> None:
        with contextlib.suppress(RuntimeError):
            self.model.add_node_masks()
            raise AssertionError("masks over masks, or over a circuit")

    @precondition(lambda self: self.masks is not None)
    @rule(block=st.booleans())
    def add_again(self, block: bool) -> None:
        old, kinds = self.masks, self.masks.space.granularities  # type: ignore[union-attr]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.masks = self.model.add_node_masks(kinds, ablation=old.asked_ablation.name)  # type: ignore[union-attr]
        assert not old.attached and self.masks.attached  # type: ignore[union-attr]
        if block:
            with self.masks:
                self.model(self.prompts.clean)
            self.masks = None

    @precondition(lambda self: self.masks is not None)
    @rule()
    def remove(self) -> None:
        self.model.remove_node_masks()
        self.masks = None

    @precondition(lambda self: self.masks is not None)
    @rule()
    def reset(self) -> None:
        self.model.reset_hooks(including_permanent=True)
        self.model.remove_node_masks()
        self.masks = None

    @precondition(lambda self: self.masks is not None)
    @rule()
    def prune(self) -> None:
        self.masks.prune(self.prompts, max_nodes=2, steps=1, progress=False)

    @precondition(lambda self: self.masks is None and not self.inside and self.circuit is not None)
    @rule()
    def apply(self) -> None:
        self.applied.enter_context(self.circuit.applied(self.model, self.prompts))
        self.inside = True

    @precondition(lambda self: self.inside)
    @rule()
    def leave(self) -> None:
        self.applied.close()
        self.inside = False

    @precondition(lambda self: not self.inside)
    @rule(use_copy=st.booleans())
    def copy(self, use_copy: bool) -> None:
        twin = copy.deepcopy(self.model)
        self.check_plain(twin)
        if use_copy:
            if self.masks is not None:
                self.masks.remove()
            self.model, self.masks = twin, None

    @precondition(lambda self: self.circuit is not None and not self.inside)
    @rule(at=st.integers(1, 1500), what=st.sampled_from(["evaluate", "apply", "add", "remove", "pair"]))
    def interrupt(self, at: int, what: str) -> None:
        left = at

        def count(frame: FrameType, event: str, arg: object) -> Any:
            nonlocal left
            if not frame.f_code.co_filename.startswith(FOLDER):
                return None
            left -= event == "line"
            if not left:
                left = -1
                raise KeyboardInterrupt
            return count

        before = sys.gettrace()
        sys.settrace(count)
        try:
            self.run(what)
        except (KeyboardInterrupt, RuntimeError):  # one that masks forbid, or allow
            pass
        finally:
            sys.settrace(before)
        if self.masks is not None and not self.masks.attached:
            self.masks = None
        with contextlib.suppress(RuntimeError):
            if self.masks is None:
                self.model.remove_node_masks()  # those of `add`, if they were made

    def run(self, what: str) -> None:
        assert self.circuit is not None
        if what == "evaluate":
            tlnp.evaluate(self.model, self.circuit, self.prompts)
        elif what == "apply":
            with self.circuit.applied(self.model, self.prompts):
                self.model(self.prompts.clean)
        elif what == "add":
            self.model.add_node_masks()
        elif what == "remove":
            self.model.remove_node_masks()
        elif self.masks is not None:
            with self.masks.paired(self.prompts), self.masks.sampling(torch.Generator().manual_seed(0)):
                self.model(self.prompts.clean)

    @invariant()
    def plain_with_nothing_attached(self) -> None:
        if not hasattr(self, "model"):
            return
        if self.masks is not None:
            with self.masks.inactive(), torch.no_grad():
                assert torch.equal(self.model(self.prompts.clean), self.logits)
        elif not self.inside:
            self.check_plain(self.model)

    def check_plain(self, model: Any) -> None:
        with torch.no_grad():
            assert torch.equal(model(self.prompts.clean), self.logits)
        assert all(p.requires_grad for p in model.parameters())
        assert not [name for name, point in dict(model.hook_dict).items() if point.fwd_hooks or point._forward_hooks]


def go(examples: int, steps: int) -> None:
    run_state_machine_as_test(Machine, settings=settings(
        max_examples=examples, stateful_step_count=steps, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck)))


def test_a_few_sequences() -> None:
    go(2, 6)


@pytest.mark.slow
def test_many_sequences() -> None:
    go(80, 20)
