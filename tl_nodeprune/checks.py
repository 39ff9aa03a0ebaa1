"""Checks of arguments that several functions share."""

from __future__ import annotations

from numbers import Integral, Real


def check_counts(least: int = 1, **counts: object) -> None:
    """Raises ValueError for what is no whole number, or below `least`."""
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
            raise ValueError(f"{name}={value!r}; it must be a whole number, {least} or more.")


def check_agreement(agreement: object) -> None:
    """Raises TypeError for what is no number, ValueError for no share; None is right."""
    if agreement is not None and (isinstance(agreement, bool) or not isinstance(agreement, Real)):
        raise TypeError(f"agreement={agreement!r}; it must be a number.")
    if agreement is not None and not 0 <= agreement <= 1:  # type: ignore[operator]
        raise ValueError(f"agreement={agreement}; it is a share of the prompts, 0 to 1.")
