"""ChartQA's relaxed accuracy (arXiv 2203.10244), as lmms-eval computes it."""

from __future__ import annotations

from dataclasses import dataclass

from foveate.evaluation.samples import Metric, Sample

TOLERANCE = 0.05


def number(text: str) -> float | None:
    """A number as Python reads one ("nan" and "inf" among them), "%" or several behind it meaning hundredths; None for anything else,
    "1,000" among it."""
    try:
        return float(text.rstrip("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return None


def relaxed(prediction: str, answer: str) -> bool:
    """Numbers may be 5 % off, unless 0 is wanted; anything else must be equal but for case. What reads as "nan" or as an infinite number
    ("inf", "1e999") is near no number, not even itself."""
    prediction, answer = prediction.strip(), answer.strip()
    said, truth = number(prediction), number(answer)
    if said is not None and truth:
        return abs(said - truth) / abs(truth) <= TOLERANCE  # in plain floats, as lmms-eval does: 1.05 for 1 is just outside
    return prediction.lower() == answer.lower()


@dataclass(frozen=True)
class Relaxed(Metric):
    """Groups are the human and the machine-made questions."""

    name = "relaxed"
    figure = "relaxed accuracy"

    def score(self, prediction: str, sample: Sample) -> float:
        return float(any(relaxed(prediction, answer) for answer in sample.answers))
