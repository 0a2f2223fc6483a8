"""Boxes: right when intersection over union with the reference is at least one half (RefCOCO and its kin).

Models write boxes in different numbers, and which ones is not seen from the numbers: 400 is thousandths in one model and a pixel in
another. So `format` must be said.

    fractions    of width and height, 0 to 1
    padded       fractions of the square that the image is padded to, evenly on both sides
    hundredths   0 to 100
    thousandths  0 to 1000
    pixels       of the image as it is in the data set (not of what a model makes of it before it looks)
    guess        at most 1.5: fractions; at most 1000: thousandths; else pixels. Pixels of small images are misread this way.

A prediction is its first four numbers within one pair of brackets, [x1, y1, x2, y2] or <x1><y1><x2><y2>, else its first four numbers.
`truth` is the format of the references (default: that of the predictions), and `corners=xywh` says that they give width and height in
place of the second corner.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from foveate.errors import FoveateError
from foveate.evaluation.metrics.common import one_of
from foveate.evaluation.samples import Metric, Sample, percent

IOU_THRESHOLD = 0.5
Edges = tuple[float, float, float, float]

FORMATS = {"fractions": 1.0, "padded": 1.0, "hundredths": 100.0, "thousandths": 1000.0, "pixels": 0.0, "guess": 0.0}
"""Every format with what the image's far edge is in it; 0 where that is not a constant."""
_ROUNDING = 1e-9  # an overlap of one half stays one half when fractions become pixels

_NUMBER = r"(-?(?:\d+\.?\d*|\.\d+))"
_FOUR = re.compile(r"[\[({<]\s*" + r"[\s,;<>()\[\]]+".join([_NUMBER] * 4) + r"\s*[\])}>]")


def iou(a: Edges, b: Edges) -> float:
    """Intersection over union of two half-open boxes, in any unit, that are not both empty."""
    height = min(a[2], b[2]) - max(a[0], b[0])
    width = min(a[3], b[3]) - max(a[1], b[1])
    common = max(0, height) * max(0, width)
    area_a = (a[2] - a[0]) * (a[3] - a[1])
    area_b = (b[2] - b[0]) * (b[3] - b[1])
    return common / (area_a + area_b - common)


def four_numbers(text: str) -> Edges | None:
    """The first bracketed four numbers, else the first four, else None."""
    match = _FOUR.search(text)
    found = match.groups() if match else re.findall(_NUMBER, text)[:4]
    if len(found) < 4:
        return None
    a, b, c, d = (float(number) for number in found)
    return a, b, c, d


def to_pixels(numbers: Edges, form: str, size: tuple[int, int]) -> Edges:
    """(x1, y1, x2, y2) of a format as pixels of an image of `size` (width, height): corners put in order, cut off at the edges."""
    width, height = size
    if form == "guess":
        form = "fractions" if max(numbers) <= 1.5 else "thousandths" if max(numbers) <= 1000 else "pixels"
    across, down, left, top = float(width), float(height), 0, 0
    if form == "padded":
        side = max(size)
        across, down, left, top = float(side), float(side), (side - width) // 2, (side - height) // 2
    unit = FORMATS[form]
    across, down = (across / unit, down / unit) if unit else (1.0, 1.0)
    x = sorted(min(max(value * across - left, 0.0), float(width)) for value in numbers[::2])
    y = sorted(min(max(value * down - top, 0.0), float(height)) for value in numbers[1::2])
    return x[0], y[0], x[1], y[1]


@dataclass(frozen=True)
class Iou(Metric):
    """See the module. `mean_iou` counts 0 where there are no four numbers, and `unparsed` is the share of those."""

    format: str = ""
    truth: str = ""
    corners: str = "xyxy"
    name = "iou"
    new_tokens = 64
    needs_size = True

    def __post_init__(self) -> None:
        if not self.format:
            raise FoveateError(f"metric iou: say in which numbers the model writes its boxes: format= one of {', '.join(FORMATS)}")
        one_of(self.name, "format", self.format, FORMATS)
        one_of(self.name, "truth", self.truth or self.format, FORMATS)
        one_of(self.name, "corners", self.corners, ("xyxy", "xywh"))

    def references(self, value: Any) -> tuple[str, ...]:
        """Four numbers in a list are one box."""
        if isinstance(value, list | tuple) and len(value) == 4 and all(isinstance(number, int | float) for number in value):
            return (str(list(value)),)
        return super().references(value)

    def complete(self, sample: Sample) -> Sample:
        if "size" not in sample.extra:
            raise FoveateError("has no image, and a box needs its size")
        for answer in sample.answers:
            box = self._box(answer, sample)
            if box is None or box[0] == box[2] or box[1] == box[3]:
                raise FoveateError(f"its answer {answer!r} is no box within the image, read as {self.truth or self.format}")
        return sample

    def _box(self, answer: str, sample: Sample) -> Edges | None:
        numbers = four_numbers(answer)
        if numbers is None:
            return None
        if self.corners == "xywh":
            x, y, width, height = numbers
            numbers = x, y, x + width, y + height
        return to_pixels(numbers, self.truth or self.format, sample.extra["size"])

    def overlap(self, prediction: str, sample: Sample) -> float | None:
        """IoU with the nearest reference; None where the prediction is no box."""
        numbers = four_numbers(prediction)
        if numbers is None:
            return None
        said = to_pixels(numbers, self.format, sample.extra["size"])
        return max(iou(said, truth) for answer in sample.answers if (truth := self._box(answer, sample)))

    def score(self, prediction: str, sample: Sample) -> float:
        found = self.overlap(prediction, sample)
        return float(found is not None and found >= IOU_THRESHOLD - _ROUNDING)

    def summary(self, samples: Sequence[Sample], predictions: Sequence[str], scores: Sequence[float]) -> dict[str, float]:
        overlaps = [self.overlap(prediction, sample) for prediction, sample in zip(predictions, samples, strict=True)]
        told = super().summary(samples, predictions, scores)
        shares = {"mean_iou": percent(found or 0.0 for found in overlaps), "unparsed": percent(float(found is None) for found in overlaps)}
        return {self.figure: told.pop(self.figure), **shares, **told}
