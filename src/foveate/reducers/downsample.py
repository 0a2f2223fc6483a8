"""Downsampling: the image itself is made smaller before the processor sees it. A baseline; at equal numbers of tokens it beats many
pruning methods on common benchmarks (as VTC-Bench reports, arXiv 2510.07143), so no comparison is complete without it.

    (W, H) pixels --antialiased resize--> (sqrt(keep) W, sqrt(keep) H) pixels --processor--> about `keep` of the tokens

How many tokens follow is the processor's to say: one of dynamic resolution makes them of the pixels it is given, within its bounds on the
number of pixels and rounded to whole patches. A processor that resizes every image to one size undoes this, and nothing is saved.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt
from typing import ClassVar

from PIL.Image import Image, Resampling

from foveate.contract import BeforeProcessor, Cut, Site, View, Workload
from foveate.errors import FoveateError
from foveate.reducers.base import Reducer
from foveate.reducers.common import meant
from foveate.tokens import budget


@dataclass(frozen=True)
class Downsample(Reducer):
    """Keeps `keep` (a share) of each image's pixels: both sides times its root, half a pixel rounded up, at least 1.

    Acts in front of the processor, which `attach(…, processor=processor)` is given, and nowhere in the model; on an image of one's own in
    `foveate.reducers.prepare(reducers, image)`.
    """

    name: ClassVar[str] = "downsample"
    paper: ClassVar[str] = "-"
    keep: float = 0.25

    def check(self) -> None:
        super().check()
        if type(self.keep) is not float:
            raise FoveateError(f"downsample: keep={self.keep!r} is not possible; give a share of the pixels in (0, 1] as a float")
        budget(self.keep, 1)

    def prepare(self, image: Image) -> Image:
        size = (self._side(image.width), self._side(image.height))
        if size == image.size:
            return image
        if image.mode in ("1", "P"):  # of colours that are numbers of a palette Pillow would take single pixels
            image = image.convert("RGBA" if image.has_transparency_data else "RGB")
        return image.resize(size, Resampling.LANCZOS)

    def _side(self, pixels: int) -> int:
        # floor(sqrt(x) + 1/2) of x = keep * pixels^2, in integers: a float's root would round 0.09's half pixels down.
        return max(1, (isqrt(int(4 * meant(self.keep) * pixels**2)) + 1) // 2)

    def sites(self, layers: int) -> list[Site]:
        return [BeforeProcessor()]

    def reduce(self, view: View, stage: int = 0) -> Cut:
        raise FoveateError(
            "downsample acts on the image, not in the model: give attach the processor, as in attach(model, …, processor=processor), "
            "or call foveate.reducers.prepare before the processor"
        )

    def count(self, work: Workload, stage: int = 0) -> list[int]:
        raise FoveateError("downsample has no number of tokens of its own: the processor makes them of the smaller image")
