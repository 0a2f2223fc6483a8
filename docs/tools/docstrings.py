"""Docstrings as this project writes them, as Markdown: a line "name: what it is" or "name   what it is" is an entry of a list."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

_ENTRY = re.compile(r"^ *(?P<names>[a-z_][\w.]*(?:, [a-z_][\w.]*)*)(?:: | {2,})(?P<text>\S.*)$")


def markdown(text: str) -> str:
    """The docstring with its entries as lists; indented blocks stay, they are code."""
    out: list[str] = []
    inside = False
    for line in text.splitlines():
        entry = _ENTRY.match(line) if not line.startswith("    ") else None
        if entry is not None:
            if not inside and out and out[-1].strip():
                out.append("")
            names = ", ".join(f"`{name}`" for name in entry["names"].split(", "))
            out.append(f"- {names}: {entry['text']}")
            inside = True
        elif inside and line.startswith("  ") and line.strip():
            out.append(f"  {line.strip()}")
        else:
            if inside and line.strip():
                out.append("")
            inside = False
            out.append(line)
    return "\n".join(out)


class Entries(Extension):
    """Rewrites every docstring as it is read."""

    def on_instance(self, *, obj: Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)
