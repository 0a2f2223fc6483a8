"""The methods, one file each. A new method is listed in METHODS, and the common tests and the command line find it there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from foveate.errors import FoveateError
from foveate.reducers.aim import AIM
from foveate.reducers.avgpool2d import AvgPool2d
from foveate.reducers.base import SAVED_NAME, Reducer, parse_with, save_reducers, visual_tokens
from foveate.reducers.cdpruner import CDPruner
from foveate.reducers.dart import DART
from foveate.reducers.divprune import DivPrune
from foveate.reducers.downsample import Downsample
from foveate.reducers.fastervlm import FasterVLM
from foveate.reducers.fastv import FastV
from foveate.reducers.fopru import FoPru
from foveate.reducers.hired import HiRED
from foveate.reducers.preparing import Preparing, before_processor, in_model, prepare
from foveate.reducers.pyramiddrop import PyramidDrop
from foveate.reducers.random import Random
from foveate.reducers.schedule import Schedule
from foveate.reducers.sparsevlm import SparseVLM
from foveate.reducers.tome import ToMe
from foveate.reducers.uniform import Uniform
from foveate.reducers.vcc import VCC
from foveate.reducers.visionzip import VisionZip

BASELINES = (Random, Uniform, AvgPool2d, Downsample)
PAPERS = (ToMe, FastV, VCC, HiRED, SparseVLM, PyramidDrop, FoPru, Schedule, FasterVLM, AIM, VisionZip, DART, DivPrune, CDPruner)  # by date
METHODS: dict[str, type[Reducer]] = {method.name: method for method in (*BASELINES, *PAPERS)}


def parse(text: str) -> list[Reducer]:
    """Reducers from their spelling, such as "vcc:layer=2,stride=8+random:keep=0.5"; "" and "none" give []."""
    return parse_with(text, METHODS)


def spell(reducers: Sequence[Reducer]) -> str:
    """The canonical spelling; `parse` reads it back."""
    return "+".join(str(r) for r in reducers) or "none"


def saved_reducers(model: str | Path) -> list[Reducer] | None:
    """The reducers that a model's `foveate.json` names, None where it has no such file.

    model: a folder, or the name of a model on the Hub (its main revision); without a connection the local cache is what there is.
    Raises FoveateError for a file that is not ours and for methods that are not known, or not at the version that was saved.
    """
    path = Path(model) / SAVED_NAME
    if not path.is_file():
        if not str(model) or Path(model).is_dir():
            return None
        quiet = {f"_raise_exceptions_for_{what}": False for what in ("gated_repo", "missing_entries", "connection_errors")}
        try:
            found = cached_file(str(model), SAVED_NAME, **quiet)
        except (OSError, ValueError):  # neither a folder nor what could be a name on the Hub
            found = None
        if found is None:
            return None
        path = Path(found)
    try:
        saved = [dict(options) for options in json.loads(path.read_text(encoding="utf-8"))["reducers"]]
    except (ValueError, KeyError, TypeError) as error:
        raise FoveateError(f"{path} is not a list of reducers as foveate writes it: {error}") from error
    return [_restored(options, path) for options in saved]


def _restored(options: dict[str, Any], path: Path) -> Reducer:
    name = options.get("method")
    if name not in METHODS:
        raise FoveateError(f"{path}: unknown reducer {name!r}; known are {', '.join(sorted(METHODS))}")
    method = METHODS[name]
    if options.get("version") != method.version:
        raise FoveateError(
            f"{path}: {method.name} was saved at version {options.get('version')}, this is version {method.version}; "
            "name the reducer yourself to use today's"
        )
    return method.from_dict(options)


def load_reducers(model: str | Path) -> list[Reducer]:
    """As `saved_reducers`. Raises FoveateError also when there are none."""
    found = saved_reducers(model)
    if found is None:
        name = str(model) or "the model"
        raise FoveateError(f"{name} has no {SAVED_NAME}: the model was not trained with a reducer; name one, as in attach(model, VCC())")
    return found


__all__ = [
    "AIM",
    "DART",
    "METHODS",
    "VCC",
    "AvgPool2d",
    "CDPruner",
    "DivPrune",
    "Downsample",
    "FastV",
    "FasterVLM",
    "FoPru",
    "HiRED",
    "Preparing",
    "PyramidDrop",
    "Random",
    "Reducer",
    "Schedule",
    "SparseVLM",
    "ToMe",
    "Uniform",
    "VisionZip",
    "before_processor",
    "in_model",
    "load_reducers",
    "parse",
    "prepare",
    "save_reducers",
    "saved_reducers",
    "spell",
    "visual_tokens",
]
