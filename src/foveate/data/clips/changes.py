"""Changes: the frames that differ most from the one before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from PIL import Image

from foveate.data.clips.film import Film
from foveate.data.clips.sampling import Sampling

_SIDE = 32  # of the grey thumbnails that are compared


@dataclass(frozen=True)
class Changes(Sampling):
    """The first frame and the `frames` - 1 whose grey thumbnails of 32 x 32 pixels differ most, on the average, from the frame before; of
    equal ones the earlier. All frames are decoded for it, one after the other. A rule of this library's own."""

    name: ClassVar[str] = "changes"
    frames: int = 16

    def check(self) -> None:
        self.least(1, "frames")

    def choose(self, film: Film) -> list[int]:
        if len(film) <= self.frames:
            return list(range(len(film)))
        before, change = None, []
        for image in film.frames(range(len(film))):
            thumbnail = np.asarray(image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.BOX), np.float32)
            change.append(np.inf if before is None else float(np.abs(thumbnail - before).mean()))
            before = thumbnail
        return sorted(np.argsort(-np.array(change), kind="stable")[: self.frames].tolist())
