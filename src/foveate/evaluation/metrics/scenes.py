"""The embedded worlds' questions, on pictures and on clips, each scored by its family's rule; groups are the families.

The rules are plain on purpose and the same for every model and method:

- *exact*: prediction and answer are equal after `normalise` (case, white space, one final full stop);
- *yes/no*: strict, the normalised prediction is "yes" or "no" and is the answer; anything else is wrong (POPE's own script takes
  whatever is not a "no" for a "yes", which flatters a model that says yes too often);
- *box*: four location tokens `<locR0><locC0><locR1><locC1>`, the first and the last cell of the box on a 16-cell ruler, both included,
  rows first; right when the intersection over union with the answer's box is at least one half; malformed is wrong.

The figures for presence are those of POPE (arXiv 2305.10355). Intervals are Wilson's score intervals at 95 %: they take the questions as
independent draws, so several questions about one image make them somewhat too narrow.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import fsum

from foveate.errors import FoveateError
from foveate.evaluation.metrics.common import normalise, wilson
from foveate.evaluation.metrics.exact import exact_match
from foveate.evaluation.metrics.iou import IOU_THRESHOLD, iou
from foveate.evaluation.metrics.yes_no import pope, yes_no
from foveate.evaluation.samples import Metric, Sample, percent
from foveate.world.questions import RULER, BoxCells, box_cells


def yes_no_match(prediction: str, answer: str) -> bool:
    return yes_no(prediction) is not None and yes_no(prediction) == yes_no(answer)


def box_match(prediction: str, answer: str) -> bool:
    predicted, truth = box_cells(prediction), box_cells(answer)
    return predicted is not None and truth is not None and iou(predicted, truth) >= IOU_THRESHOLD


FAMILY_RULES: dict[str, Callable[[str, str], bool]] = {
    "presence": yes_no_match,
    "count": exact_match,
    "attribute": exact_match,
    "relation": exact_match,
    "reading": exact_match,
    "locating": box_match,
}
"""How each family about pictures is scored, in the order in which tables list them."""

MOVING_RULES: dict[str, Callable[[str, str], bool]] = {
    "event": exact_match,
    "order": yes_no_match,
    "motion": exact_match,
    "change": exact_match,
    "tally": exact_match,
    "presence": yes_no_match,
    "reading": exact_match,
}
"""Those about clips; two are of both."""

RULES = FAMILY_RULES | MOVING_RULES


@dataclass(frozen=True)
class Scenes(Metric):
    """The headline is the mean of the families' accuracies, each family counting the same."""

    name = "scenes"
    figure = "mean accuracy"
    new_tokens = 8

    def complete(self, sample: Sample) -> Sample:
        check_truth(sample.group, sample.answers[0], "metric scenes")
        return sample

    def score(self, prediction: str, sample: Sample) -> float:
        return float(RULES[sample.group](prediction, sample.answers[0]))

    def summary(self, samples: Sequence[Sample], predictions: Sequence[str], scores: Sequence[float]) -> dict[str, float]:
        families = {}
        for family in RULES:
            own = [score for sample, score in zip(samples, scores, strict=True) if sample.group == family]
            if own:
                families[f"accuracy/{family}"] = percent(own)
        return {self.figure: fsum(families.values()) / len(families), **families}


def check_truth(family: str, answer: str, where: str) -> None:
    """Refuse a question that no prediction could be scored against. `where` names the question in the message."""
    if family not in RULES:
        raise FoveateError(f"{where}: unknown family {family!r}; known: {', '.join(RULES)}")
    if not normalise(answer):
        raise FoveateError(f"{where}: the answer {answer!r} is empty")
    if not RULES[family](answer, answer):
        wanted = "yes or no" if RULES[family] is yes_no_match else f"a box like <loc0><loc0><loc7><loc7> (cells 0 to {RULER - 1})"
        raise FoveateError(f"{where}: the answer {answer!r} of family {family} is not {wanted}")


def majority(family: str, answers: Sequence[str]) -> tuple[str, float]:
    """The one constant answer, among `answers`, that scores best on `answers` itself, and its accuracy.

    Chosen with the truth in hand, so it is the strictest bar a constant can set. For locating it is the best constant box: the one that
    overlaps enough with the most answers. Ties go to the answer that sorts first.
    """
    if not answers:
        raise FoveateError(f"no answers of family {family!r} to take a majority of")
    matches = RULES[family]
    counts = Counter(normalise(answer) for answer in answers)
    if matches is not box_match:
        best = min(counts, key=lambda answer: (-counts[answer], answer))
        return best, counts[best] / len(answers)
    boxes = [(text, box_cells(text), count) for text, count in counts.items()]

    def hits(box: BoxCells | None) -> int:
        return sum(count for _, other, count in boxes if box and other and iou(box, other) >= IOU_THRESHOLD)

    score, text = min((-hits(box), text) for text, box, _ in boxes)
    return text, -score / len(answers)


@dataclass(frozen=True)
class FamilyScore:
    """Accuracy of one family with its 95 % interval and the majority answer beside it; `details` has the family's further figures."""

    n: int
    correct: int
    accuracy: float
    low: float
    high: float
    majority_answer: str
    majority_accuracy: float
    details: dict[str, float] = field(default_factory=dict)


def score_family(family: str, predictions: Sequence[str], answers: Sequence[str]) -> FamilyScore:
    """Score one family; the two lists run in parallel and are not empty.

    `details`: for presence POPE's figures, for locating the mean IoU (0 where the prediction is malformed) and the malformed ones.
    """
    matches = RULES[family]
    correct = sum(matches(prediction, answer) for prediction, answer in zip(predictions, answers, strict=True))
    constant, constant_accuracy = majority(family, answers)
    details: dict[str, float] = {}
    if matches is yes_no_match:
        figures = pope(predictions, answers)
        details = {name: getattr(figures, name) for name in ("precision", "recall", "f1", "yes_ratio", "unparsed")}
    elif matches is box_match:
        boxes = [(box_cells(prediction), box_cells(answer)) for prediction, answer in zip(predictions, answers, strict=True)]
        overlaps = [iou(box, truth) if box and truth else 0.0 for box, truth in boxes]
        details = {"mean_iou": sum(overlaps) / len(overlaps), "unparsed": sum(box is None for box, _ in boxes)}
    low, high = wilson(correct, len(answers))
    return FamilyScore(len(answers), correct, correct / len(answers), low, high, constant, constant_accuracy, details)
