"""Checks of arguments that several functions share."""

from __future__ import annotations

from numbers import Integral


def check_counts(least: int = 1, **counts: object) -> None:
    """Raises ValueError for what is no whole number, or below `least`."""
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
            raise ValueError(f"{name}={value!r}; it must be a whole number, {least} or more.")
