"""Where a circuit comes from and what was measured of it, as its file says."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import Annotated

import pydantic

from tl_nodeprune.nodes import check_counts, check_types, figures

_PACKAGES = ("tl_nodeprune", "transformer_lens", "torch")
_Text = Annotated[str, pydantic.Field(max_length=100_000)]


@dataclass(frozen=True)
class About:
    """What is known about a circuit; `prune` fills in all but task and notes, which `Circuit.save` takes. All of it may be missing.

    task, notes: in your words. model_name: as the model says. budget: what was asked for, as "max_kl=0.05".
    kl: KL(full || circuit) on prompts held out, nats, or another loss, whose name `loss` is; interval: its 90 % interval; accuracy: share
    of them with the answer preferred; held_out: how many they are, searched: how many the search had. converged: see `PruneResult`.
    seed: of the search. versions: of this library, TransformerLens and torch, by name.

    Raises: ValueError for figures that are not finite, an interval without two ends, or counts below 0; TypeError for other types.
    """

    __pydantic_config__ = pydantic.ConfigDict(strict=True, extra="forbid")

    task: _Text = ""
    notes: _Text = ""
    model_name: _Text = ""
    budget: _Text = ""
    loss: _Text = ""
    kl: float | None = None
    interval: tuple[float, float] | None = None
    accuracy: float | None = None
    converged: bool | None = None
    held_out: int | None = None
    searched: int | None = None
    seed: int | None = None
    versions: Annotated[Mapping[str, _Text], pydantic.Field(max_length=100)] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_types(About, vars(self))
        check_counts(0, **{name: value for name in ("held_out", "searched") if (value := getattr(self, name)) is not None})
        if not all(isinstance(text, str) for pair in self.versions.items() for text in pair):
            raise TypeError(f"versions={dict(self.versions)}; give strings by name.")
        if self.interval is not None and len(self.interval) != 2:
            raise ValueError(f"interval={self.interval}; give its two ends.")
        for name, value in (("kl", self.kl), ("accuracy", self.accuracy), *(("interval", end) for end in self.interval or ())):
            if value is not None and not math.isfinite(value):
                raise ValueError(f"{name} holds {value}; give finite numbers, or None where there is none.")

    __hash__ = None  # type: ignore[assignment]

    def __str__(self) -> str:
        """A line each of what was sought, what was found, where, and the notes; "" where nothing is known."""
        lines = [_listed(("task", self.task), ("model", self.model_name), ("budget", self.budget)), self._found(),
                 _listed(("searched on", _prompts(self.searched)), ("seed", self.seed),
                         ("with", ", ".join(f"{name} {version}" for name, version in self.versions.items()))),
                 _listed(("notes", self.notes))]
        text = "\n".join(line for line in lines if line)
        return "".join(char if char.isprintable() or char == "\n" else "\ufffd" for char in text)  # a file's notes may hold anything

    def _found(self) -> str:
        """As "KL 0.0421 nats (0.0312 to 0.0498, 90 %) on 50 prompts held out, converged"."""
        if self.kl is None:
            return ""
        unit = "" if self.loss not in ("", "KL") else " nats"
        ends = "" if self.interval is None else f" ({figures(self.interval[0])} to {figures(self.interval[1])}, 90 %)"
        on = f" on {_prompts(self.held_out)} held out" if self.held_out else ""
        right = "" if self.accuracy is None else f", {self.accuracy:.0%} with the answer preferred"
        asked_for_kl = not self.budget.startswith(("max_nodes", "objective"))  # of these True says nothing about the figure
        verdict = {True: ", converged" * asked_for_kl, False: ", NOT converged", None: ", untested"}[self.converged]
        return f"{self.loss or 'KL'} {figures(self.kl)}{unit}{ends}{on}{right}{verdict}"


def versions() -> dict[str, str]:
    """Of the packages that a result depends on; without those that are not installed as packages."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # a checkout on the path
            continue
    return found


def figure(value: float) -> float | None:
    """A number as About takes it: None for NaN and inf."""
    return float(value) if math.isfinite(value) else None


def _listed(*parts: tuple[str, object]) -> str:
    return "; ".join(f"{name}: {value}" for name, value in parts if value not in ("", None))


def _prompts(count: int | None) -> str:
    return "" if count is None else f"{count} prompt{'s' * (count != 1)}"
