"""INF-LLaVA's two ways to cut: blocks of the image, and every so many pixels of it (Ma et al., arXiv 2407.16198).

The image is resized to `sides` views a side. Blocks are its tiles; stride (i, j) takes every `sides`-th pixel from row i and column j on:
each shows the whole scene. Both maps are put together again, read each other by cross-attention, and are pooled and averaged with the
map of the plain view. That dual enhancement is trained; which of the two is cut in blocks for it differs between the paper and its code.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from foveate.errors import FoveateError
from foveate.tilings.base import Sight, Tiling
from foveate.tilings.common import overview, square, stretched, tiles
from foveate.tokens import Block, ImagePlan


@dataclass(frozen=True)
class InfLLaVA(Tiling):
    """`sides`² blocks, as many strides and the overview, with the tokens of the last."""

    name: ClassVar[str] = "inf_llava"
    paper: ClassVar[str] = "2407.16198"
    sight: ClassVar[Sight] = Sight(336)
    lacks: ClassVar[str] = "the trained cross-attention between the maps of blocks and strides"
    sides: int = 3

    def check(self) -> None:
        self.least(1, "sides")

    def lay(self, width: int, height: int, most: int | None, sight: Sight) -> ImagePlan:
        n, canvas = self.sides, stretched((self.sides, self.sides), sight)
        strides = [square(canvas, (j, i), sight, "stride", every=n) for i in range(n) for j in range(n)]
        joined = [replace(crop, tokens=0, cells=None) for crop in (*tiles(canvas, (n, n), sight), *strides)]
        if most is not None and most <= len(joined):
            raise FoveateError(f"inf_llava: {n} sides take {len(joined) + 1} views; a budget of {most} is less: take fewer sides")
        return ImagePlan.laid((width, height), (overview(sight), *joined), (Block(0),))
