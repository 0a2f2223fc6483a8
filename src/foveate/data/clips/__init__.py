"""Clips: what a model sees of a film. Which frames these are a sampling says, one rule a file, one line below each.

clip = open_clip("cat.mp4", "uniform:frames=8")
processor(text=…, videos=[clip.pixels], video_metadata=[clip.metadata], do_sample_frames=False, return_tensors="pt")
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from foveate.data.clips.film import ClipError as ClipError
from foveate.data.clips.film import Film as Film
from foveate.data.clips.film import open_film as open_film
from foveate.data.clips.sampling import Sampling as Sampling
from foveate.reducers.spelling import listed, read

# The rules. A line both exports one and lists it.
# isort: off
from foveate.data.clips.uniform import Uniform as Uniform
from foveate.data.clips.rate import Rate as Rate
from foveate.data.clips.changes import Changes as Changes
# isort: on

log = logging.getLogger(__name__)

SAMPLINGS: dict[str, type[Sampling]] = listed(globals(), Sampling)


def parse(text: str) -> Sampling:
    """A sampling from its spelling, such as "rate:fps=2,most=32". FoveateError for an unknown name or option."""
    return read(text, "sampling", SAMPLINGS)


@dataclass(frozen=True, eq=False)
class Clip:
    """Frames that were chosen of a film; of a picture, one frame.

    name    of the film, for messages
    frames  RGB, upright, all of one size
    times   seconds into the film of each frame, ascending
    end     seconds that the film lasts, 0 of a picture
    """

    name: str
    frames: tuple[Image.Image, ...]
    times: tuple[float, ...]
    end: float = 0.0

    @classmethod
    def of(cls, film: Film, rule: Sampling | str = "uniform") -> Clip:
        """The frames of a film that a sampling, or its spelling, chooses. ClipError for a film that is torn."""
        wanted = (parse(rule) if isinstance(rule, str) else rule).choose(film)
        frames = list(film.frames(wanted))
        first = frames[0].size
        frames = [frame if frame.size == first else frame.resize(first, Image.Resampling.BICUBIC) for frame in frames]
        return cls(film.name, tuple(frames), tuple(film.times[number] for number in wanted), film.end)

    def __len__(self) -> int:
        return len(self.frames)

    @property
    def rate(self) -> float:
        """Frames a second, on the average; 0 of a picture."""
        return len(self) / self.end if self.end else 0.0

    @property
    def pixels(self) -> NDArray[np.uint8]:
        """(F, height, width, 3) uint8, as processors take videos."""
        return np.stack([np.asarray(frame) for frame in self.frames])

    @property
    def metadata(self) -> dict[str, Any]:
        """What processors call `video_metadata`, in milliseconds, so that the times of frames are right at variable rates too."""
        width, height = self.frames[0].size
        return {
            "fps": 1000.0,
            "frames_indices": [round(1000 * time) for time in self.times],
            "total_num_frames": max(1, round(1000 * self.end)),
            "duration": self.end,
            "width": width,
            "height": height,
        }


def open_clip(path: str | Path, rule: Sampling | str = "uniform", rate: float = 1.0) -> Clip:
    """What a sampling, or its spelling, chooses of a film: a file, or a folder of pictures, `rate` of them a second. ClipError with the
    reason for what cannot be shown."""
    return Clip.of(open_film(path, rate), rule)


def open_clips(paths: Iterable[str | Path], rule: Sampling | str = "uniform", bad: list[ClipError] | None = None) -> Iterator[Clip]:
    """The clips of several films, one at a time. What cannot be shown is an error, or, with a list `bad`, is left out, counted in it and
    said in the log at the end."""
    rule = parse(rule) if isinstance(rule, str) else rule
    before = len(bad or ())
    total = 0
    for path in paths:
        total += 1
        try:
            clip = open_clip(path, rule)
        except ClipError as error:
            if bad is None:
                raise
            bad.append(error)
            continue
        yield clip
    if bad is not None and len(bad) > before:
        log.warning("skipped: %d of %d clips cannot be read, first: %s", len(bad) - before, total, bad[before])
