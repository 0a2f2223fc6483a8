"""ANLS, average normalised Levenshtein similarity (arXiv 1905.13648): DocVQA and InfoVQA."""

from __future__ import annotations

from dataclasses import dataclass

from foveate.evaluation.metrics.common import one_of
from foveate.evaluation.samples import Metric, Sample


def edit_distance(a: str, b: str) -> int:
    """Levenshtein's: the least number of letters inserted, deleted and replaced that make `b` of `a`."""
    above = list(range(len(b) + 1))
    for i, left in enumerate(a, start=1):
        row = [i]
        for j, right in enumerate(b, start=1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (left != right)))
        above = row
    return above[-1]


def similarity(prediction: str, answer: str, length: str = "raw") -> float:
    """1 - distance / length of the longer text; 0 if below one half. Case and runs of white space do not count for the distance.

    length: "raw" takes the lengths of the texts as they are, as lmms-eval and VLMEvalKit do, "collapsed" without such runs.
    """
    plain, wanted = " ".join(prediction.lower().split()), " ".join(answer.lower().split())
    longest = max(len(prediction), len(answer)) if length == "raw" else max(len(plain), len(wanted))
    if longest == 0:
        return 1.0
    alike = longest - edit_distance(plain, wanted)
    return alike / longest if 2 * alike >= longest else 0.0


@dataclass(frozen=True)
class Anls(Metric):
    """The similarity to the nearest reference."""

    length: str = "raw"
    name = "anls"
    figure = "anls"
    new_tokens = 32

    def __post_init__(self) -> None:
        one_of(self.name, "length", self.length, ("raw", "collapsed"))

    def score(self, prediction: str, sample: Sample) -> float:
        return max(similarity(prediction, answer, self.length) for answer in sample.answers)
