"""The demo's first part: a finished model on fewer visual tokens, from the folder of a bench run on one task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from foveate.errors import FoveateError
from foveate.evaluation.cells import load_bench
from foveate.report.compared import cheapest, told_from_random
from foveate.report.examples import pictures_of
from foveate.report.frontier import looks, page_svg
from foveate.report.parts import BASELINE_NAMES, Part, answered, part_of, source_of
from foveate.report.results import panels, results


def finished(folder: str | Path, scenes: int, progress: bool = True) -> dict[str, Any]:
    """What the page shows of the bench run in `folder`, its first task: plots, a table, drawings of `scenes` questions, and what they say.

    FoveateError where there is no such run, or the bare model has not answered."""
    bench = load_bench(folder)
    described = next((task for task in bench.meta["tasks"] if answered(bench, task["name"])), None)
    if described is None:
        raise FoveateError(f"{bench.folder}: the bare model has not answered any task yet; run the same command to go on")
    part = part_of(bench, described, progress)
    methods = looks(sorted({line.method for line in part.lines}, key=lambda name: (name not in BASELINE_NAMES, name)), BASELINE_NAMES)
    pictures, about = pictures_of([part], source_of(bench, None, None), scenes, by_budget=True)
    answers = part.bare.cells[0].answers
    counted = sum(answer.group in part.counted for answer in answers)
    return {
        "model": str(bench.meta["model"]),
        "command": str(bench.meta["command"]),
        "questions": f"{counted:,}",
        "images": f"{len({answer.image for answer in answers}):,}",
        "families": ", ".join(family.name for family in part.families if family.name in part.counted),
        "bare": f"{part.bare.value:.1f}",
        "tokens": f"{part.bare.tokens:.4g}",
        "methods": methods,
        "findings": findings(part),
        "plots": [page_svg(panel, methods, f"finished{number}") for number, panel in enumerate(panels(part))],
        "results": results(part),
        "pictures": pictures,
        "pictures_about": about,
    }


def findings(part: Part) -> list[str]:
    """What the run says: which methods differ from random, and what loses nothing for sure."""
    return [told_from_random(part.lines, part.counted), cheapest(part.bare, part.lines)]
