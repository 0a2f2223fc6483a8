"""Presets: for a family of models the methods, layers, positions and budgets that measurements speak for, with these beside them.

    foveate.attach(model, "preset:balanced")

A family is one TOML file here, named after its model type; a table of it is a preset:

    [balanced]
    reduce = "divprune:keep=0.2222"          # a spelling, see foveate.reducers.parse
    by = "others"                            # who measured: "others" than the method's authors, its "authors", or "here"
    evidence = "what was measured, on which model, by whom"

`neutral.toml` holds for models of which nothing is known, and lends a family the presets that it has no evidence for.
"""

from __future__ import annotations

import functools
import tomllib
from dataclasses import dataclass
from pathlib import Path

from foveate.errors import FoveateError, nearest
from foveate.reducers import parse, spell

FOLDER = Path(__file__).parent
NEUTRAL = "neutral"
PREFIX = "preset:"
BY = ("others", "authors", "here")


@dataclass(frozen=True)
class Preset:
    """A setting with the reason for it.

    name      "balanced"
    family    the model type whose file it is from, or "neutral"
    reduce    the canonical spelling of its reducers
    by        who measured, one of BY
    evidence  what was measured
    """

    name: str
    family: str
    reduce: str
    by: str
    evidence: str


def known() -> tuple[str, ...]:
    """The model types of which something is known."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.toml") if path.stem != NEUTRAL))


def presets(model_type: str) -> dict[str, Preset]:
    """The presets of a model type by name; those of its own file go before the neutral ones."""
    own = read_presets(FOLDER / f"{model_type}.toml") if model_type in known() else {}
    return {**read_presets(FOLDER / f"{NEUTRAL}.toml"), **own}


def resolved(text: str, model_type: str) -> str:
    """The spelling of the reducers that "preset:name" means for a model type; any other text as it is. FoveateError for a preset that
    there is not."""
    if not text.strip().startswith(PREFIX):
        return text
    name, there = text.strip().removeprefix(PREFIX), presets(model_type)
    if name not in there:
        raise FoveateError(
            f"there is no preset {name!r}{nearest(name, there)} for a model of type {model_type!r}; there are {', '.join(there)}. "
            "A preset stands alone: to add to it, write out what `foveate presets` shows"
        )
    return there[name].reduce


@functools.cache
def read_presets(path: Path) -> dict[str, Preset]:
    """The presets of a file. FoveateError where a table is not one."""
    found = {}
    for name, table in tomllib.loads(path.read_text(encoding="utf-8")).items():
        if not isinstance(table, dict) or table.keys() != {"reduce", "by", "evidence"} or table["by"] not in BY or not table["evidence"]:
            raise FoveateError(f"{path.name}: [{name}] needs reduce, by ({', '.join(BY)}) and evidence, and nothing else")
        found[name] = Preset(name, path.stem, spell(parse(table["reduce"])), table["by"], " ".join(table["evidence"].split()))
    return found
