"""Griffe extension: the docstrings' "name: meaning" lines become lists with types and defaults, so that the reference is readable.

A docstring here is prose; parameters and fields stand as `name: meaning`, continued on indented lines, and errors as "Raises: …". Types and
defaults come from the signature.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import griffe

NAMES = re.compile(r"^(?P<names>[a-z_]\w*(?:, [a-z_]\w*)*): (?P<meaning>.*)$", re.DOTALL)


def as_markdown(text: str, known: Collection[str]) -> str:
    """The docstring with a list item per parameter or field. known: the names that are parameters or fields of the object; as a mapping,
    with what to say of each beside its name."""
    says: Mapping[str, str] = known if isinstance(known, Mapping) else {}
    items: list[str] = []
    for line in _joined(text.split("\n")):
        for part in _parts(line, known):
            found = NAMES.match(part)
            if found and set(found["names"].split(", ")) <= set(known):
                names = ", ".join(f"`{name}`{says.get(name, '')}" for name in found["names"].split(", "))
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


def _parts(line: str, known: Collection[str]) -> list[str]:
    """A line that explains several names, "steps: at most. seed: …", as one part for each; and errors by themselves."""
    if not known:
        return [line]
    names = "|".join(sorted(known, key=len, reverse=True))
    return re.split(rf"(?<=[.;]) (?=(?:{names})(?:, (?:{names}))*: |(?:Raises: |Returns ))", line)


def typed(parameter: griffe.Parameter) -> str:
    """A parameter's type, without the None of a default None, and its default: " (`int`, default `64`)"."""
    kind = str(parameter.annotation or "").removesuffix(" | None") if parameter.default == "None" else str(parameter.annotation or "")
    said = [f"`{kind}`"] * bool(kind) + [f"default `{parameter.default}`"] * (parameter.default is not None)
    return f" ({', '.join(said)})" if said else ""


class Docstrings(griffe.Extension):
    """Rewrites docstrings of functions and classes."""

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        self._rewrite(func, {parameter.name: typed(parameter) for parameter in func.parameters})

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        made = cls.members.get("__init__")
        known = {parameter.name: typed(parameter) for parameter in made.parameters} if isinstance(made, griffe.Function) else {}
        fields = {name: "" for name, member in cls.members.items() if member.is_attribute or member.is_function}
        self._rewrite(cls, fields | known)

    def _rewrite(self, thing: griffe.Object, known: Mapping[str, str]) -> None:
        if thing.docstring:
            thing.docstring.value = as_markdown(thing.docstring.value, known)
