"""Yes or no: POPE and MME, which read an answer each in their own way."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import fsum
from typing import Any

from foveate.errors import FoveateError
from foveate.evaluation.metrics.common import normalise, one_of
from foveate.evaluation.samples import Metric, Sample, percent, split


def yes_no(text: str) -> str | None:
    """The word yes or no if the normalised text is exactly that, else None."""
    plain = normalise(text)
    return plain if plain in ("yes", "no") else None


def llava(text: str) -> str:
    """LLaVA's script: "no" if No, no or not is a word before the first period, else "yes", whatever is said."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def strict(text: str) -> str:
    """lmms-eval: the answer is that one word but for case and white space around it ("yes." is neither); "" if neither."""
    plain = text.strip().lower()
    return plain if plain in ("yes", "no") else ""


def words(text: str) -> str:
    """VLMEvalKit: the one of the two that is among the words; "" if both or neither are."""
    found = {"yes", "no"} & set(re.findall(r"\w+", text.lower()))
    return found.pop() if len(found) == 1 else ""


def mme(text: str) -> str:
    """MME: periods dropped, the whole answer, else whichever stands in its first four letters; "" if neither does."""
    plain = text.lower().strip().replace(".", "")
    start = plain if plain in ("yes", "no") else plain[:4]
    return "yes" if "yes" in start else "no" if "no" in start else ""


PARSERS: dict[str, Callable[[str], str]] = {"llava": llava, "strict": strict, "words": words}


@dataclass(frozen=True)
class PopeFigures:
    """POPE's figures with "yes" as the positive class.

    A prediction that is neither yes nor no is wrong: a missed "yes" where the truth is yes, and neither a positive nor a true negative
    where it is no. `yes_ratio` is the share of "yes" among the predictions. A share of nothing (no "yes" predicted) is 0.
    """

    accuracy: float
    precision: float
    recall: float
    f1: float
    yes_ratio: float
    unparsed: int


def pope(predictions: Sequence[str], answers: Sequence[str]) -> PopeFigures:
    """POPE's figures for yes/no questions; the two lists run in parallel and are not empty."""
    if len(predictions) != len(answers) or not answers:
        raise FoveateError(f"POPE figures need as many predictions as answers, and some: {len(predictions)} and {len(answers)}")
    said = [yes_no(prediction) for prediction in predictions]
    truth = [yes_no(answer) for answer in answers]
    pairs = Counter(zip(said, truth, strict=True))
    hits, right_no = pairs["yes", "yes"], pairs["no", "no"]
    positives, truly_yes = said.count("yes"), truth.count("yes")
    precision = hits / positives if positives else 0.0
    recall = hits / truly_yes if truly_yes else 0.0
    return PopeFigures(
        accuracy=(hits + right_no) / len(answers),
        precision=precision,
        recall=recall,
        f1=2 * precision * recall / (precision + recall) if hits else 0.0,
        yes_ratio=positives / len(answers),
        unparsed=said.count(None),
    )


def _complete(sample: Sample) -> Sample:
    if yes_no(sample.answers[0]) is None:
        raise FoveateError(f"its answer must be yes or no, found {sample.answers[0]!r}")
    return sample


@dataclass(frozen=True)
class Pope(Metric):
    """POPE (arXiv 2305.10355). Groups are its splits; all figures but those with a split's name are over all questions.

    Papers report the accuracy, or the F1, averaged over the splits: that is `mean f1` here. `yes_ratio` is that of the predictions.
    """

    parse: str = "llava"
    name = "pope"

    def __post_init__(self) -> None:
        one_of(self.name, "parse", self.parse, PARSERS)

    def complete(self, sample: Sample) -> Sample:
        return _complete(sample)

    def score(self, prediction: str, sample: Sample) -> float:
        return float(PARSERS[self.parse](prediction) == yes_no(sample.answers[0]))

    def summary(self, samples: Sequence[Sample], predictions: Sequence[str], scores: Sequence[float]) -> dict[str, float]:
        pairs = [(PARSERS[self.parse](text), sample.answers[0]) for text, sample in zip(predictions, samples, strict=True)]
        whole = _figures(pairs)
        splits = {group: _figures(own) for group, own in split(samples, pairs).items()}
        if splits:
            whole["mean f1"] = fsum(own["f1"] for own in splits.values()) / len(splits)
        return whole | {f"{figure}/{group}": own[figure] for group, own in splits.items() for figure in ("accuracy", "f1", "yes_ratio")}


def _figures(pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
    found = pope([said for said, _ in pairs], [truth for _, truth in pairs])
    shares = {name: 100 * float(getattr(found, name)) for name in ("accuracy", "f1", "precision", "recall", "yes_ratio")}
    return shares | {"unparsed": 100 * found.unparsed / len(pairs)}


PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "ocr")
COGNITION = ("commonsense", "numerical", "translation", "code")


@dataclass(frozen=True)
class Mme(Metric):
    """MME (arXiv 2306.13394): two questions about each image; groups are its subtasks.

    accuracy   of the questions
    accuracy+  the share of images with both right
    score      the sum of the two, summed over the subtasks: at most 200 each, 2000 for perception, 800 for cognition
    """

    name = "mme"

    def complete(self, sample: Sample) -> Sample:
        return _complete(sample)

    def arrange(self, samples: list[Sample]) -> list[Sample]:
        count = Counter(_image(sample) for sample in samples)
        for sample in samples:
            if count[_image(sample)] != 2:
                raise FoveateError(
                    f"MME asks two questions about each image, and {count[_image(sample)]} about that of sample {sample.id}; "
                    "give both (an even limit= keeps them together)"
                )
        return samples

    def score(self, prediction: str, sample: Sample) -> float:
        return float(mme(prediction) == yes_no(sample.answers[0]))

    def summary(self, samples: Sequence[Sample], predictions: Sequence[str], scores: Sequence[float]) -> dict[str, float]:
        pairs: dict[Any, list[float]] = {}
        for sample, score in zip(samples, scores, strict=True):
            pairs.setdefault(_image(sample), []).append(score)
        tasks: dict[str, list[list[float]]] = {}
        for (group, _), pair in pairs.items():
            tasks.setdefault(group, []).append(pair)
        figures = {group: _accuracies(own) for group, own in sorted(tasks.items())}
        points = {group: fsum(figure) for group, figure in figures.items()}
        accuracy, both = _accuracies(list(pairs.values()))
        told = {"accuracy": accuracy, "accuracy+": both, "score": fsum(points.values())}
        perception = [group for group in points if group.lower() in PERCEPTION]
        cognition = [group for group in points if any(word in group.lower() for word in COGNITION)]
        for part, names in (("perception", perception), ("cognition", cognition)):
            if names:
                told[part] = fsum(points[group] for group in names)
        if len(tasks) > 1:
            for group, (single, double) in figures.items():
                told |= {f"accuracy/{group}": single, f"accuracy+/{group}": double, f"score/{group}": points[group]}
        return told


def _image(sample: Sample) -> tuple[str, Any]:
    return sample.group, sample.images


def _accuracies(pairs: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Of questions and of images, in percent."""
    return percent(score for pair in pairs for score in pair), percent(float(min(pair) == 1) for pair in pairs)
