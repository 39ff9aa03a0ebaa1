"""Griffe extension: the docstrings' "name: meaning" lines become lists, so that the reference is readable.

A docstring here is prose; parameters and fields stand as `name: meaning`, continued on indented lines, and errors as "Raises: …".
"""

from __future__ import annotations

import re
from typing import Any

import griffe

NAMES = re.compile(r"^(?P<names>[a-z_]\w*(?:, [a-z_]\w*)*): (?P<meaning>.*)$", re.DOTALL)


def as_markdown(text: str, known: set[str]) -> str:
    """The docstring with a list item per parameter or field. known: the names that are parameters or fields of the object."""
    items: list[str] = []
    for line in _joined(text.split("\n")):
        for part in _parts(line, known):
            found = NAMES.match(part)
            if found and set(found["names"].split(", ")) <= known:
                names = ", ".join(f"`{name}`" for name in found["names"].split(", "))
                part = f"- {names}: {found['meaning']}"
                items += [] if items and items[-1].startswith("- ") else [""]  # a list begins after a blank line
            elif items and items[-1].startswith("- ") and part:
                items.append("")
            items.append(re.sub(r"(^|\. )Raises: ", r"\1**Raises** ", part))
    return "\n".join(items)


def _joined(lines: list[str]) -> list[str]:
    """Indented lines, and those in the middle of a sentence, are one with the line before."""
    joined: list[str] = []
    for line in lines:
        open_ended = joined and joined[-1] and not joined[-1].endswith(".")
        if joined and joined[-1] and line and (line.startswith("    ") or open_ended):
            joined[-1] += " " + line.strip()
        else:
            joined.append(line)
    return joined


def _parts(line: str, known: set[str]) -> list[str]:
    """A line that explains several names, "steps: at most. seed: …", as one part for each; and errors by themselves."""
    if not known:
        return [line]
    names = "|".join(sorted(known, key=len, reverse=True))
    return re.split(rf"(?<=[.;]) (?=(?:{names})(?:, (?:{names}))*: |(?:Raises: |Returns ))", line)


class Docstrings(griffe.Extension):
    """Rewrites docstrings of functions and classes."""

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        self._rewrite(func, {parameter.name for parameter in func.parameters})

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        made = cls.members.get("__init__")
        known = {parameter.name for parameter in made.parameters} if isinstance(made, griffe.Function) else set()
        self._rewrite(cls, known | {name for name, member in cls.members.items() if member.is_attribute or member.is_function})

    def _rewrite(self, thing: griffe.Object, known: set[str]) -> None:
        if thing.docstring:
            thing.docstring.value = as_markdown(thing.docstring.value, known)
