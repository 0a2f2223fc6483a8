"""Uniform: a number of frames, evenly spaced in time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from foveate.data.clips.film import Film
from foveate.data.clips.sampling import Sampling, spread


@dataclass(frozen=True)
class Uniform(Sampling):
    """The frames shown in the middle of `frames` equal parts of the film's time. A film of fewer frames gives all of them, and one that
    stands still over several parts (variable rates) its frame there once."""

    name: ClassVar[str] = "uniform"
    frames: int = 16

    def check(self) -> None:
        self.least(1, "frames")

    def choose(self, film: Film) -> list[int]:
        return spread(film, self.frames)
