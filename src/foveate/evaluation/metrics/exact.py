"""Short answers that are right or wrong as a whole."""

from __future__ import annotations

import string
from dataclasses import dataclass

from foveate.evaluation.metrics.common import normalise
from foveate.evaluation.samples import Metric, Sample

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def exact_match(prediction: str, answer: str) -> bool:
    return normalise(prediction) == normalise(answer)


@dataclass(frozen=True)
class Exact(Metric):
    """Equal to one of the references but for case, white space and one final full stop."""

    name = "exact"

    def score(self, prediction: str, sample: Sample) -> float:
        return float(any(exact_match(prediction, answer) for answer in sample.answers))


@dataclass(frozen=True)
class Gqa(Metric):
    """GQA (arXiv 1902.09506): equal to the reference but for case and punctuation."""

    name = "gqa"

    def score(self, prediction: str, sample: Sample) -> float:
        return float(any(_bare(prediction) == _bare(answer) for answer in sample.answers))


def _bare(text: str) -> str:
    return " ".join(text.lower().translate(_NO_PUNCTUATION).split())
