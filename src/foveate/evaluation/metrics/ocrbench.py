"""OCRBench (arXiv 2305.07895): the answer must hold a reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum

from foveate.errors import FoveateError
from foveate.evaluation.samples import Metric, Sample


@dataclass(frozen=True)
class OCRBench(Metric):
    """One point a question, 1,000 in all. `formulas` is the group in which case counts and spaces do not; elsewhere it is the other way.

    Groups are the ten kinds of question; in the published data their column is `question_type`."""

    formulas: str = "Handwritten Mathematical Expression Recognition"
    name = "ocrbench"
    new_tokens = 128

    def complete(self, sample: Sample) -> Sample:
        if not all(answer.strip() for answer in sample.answers):
            raise FoveateError("one of its answers is empty, and any prediction would hold it")
        return sample

    def score(self, prediction: str, sample: Sample) -> float:
        formula = sample.group.lower() == self.formulas.lower()
        return float(any(_plain(answer, formula) in _plain(prediction, formula) for answer in sample.answers))

    def summary(self, samples: Sequence[Sample], predictions: Sequence[str], scores: Sequence[float]) -> dict[str, float]:
        told = super().summary(samples, predictions, scores)
        return {self.figure: told.pop(self.figure), "points": fsum(scores), **told}


def _plain(text: str, formula: bool) -> str:
    text = text.strip().replace("\n", " ")
    return text.replace(" ", "") if formula else text.lower()
