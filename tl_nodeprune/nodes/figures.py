"""Numbers as they are printed."""

from __future__ import annotations

from dataclasses import fields
from numbers import Integral
from typing import Any

FIGURES = 3


def figures(value: float, *, sign: bool = False) -> str:
    """A number to three significant figures, a whole one with commas: 0.0521, 12.3, 2.33e-10, 1,230; 5,376. sign: with its sign."""
    plus = "+" if sign else ""
    if isinstance(value, Integral):
        return f"{int(value):{plus},}"
    rounded = float(f"{float(value):.{FIGURES}g}")
    return f"{rounded:{plus},.0f}" if 1000 <= abs(rounded) < 1e6 else f"{rounded:{plus}.{FIGURES}g}"


class Figured:
    """A dataclass that prints as dataclasses do (write `repr=False`), its numbers to three figures."""

    def __repr__(self) -> str:
        shown = [f"{f.name}={_shown(getattr(self, f.name))}" for f in fields(self) if f.repr]  # type: ignore[arg-type]
        return f"{type(self).__name__}({', '.join(shown)})"


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_shown, value))}{',' * (len(value) == 1)})"
    return figures(value) if isinstance(value, float) else repr(value)
