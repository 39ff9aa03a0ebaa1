"""Numbers as they are printed."""

from __future__ import annotations

from numbers import Integral

FIGURES = 3


def figures(value: float) -> str:
    """A number to three significant figures, a whole one with commas: 0.0521, 12.3, 2.33e-10, 1,230; 5,376."""
    if isinstance(value, Integral):
        return f"{int(value):,}"
    rounded = float(f"{float(value):.{FIGURES}g}")
    return f"{rounded:,.0f}" if 1000 <= abs(rounded) < 1e6 else f"{rounded:.{FIGURES}g}"
