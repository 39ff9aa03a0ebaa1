"""A context manager that survives an interrupt at any line: what it sets holds for its `with` block and no longer."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, Generic, TypeVar

T = TypeVar("T")
Token = Callable[[], object]
"""A weak reference that gives None once the block has ended."""


class Exit:
    """What a `with` statement calls at its end. The statement alone holds that callable, and drops it whatever happens; an object that
    frames refer to, such as `self` of an `__exit__`, would live on in the traceback of an interrupt.

    scope_of: the scope of the object that is entered, where it is not one itself.
    """

    def __init__(self, scope_of: Callable[[Any], Scope] = lambda entered: entered) -> None:
        self.scope_of = scope_of

    def __get__(self, entered: Any, owner: type | None = None) -> Callable[..., None]:
        if entered is None:  # an ExitStack asks the class
            return lambda entered, *error: _leave(self.scope_of(entered))
        scope = self.scope_of(entered)
        leave = partial(_leave, scope)
        if not scope.entered:
            scope.token = weakref.ref(leave)
        return leave


class Scope:
    """A context manager whose block can be asked whether it still runs: `begin` and `end` get a token for it. Used once.

    Entered by hand or by an ExitStack, it runs until it is left or dropped.
    """

    def __init__(self, begin: Callable[[Token], object], end: Callable[[Token], object]) -> None:
        self.begin, self.end, self.entered = begin, end, False
        self.token: Token | None = None

    def __enter__(self) -> None:
        if self.entered:
            raise RuntimeError("this `with` block was entered before; make a new one.")
        self.entered = True
        if self.token is None or self.token() is None:
            self.token = weakref.ref(self)
        self.begin(self.token)

    __exit__ = Exit()


def _leave(scope: Scope, *error: object) -> None:
    if scope.token is not None:
        scope.end(scope.token)


class Scoped(Generic[T]):
    """A value that `with scoped.at(value):` sets for the length of the block; of nested blocks the innermost counts."""

    def __init__(self, default: T) -> None:
        self._default = default
        self._values: list[tuple[Token, T]] = []

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy is outside of all blocks."""
        return Scoped, (self._default,)

    @property
    def now(self) -> T:
        return next((value for token, value in reversed(self._values) if token() is not None), self._default)

    def at(self, value: T) -> Scope:
        def begin(token: Token) -> None:
            self._values = [pair for pair in self._values if pair[0]() is not None] + [(token, value)]

        def end(token: Token) -> None:
            self._values = [pair for pair in self._values if pair[0] is not token]

        return Scope(begin, end)
