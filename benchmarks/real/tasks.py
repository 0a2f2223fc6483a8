"""Questions about real pictures as tasks of `foveate bench`, and what a model has answered of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foveate.evaluation.cells import Bench, Cell
from foveate.evaluation.evaluate import Result, Verdict
from foveate.evaluation.metrics.common import wilson
from foveate.evaluation.metrics.scenes import FamilyScore
from foveate.real.questions import FAMILIES, METRICS

RIGHT = 0.5  # of a score: half of the letters, half of the box


@dataclass(frozen=True)
class Asked:
    """One file of questions: `data`/test/`split`-`family`.json."""

    data: Path
    split: str
    family: str

    @property
    def name(self) -> str:
        return f"{self.split}-{self.family}"

    @property
    def file(self) -> Path:
        return self.data / "test" / f"{self.name}.json"

    @property
    def task(self) -> str:
        """As `foveate bench` spells it."""
        return f"{self.file}:metric={METRICS[self.family]},images={self.data / 'images'}"

    def constant(self) -> tuple[str, float]:
        """The best constant answer, and the share that it gets right."""
        told = summary(self.data)["splits"][self.split]["questions"][self.family]
        return str(told["constant"]), float(told["right"])


def summary(data: Path) -> dict[str, Any]:
    """real.json."""
    found: dict[str, Any] = json.loads((data / "real.json").read_text(encoding="utf-8"))
    return found


def asked(data: Path, splits: Sequence[str] = ()) -> list[Asked]:
    """All files of questions, of these splits if any are named, in the order of splits and families."""
    every = [Asked(data, split, family) for split in summary(data)["splits"] for family in FAMILIES]
    return [one for one in every if one.file.is_file() and (not splits or one.split in splits)]


def score(cell: Cell, constant: tuple[str, float]) -> FamilyScore:
    """Of the answers to one file, those that are right, beside the best constant one."""
    right = sum(answer.score >= RIGHT for answer in cell.answers)
    low, high = wilson(right, len(cell.answers))
    return FamilyScore(len(cell.answers), right, right / len(cell.answers), low, high, *constant)


def result(found: Bench, files: Sequence[Asked], model: str) -> Result:
    """What the bare model has answered of the files of one split, as an evaluation."""
    families, rows = {}, []
    for one in files:
        cell = found.bare(one.name)
        families[one.family] = score(cell, one.constant())
        questions = {row["id"]: row for row in json.loads(one.file.read_text(encoding="utf-8"))}
        for answer in cell.answers:
            row = questions[answer.id]
            truth = (row["question"], row["answers"][0], answer.prediction)
            rows.append(Verdict(answer.id, str(row["image"]), one.family, *truth, answer.score >= RIGHT))
    cells = [found.bare(one.name) for one in files]
    tokens = sum(cell.mean_tokens * len(cell.answers) for cell in cells) / len(rows)
    return Result(model, str(files[0].data), "none", False, tokens, None, sum(cell.seconds for cell in cells), families, rows)
