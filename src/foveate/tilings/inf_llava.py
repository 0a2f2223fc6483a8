"""INF-LLaVA's two ways to cut: blocks of the image, and every so many pixels of it (Ma et al., arXiv 2407.16198).

The image is resized to `sides` views a side. Blocks are its tiles; stride (i, j) takes every `sides`-th pixel from row i and column j on:
each shows the whole scene. Their features are put together again as two maps of the image, which read each other by cross-attention and are
pooled to one view's patches; the plain view's features are added. That is a trained lens (`foveate.bridges.dual_perspective`, which says
where the paper and its code differ). The bridge reads what comes of it as it reads one view.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

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
    sides: int = 3

    def check(self) -> None:
        self.least(1, "sides")

    @property
    def joins(self) -> int:
        return 1 + 2 * self.sides**2

    @property
    def lens(self) -> dict[str, Any]:
        return {"kind": "dual_perspective"}

    def lay(self, width: int, height: int, most: int | None, sight: Sight) -> ImagePlan:
        n, canvas = self.sides, stretched((self.sides, self.sides), sight)
        if most is not None and most < self.joins:
            raise FoveateError(f"inf_llava: {n} sides take {self.joins} views; a budget of {most} is less: take fewer sides")
        strides = [square(canvas, (j, i), sight, "stride", every=n) for i in range(n) for j in range(n)]
        joined = [replace(crop, tokens=0, cells=None) for crop in (*tiles(canvas, (n, n), sight), *strides)]
        return ImagePlan.laid((width, height), (overview(sight), *joined), (Block(0),))
