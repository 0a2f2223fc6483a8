"""Rate: so many frames a second."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from foveate.data.clips.film import ClipError, Film
from foveate.data.clips.sampling import Sampling, spread
from foveate.errors import FoveateError

_SLACK = 1e-9  # of timestamps, which are products of floats


@dataclass(frozen=True)
class Rate(Sampling):
    """The frames shown at 0, 1 / `fps`, 2 / `fps`, … seconds, none of them twice.

    most    frames, which the model's context bounds
    longer  of a film with more of them: "thin" takes `most`, evenly spaced in time; "refuse" is a ClipError
    """

    name: ClassVar[str] = "rate"
    fps: float = 1.0
    most: int = 64
    longer: str = "thin"

    def check(self) -> None:
        if isinstance(self.fps, bool) or not isinstance(self.fps, int | float) or not (math.isfinite(self.fps) and self.fps > 0):
            raise FoveateError(f"rate: fps={self.fps!r} is not possible; give frames a second, more than 0")
        self.least(1, "most")
        if self.longer not in ("thin", "refuse"):
            raise FoveateError(f'rate: longer={self.longer!r} is not possible; choose "thin" or "refuse"')

    def choose(self, film: Film) -> list[int]:
        spans = zip(film.times, (*film.times[1:], film.end), strict=True)
        found = [i for i, (start, end) in enumerate(spans) if i == 0 or math.ceil(start * self.fps - _SLACK) / self.fps < end - _SLACK]
        if len(found) <= self.most:
            return found
        if self.longer == "refuse":
            raise ClipError(
                film.name, f"gives {len(found)} frames at {self.fps:g} a second, more than {self.most}; lower fps, raise most, or thin it"
            )
        return spread(film, self.most)
