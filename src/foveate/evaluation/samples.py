"""What is asked and how it is scored: the nouns that metrics, tasks and their readers share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import fsum
from typing import Any, ClassVar

from foveate.data.footage import Footage
from foveate.data.pixels import Picture
from foveate.errors import FoveateError


@dataclass(frozen=True)
class Sample:
    """One question.

    id        unique within its task
    images    what `foveate.data.pixels.open_image` opens; may be empty
    question  the prompt's text, suffix included; it holds no marker, or one for each image and clip
    answers   the references, at least one
    group     family, category or subtask, for tables
    extra     what the metric needs beside: options, the question that a rotation belongs to, the image's size
    clips     films of which frames are shown
    """

    id: str
    images: tuple[Picture, ...]
    question: str
    answers: tuple[str, ...]
    group: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)
    clips: tuple[Footage, ...] = ()


@dataclass(frozen=True)
class Metric(ABC):
    """How answers are scored. Its dataclass fields are its options, all of them texts.

    name             what `metric=` says
    figure           what its headline is called
    new_tokens       how long an answer may be, unless the task says otherwise
    multiple_choice  it needs options, which stand in the question or in columns
    needs_size       it needs `extra["size"]`, the (width, height) of the first image in pixels
    """

    name: ClassVar[str]
    figure: ClassVar[str] = "accuracy"
    new_tokens: ClassVar[int] = 16
    multiple_choice: ClassVar[bool] = False
    needs_size: ClassVar[bool] = False

    @abstractmethod
    def score(self, prediction: str, sample: Sample) -> float:
        """The score of one answer, in 0..1."""

    def references(self, value: Any) -> tuple[str, ...]:
        """The reference answers in a data set's field: a text, a number, or a list of these or of {"answer": text}."""
        items = value if isinstance(value, list | tuple) else [value]
        texts = [item.get("answer") if isinstance(item, dict) else item for item in items]
        if not all(isinstance(text, str | int | float) for text in texts):
            raise FoveateError(f"answers must be texts or numbers, found {str(value)[:80]!r}")
        return tuple(str(text) for text in texts)

    def complete(self, sample: Sample) -> Sample:
        """The sample with what the metric reads off it; FoveateError where no prediction could be scored against it."""
        return sample

    def arrange(self, samples: list[Sample]) -> list[Sample]:
        """All samples of a task, complete ones, as they are to be asked; FoveateError where some are missing."""
        return samples

    def summary(self, samples: Sequence[Sample], predictions: Sequence[str], scores: Sequence[float]) -> dict[str, float]:
        """The headline over all samples, then that of each group as "<figure>/<group>". The three lists run in parallel."""
        return {self.figure: percent(scores), **by_group(self.figure, samples, scores)}


@dataclass(frozen=True)
class Task:
    """Samples with a metric. `hash`: SHA-256 over the samples and the bytes of their images and clips, so that two runs are known to have
    asked the same; "" where nobody has looked at them."""

    name: str
    samples: tuple[Sample, ...]
    metric: Metric
    max_new_tokens: int
    hash: str


def picture(sample: Sample) -> str:
    """The names of a sample's pictures and clips, which are the same where these are; its id where it has none."""
    names = [ref[1] if isinstance(ref, tuple) else str(ref) for ref in sample.images] + [str(clip.path) for clip in sample.clips]
    return " ".join(names) or sample.id


def in_turn(groups: Sequence[str]) -> list[int]:
    """The numbers of items in the order in which their groups take turns: the first of each group, the second of each, …"""
    turns: dict[str, int] = {}
    order = []
    for number, group in enumerate(groups):
        turns[group] = turns.get(group, -1) + 1
        order.append((turns[group], number))
    return [number for _, number in sorted(order)]


def percent(values: Iterable[float]) -> float:
    """100 times the mean, whatever the order of the values; 0 of none."""
    held = list(values)
    return 100 * fsum(held) / len(held) if held else 0.0


def split(samples: Sequence[Sample], values: Sequence[Any]) -> dict[str, list[Any]]:
    """The samples' values by group, groups by name; {} where there are not at least two groups."""
    found: dict[str, list[Any]] = {}
    for sample, value in zip(samples, values, strict=True):
        found.setdefault(sample.group, []).append(value)
    return dict(sorted(found.items())) if len(found) > 1 else {}


def by_group(figure: str, samples: Sequence[Sample], values: Sequence[float]) -> dict[str, float]:
    """{"<figure>/<group>": percentage}; {} where there are not at least two groups."""
    return {f"{figure}/{group}": percent(own) for group, own in split(samples, values).items()}
