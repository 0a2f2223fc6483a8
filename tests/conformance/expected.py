"""What comes of each cell, as committed in expected.json: what serves has to go on serving, and what refuses to refuse for its reason.

    cells   variant -> method -> a word for each check ("ok ok ok merges ok ok"), or one where all are the same
    scores  variant -> reducers -> a word: whether the cost of their scores was compared
    bare    variant -> check -> what is wrong with the bare model

A word is "ok", the name of a refusal's `Reason`, "merges", "recurs" or "tower" where masking says nothing, or "bare" where the bare model
fails.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers

from foveate.errors import Reason
from tests.conformance.checks import CHECKS, MERGES, RECURS, TOWER

PATH = Path(__file__).parent / "expected.json"
WORDS = {MERGES: "merges", RECURS: "recurs", TOWER: "tower"} | {str(reason): reason.name for reason in Reason}
REASONS = {word: reason for reason, word in WORDS.items()}
HOW = "python -m pytest -n 2 tests/conformance --whole --table docs/conformance.md"


def read() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(PATH.read_text(encoding="utf-8"))
    return found


DATA = read() if PATH.is_file() else {"versions": {}, "cells": {}, "scores": {}, "bare": {}}


def words(cell: str) -> dict[str, str]:
    """Check -> word."""
    each = cell.split()
    return dict(zip(CHECKS, each * len(CHECKS) if len(each) == 1 else each, strict=True))


def differs(name: str, method: str, check: str, word: str) -> str:
    """What is wrong with the outcome of a cell's check; "" where it is the committed one."""
    cell = DATA["cells"].get(name, {}).get(method)
    return _differs(f"{name}, {method}, {check}", None if cell is None else words(cell)[check], word)


def differs_scores(name: str, reducers: str, word: str) -> str:
    """The same of the cost of a method's scores."""
    return _differs(f"{name}, {reducers}, scores", DATA["scores"].get(name, {}).get(reducers), word)


def _differs(what: str, wanted: str | None, word: str) -> str:
    if word == wanted:
        return ""
    committed = "no outcome is committed" if wanted is None else f"{wanted} is committed"
    return f"{what}: {word}, where {committed}; if it has to change, {HOW} rewrites {PATH.name} and the page"


def update(cells: dict[tuple[str, str, str], str], scores: dict[tuple[str, str], str], bare: dict[tuple[str, str], str]) -> dict[str, Any]:
    """Writes what a run has found over what was known: of a run of some families or methods, theirs alone; of one that was stopped, the
    cells that were finished. Returns all of it."""
    data = read() if PATH.is_file() else {"versions": {}, "cells": {}, "scores": {}, "bare": {}}
    for name, method in {(name, method) for name, method, _ in cells}:
        each = [cells.get((name, method, check), "") for check in CHECKS]
        if all(each):
            data["cells"].setdefault(name, {})[method] = each[0] if len(set(each)) == 1 else " ".join(each)
    for (name, reducers), word in scores.items():
        data["scores"].setdefault(name, {})[reducers] = word
    for name, check in {(name, check) for name, _, check in cells}:
        data["bare"].setdefault(name, {}).pop(check, None)
        if (name, check) in bare:
            data["bare"][name][check] = bare[name, check]
    data["bare"] = {name: checks for name, checks in data["bare"].items() if checks}
    data["versions"] = {"torch": torch.__version__.partition("+")[0], "transformers": transformers.__version__}
    PATH.write_text(json.dumps(data, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    return data
