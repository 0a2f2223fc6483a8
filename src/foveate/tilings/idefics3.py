"""Idefics3's splitting: the longer side scaled to a few tiles, both rounded up, and the whole image behind (Laurençon et al., 2408.12637).

The longer side becomes `tiles` tiles, also of a small image; the shorter keeps the image's shape, to an even number of pixels, and is
stretched to whole tiles. Tiles are named by row and column in the text, rows end with a line break. The released processor resizes in two
steps, here it is one, so that pixels differ a little where the shorter side is stretched.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from foveate.tilings.base import Sight, Tiling
from foveate.tilings.common import overview, stretched, tiles
from foveate.tokens import Block, ImagePlan, Tag


@dataclass(frozen=True)
class Idefics3(Tiling):
    """`tiles` tiles along the longer side, then the overview."""

    name: ClassVar[str] = "idefics3"
    paper: ClassVar[str] = "2408.12637"
    sight: ClassVar[Sight] = Sight(364, merge=2)  # 26 x 26 patches
    tiles: int = 4

    def check(self) -> None:
        self.least(1, "tiles")

    def grid(self, width: int, height: int, tiles: int, side: int) -> tuple[int, int]:
        """(rows, columns) of tiles."""
        long, short = max(width, height), min(width, height)
        shorter = max(1, tiles * side * short // long)
        shorter += shorter % 2 if shorter > 1 else 0
        count = min(tiles, -(-shorter // side))
        return (count, tiles) if width >= height else (tiles, count)

    def lay(self, width: int, height: int, most: int | None, sight: Sight) -> ImagePlan:
        counts = [self.grid(width, height, tiles, sight.side) for tiles in range(self.tiles, 0, -1)]
        rows, columns = next((grid for grid in counts if most is None or grid[0] * grid[1] < most), (1, 1))
        if rows * columns == 1:
            return ImagePlan.laid((width, height), (overview(sight),), (Tag("<global-img>"), Block(0)))
        crops = (*tiles(stretched((rows, columns), sight), (rows, columns), sight), overview(sight))
        parts: list[Tag | Block] = []
        for r in range(rows):
            for c in range(columns):
                parts += [Tag(f"<row_{r + 1}_col_{c + 1}>"), Block(r * columns + c)]
            parts.append(Tag("\n"))
        return ImagePlan.laid((width, height), crops, (*parts, Tag("\n<global-img>"), Block(len(crops) - 1)))
