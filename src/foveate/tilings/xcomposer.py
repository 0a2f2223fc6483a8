"""InternLM-XComposer2-4KHD: the image scaled up as far as a number of tiles allows (Dong et al., arXiv 2404.06512).

The longer side becomes k whole tiles, with the largest k for which k * ceil(k * shorter / longer) tiles are not too many; the shorter keeps
the image's shape and is padded with white on both sides. Every image is scaled up so, however small it is. A learned newline stands after
every row of tokens of both views, a learned separator between them.

From memory, not from the source: that the overview comes first (`first`: "overview" or "tiles").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from foveate.errors import FoveateError
from foveate.tilings.base import Sight, Tiling
from foveate.tilings.common import overview, tiles
from foveate.tokens import Block, Canvas, ImagePlan, Mark

WHITE = 255


@dataclass(frozen=True)
class XComposer(Tiling):
    """At most `tiles` tiles (the paper's HD-9, HD-16, HD-25 and HD-55) and the overview."""

    name: ClassVar[str] = "xcomposer"
    paper: ClassVar[str] = "2404.06512"
    sight: ClassVar[Sight] = Sight(336, merge=2)
    marks: ClassVar[tuple[str, ...]] = ("newline", "separator")
    tiles: int = 25
    first: str = "overview"

    def check(self) -> None:
        self.least(1, "tiles")
        if self.first not in ("overview", "tiles"):
            raise FoveateError(f'xcomposer: first={self.first!r} is not possible; choose "overview" or "tiles"')

    def lay(self, width: int, height: int, most: int | None, sight: Sight) -> ImagePlan:
        limit = self.tiles if most is None else min(self.tiles, most - 1)
        whole = overview(sight)
        newline = whole.cells is not None
        if limit < 1:
            return ImagePlan.laid((width, height), (whole,), (Block(0, newline=newline),))
        long, short = max(width, height), min(width, height)
        k = 1
        while (k + 1) * -(-(k + 1) * short // long) <= limit:
            k += 1
        rows, side = -(-k * short // long), sight.side
        shorter = max(1, k * side * short // long)
        size, picture, at = (k * side, rows * side), (k * side, shorter), (0, (rows * side - shorter) // 2)
        if width < height:
            size, picture, at = size[::-1], picture[::-1], at[::-1]
        grid = size[1] // side, size[0] // side
        crops = (whole, *tiles(Canvas(size, picture, at, WHITE), grid, sight))
        local = (Block(1, *grid, newline=True),) if newline else tuple(Block(i) for i in range(1, len(crops)))
        head, tail = ((Block(0, newline=newline),), local) if self.first == "overview" else (local, (Block(0, newline=newline),))
        return ImagePlan.laid((width, height), crops, (*head, Mark("separator"), *tail))
