"""LLaVA-NeXT's any resolution: the grid that shows most of the image, padding cut off again, a learned newline after every row.

Liu et al., "LLaVA-NeXT: Improved reasoning, OCR, and world knowledge" (2024, no arXiv number; the model before it is 2310.03744).

The image keeps its shape in the middle of the grid's canvas, on black. In front stands the whole image, distorted to one view. The tiles'
tokens are laid out as one map, from which the rows or columns of padding are cut, as many on both sides.

What is settled here where the authors' code and transformers differ: grids are rows x columns, so that of two that tie the wide one wins,
as in transformers (the authors read the same list as width x height; grids=2x1/1x2/2x2/1x3/3x1 is theirs); unpadding rounds down exactly.
With `limit` a map that is more than 1.1 times too long in each direction is scaled down bilinearly to so many views' tokens ("anyres_max").
With a budget too small for any grid the image is seen whole, with one newline behind it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from foveate.tilings.base import Pair, Sight, Tiling
from foveate.tilings.common import best_fit, overview, padded, read_grids, tiles
from foveate.tokens import Block, ImagePlan, Mark


@dataclass(frozen=True)
class AnyRes(Tiling):
    """The overview, then the tiles of the best of `grids` as one map; `limit`: how many views' tokens the map has at most, 0: any."""

    name: ClassVar[str] = "anyres"
    paper: ClassVar[str] = "-"
    sight: ClassVar[Sight] = Sight(336)
    marks: ClassVar[tuple[str, ...]] = ("newline",)
    grids: str = "1x2/2x1/2x2/3x1/1x3"
    limit: int = 0

    def check(self) -> None:
        read_grids(self.grids, self.name)
        self.least(0, "limit")

    def lay(self, width: int, height: int, most: int | None, sight: Sight) -> ImagePlan:
        grids = [grid for grid in read_grids(self.grids, self.name) if most is None or grid[0] * grid[1] < most]
        if not grids:
            return ImagePlan.laid((width, height), (overview(sight),), (Block(0), Mark("newline")))
        grid = best_fit(width, height, grids, sight.side)
        crops = (overview(sight), *tiles(padded(width, height, grid, sight), grid, sight))
        if crops[0].cells is None:
            return ImagePlan.laid((width, height), crops, tuple(Block(i) for i in range(len(crops))))
        rows, columns = grid[0] * crops[0].cells[0], grid[1] * crops[0].cells[1]
        window = unpadded(width, height, rows, columns)
        shape = None if not self.limit else limited(window[2] - window[0], window[3] - window[1], self.limit * crops[0].tokens)
        return ImagePlan.laid((width, height), crops, (Block(0), Block(1, *grid, window, shape, newline=True)))


def unpadded(width: int, height: int, rows: int, columns: int) -> tuple[int, int, int, int]:
    """(top, left, bottom, right) of what is kept of a map on whose middle lies a picture of this shape."""
    if width * rows > columns * height:
        cut = (rows - height * columns // width) // 2
        return cut, 0, rows - cut, columns
    cut = (columns - width * rows // height) // 2
    return 0, cut, rows, columns - cut


def limited(rows: int, columns: int, most: int) -> Pair | None:
    """(rows, columns) of a map of about `most` tokens, None where it is not more than 1.1 times too long in each direction.

    In floating point, as in the released code: in whole numbers a quotient that is one would not fall short of it."""
    ratio = math.sqrt(rows * columns / most)
    return (max(1, int(rows // ratio)), max(1, int(columns // ratio))) if ratio > 1.1 else None
