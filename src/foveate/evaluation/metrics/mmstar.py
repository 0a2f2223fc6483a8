"""MMStar (arXiv 2403.20330), and its two figures for what a benchmark and a model owe to the images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum

from foveate.evaluation.metrics.choice import Choice
from foveate.evaluation.samples import Sample, by_group, percent


@dataclass(frozen=True)
class MMStar(Choice):
    """Groups are its capabilities, or with `group=l2_category` its 18 axes; lmms-eval's headline is the `mean of groups` of those."""

    rule: str = "mmstar"
    name = "mmstar"

    def summary(self, samples: Sequence[Sample], predictions: Sequence[str], scores: Sequence[float]) -> dict[str, float]:
        groups = by_group("accuracy", samples, scores)
        mean = {"mean of groups": fsum(groups.values()) / len(groups)} if groups else {}
        return {"accuracy": percent(scores), **mean, **groups}


def multimodal_gain(seeing: float, blind: float) -> float:
    """What the images bring: a model's score with them less its score without. Where it is small, no loss can show."""
    return seeing - blind


def multimodal_leakage(blind: float, text_only: float) -> float:
    """What training on images and texts gave away: the score without images beyond that of the language model it was made from."""
    return max(0.0, blind - text_only)
