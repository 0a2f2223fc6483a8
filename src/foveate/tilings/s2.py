"""Scaling on scales (S²): a tower sees the image at several sizes, and the maps are joined by channels (Shi et al., arXiv 2403.13043).

At size k the image is resized to k views a side and cut into k x k of them. Their features are put together as one map, which is pooled
to that of the first size by the mean over k x k patches. The bridge then reads as many times the levels, and makes as many tokens as of the
first size alone. The image is distorted to a square here, as a processor without padding does.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from foveate.errors import FoveateError
from foveate.tilings.base import Sight, Tiling
from foveate.tilings.common import overview, stretched, tiles
from foveate.tokens import Block, ImagePlan


@dataclass(frozen=True)
class S2(Tiling):
    """1 + 4 + 9 + … views up to `sizes` a side, with the tokens of the first."""

    name: ClassVar[str] = "s2"
    paper: ClassVar[str] = "2403.13043"
    sight: ClassVar[Sight] = Sight(336)
    sizes: int = 3

    def check(self) -> None:
        self.least(1, "sizes")

    @property
    def scales(self) -> int:
        return self.sizes

    @property
    def joins(self) -> int:
        return sum(k * k for k in range(1, self.sizes + 1))

    def lay(self, width: int, height: int, most: int | None, sight: Sight) -> ImagePlan:
        crops = [overview(sight)]
        for k in range(2, self.sizes + 1):
            crops += [replace(crop, tokens=0, cells=None) for crop in tiles(stretched((k, k), sight), (k, k), sight)]
        if most is not None and most < len(crops):
            raise FoveateError(f"s2: {self.sizes} sizes take {len(crops)} views; a budget of {most} is less: take fewer sizes")
        return ImagePlan.laid((width, height), tuple(crops), (Block(0),))
