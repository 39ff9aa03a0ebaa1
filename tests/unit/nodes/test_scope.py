"""Blocks that can be asked whether they still run."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

import pytest

from tl_nodeprune.nodes.scope import Scope, Scoped, Token


class Recorder:
    """Keeps the token of a block, and forgets to end it where the end is interrupted."""

    def __init__(self, interrupted: bool = False) -> None:
        self.token: Token = lambda: None
        self.interrupted, self.ends = interrupted, 0

    def block(self) -> Scope:
        def begin(token: Token) -> None:
            self.token = token

        def end(token: Token) -> None:
            if self.interrupted:
                raise KeyboardInterrupt
            self.ends += 1

        return Scope(begin, end)

    @property
    def runs(self) -> bool:
        return self.token() is not None


def test_a_block_runs_until_it_is_left() -> None:
    one = Recorder()
    with one.block():
        gc.collect()
        assert one.runs
    assert not one.runs and one.ends == 1


def test_an_end_that_is_interrupted_ends_the_block_though_its_frames_are_kept() -> None:
    one = Recorder(interrupted=True)
    with pytest.raises(KeyboardInterrupt) as kept, one.block():
        pass
    assert kept.tb is not None and not one.runs


def test_a_block_in_a_generator_runs_while_that_waits() -> None:
    one = Recorder()

    def waiting() -> Iterator[None]:
        with one.block():
            yield

    generator = waiting()
    next(generator)
    assert one.runs
    generator.close()
    assert not one.runs and one.ends == 1


def test_by_an_exit_stack_and_by_hand() -> None:
    one, other = Recorder(), Recorder()
    with contextlib.ExitStack() as stack:
        stack.enter_context(one.block())
        assert one.runs
    assert one.ends == 1
    block = other.block()
    assert hasattr(block, "__exit__")  # a look at it starts and ends nothing
    block.__enter__()
    assert hasattr(block, "__exit__") and other.runs
    with pytest.raises(RuntimeError, match="entered before"):
        block.__enter__()
    block.__exit__(None, None, None)
    assert other.ends == 1


def test_one_entered_by_hand_and_dropped_has_ended() -> None:
    one = Recorder()
    one.block().__enter__()
    assert not one.runs


def test_the_innermost_value_that_still_holds_counts() -> None:
    value = Scoped("outside")
    with value.at("outer"):
        with value.at("inner"):
            assert value.now == "inner"
        assert value.now == "outer"
        inner = value.at("by hand")
        inner.__enter__()
        assert value.now == "by hand"
        del inner
        assert value.now == "outer"
    assert value.now == "outside"
