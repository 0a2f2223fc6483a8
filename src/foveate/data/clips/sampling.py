"""Samplings: which frames of a film a model sees. One rule a file, listed in `foveate.data.clips`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from foveate.data.clips.film import Film
from foveate.reducers.spelling import Spelled


@dataclass(frozen=True)
class Sampling(Spelled, ABC):
    """One rule. Its fields are its options."""

    def __post_init__(self) -> None:
        self.check()

    @abstractmethod
    def check(self) -> None:
        """Raises FoveateError where an option is not possible."""

    @abstractmethod
    def choose(self, film: Film) -> list[int]:
        """The numbers of the frames, ascending, none of them twice, at least one. ClipError for a film that the rule refuses."""


def spread(film: Film, frames: int) -> list[int]:
    """The frames that are shown in the middle of so many equal parts of the film's time; all of a film that has no more."""
    if len(film) <= frames:
        return list(range(len(film)))
    return sorted({film.at((i + 0.5) * film.end / frames) for i in range(frames)})
