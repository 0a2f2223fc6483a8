"""The dynamic image pyramid of LRS-VQA: one level of halved sizes, with the whole image in front (Luo et al., ICCV 2025, 2503.07588).

Levels are 1, 1/2, 1/4, … of the image down to where its longer side has three views, which is the last level in any case. A level is cut
into as many tiles as its size needs, rounded up; the image is scaled up to fill them in one direction and stands at their upper left, on
black. The tiles' tokens are scaled to half the rows and columns, rows and columns of filling are cut off (a token that shows some of the
image stays), and a learned newline follows every row.

`level` 0 is the coarsest, which is where the method's search begins; descending to the tiles that a trained module of the language model
looks at is a search at inference and no tiling.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from typing import ClassVar

from foveate.errors import FoveateError
from foveate.tilings.base import Pair, Sight, Tiling
from foveate.tilings.common import fitted, overview, tiles
from foveate.tokens import Block, Canvas, ImagePlan


@dataclass(frozen=True)
class LRS(Tiling):
    """The overview and the tiles of `level`, or of the finest level of an image that has fewer."""

    name: ClassVar[str] = "lrs"
    paper: ClassVar[str] = "2503.07588"
    sight: ClassVar[Sight] = Sight(336)
    marks: ClassVar[tuple[str, ...]] = ("newline",)
    level: int = 0

    def check(self) -> None:
        self.least(0, "level")

    def levels(self, width: int, height: int, side: int) -> list[Pair]:
        """(rows, columns) of tiles of each level, coarse to fine."""
        smallest = min(Fraction(1), Fraction(3 * side, max(width, height)))
        scales = [Fraction(1)]
        while scales[-1] / 2 >= smallest:
            scales.append(scales[-1] / 2)
        if scales[-1] > smallest:
            scales.append(smallest)
        return [(ceil(height * scale / side), ceil(width * scale / side)) for scale in reversed(scales)]

    def lay(self, width: int, height: int, most: int | None, sight: Sight) -> ImagePlan:
        levels = [grid for grid in self.levels(width, height, sight.side) if most is None or grid[0] * grid[1] < most]
        if not levels:
            raise FoveateError(f"lrs: a budget of {most} views has no room for the coarsest level and the whole image; raise it")
        rows, columns = levels[min(self.level, len(levels) - 1)]
        size = columns * sight.side, rows * sight.side
        w, h = (max(1, length) for length in fitted(width, height, *size))
        crops = (overview(sight), *tiles(Canvas(size, (w, h)), (rows, columns), sight))
        if crops[0].cells is None:
            return ImagePlan.laid((width, height), crops, tuple(Block(i) for i in range(len(crops))))
        r, c = rows * crops[0].cells[0], columns * crops[0].cells[1]
        kept = min(r, 2 * -(-h * r // (2 * size[1]))), min(c, 2 * -(-w * c // (2 * size[0])))  # whole pairs of rows and columns
        shape = -(-kept[0] // 2), -(-kept[1] // 2)
        return ImagePlan.laid((width, height), crops, (Block(0), Block(1, rows, columns, (0, 0, *kept), shape, newline=True)))
