"""The methods, one file each. A new method is listed in METHODS, and the common tests and the command line find it there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

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


def load_reducers(folder: Path) -> list[Reducer]:
    """The reducers saved beside a model's weights. Raises FoveateError when there are none or a method is not known."""
    path = folder / SAVED_NAME
    if not path.is_file():
        raise FoveateError(f"{folder} has no {SAVED_NAME}: the model was not trained with a reducer; name one, as in attach(model, VCC())")
    found = []
    for options in json.loads(path.read_text())["reducers"]:
        if options.get("method") not in METHODS:
            raise FoveateError(f"{path}: unknown reducer {options.get('method')!r}; known are {', '.join(sorted(METHODS))}")
        method = METHODS[options["method"]]
        if options.get("version") != method.version:
            raise FoveateError(
                f"{path}: {method.name} was saved at version {options.get('version')}, this is version {method.version}; "
                "name the reducer yourself to use today's"
            )
        found.append(method.from_dict(options))
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
    "spell",
    "visual_tokens",
]
