"""The presets of a model, with what speaks for them, as `foveate presets` prints them."""

from __future__ import annotations

import json as json_module
import sys
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table
from transformers import AutoConfig

import foveate.model  # noqa: F401  # registers its Auto classes
from foveate.anatomy import TESTED
from foveate.model.weights import reading
from foveate.presets import NEUTRAL, PREFIX, Preset, known, presets
from foveate.world import resolve


def main(model: str | None, *, json: bool = False) -> None:
    """Prints the presets of a model (a folder, a hub name, "asset:vlm", or a model type), of all families without one."""
    of = [*known(), NEUTRAL] if model is None else [model_type(model)]
    found = [preset for name in of for preset in presets(name).values() if model is not None or preset.family == name]
    if json:
        print(json_module.dumps([asdict(preset) for preset in found], indent=1))
        return
    console = Console(width=None if sys.stdout.isatty() else 170)
    console.print(_table(found), markup=False)
    if model is None:
        return
    console.print(f'\nattach(model, "{PREFIX}{found[0].name}") takes one by its name.', markup=False)
    lent = [preset.name for preset in found if preset.family == NEUTRAL]
    if lent:
        console.print(
            f"Nothing is known of how {', '.join(lent)} do on models of type {of[0]!r}: they are the neutral ones, measured on asset:vlm. "
            "`foveate bench` measures them on yours, `foveate search` finds a schedule for it.",
            markup=False,
        )


def model_type(model: str) -> str:
    """The type of a model: of a folder or a hub name what its configuration says; a type that is tested stands for itself."""
    if model in TESTED and not Path(model).is_dir():
        return model
    with reading(f"cannot read the configuration of {model}, which is no tested model type either"):
        return str(AutoConfig.from_pretrained(resolve(model)).model_type)


def _table(found: list[Preset]) -> Table:
    table = Table("preset", "of", "reducers", "measured by", "evidence", box=None, pad_edge=False)
    for preset in found:
        table.add_row(preset.name, preset.family, preset.reduce, preset.by, preset.evidence)
    return table
