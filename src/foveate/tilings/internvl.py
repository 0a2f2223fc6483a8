"""InternVL's dynamic tiling: the grid of the nearest aspect ratio, and the whole image behind it (Chen et al., arXiv 2404.16821).

The image is stretched over the grid, whatever its shape. Between grids that are as near the one with more tiles wins, if the image has more
than half its pixels. An image of one tile has no second view of the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from foveate.errors import FoveateError
from foveate.tilings.base import Sight, Tiling
from foveate.tilings.common import nearest_aspect, overview, stretched, tiles, within
from foveate.tokens import Block, ImagePlan


@dataclass(frozen=True)
class InternVL(Tiling):
    """`fewest` to `tiles` tiles, then the overview; `overview`: whether there is one."""

    name: ClassVar[str] = "internvl"
    paper: ClassVar[str] = "2404.16821"
    sight: ClassVar[Sight] = Sight(448, merge=2)
    tiles: int = 12
    fewest: int = 1
    overview: bool = True

    def check(self) -> None:
        self.least(1, "tiles", "fewest")
        if self.fewest > self.tiles:
            raise FoveateError(f"{self.name}: fewest={self.fewest} tiles are more than tiles={self.tiles}, the most that there may be")
        if type(self.overview) is not bool:
            raise FoveateError(f"{self.name}: overview={self.overview!r} is not possible; give true or false")

    def grid(self, width: int, height: int, most: int | None, sight: Sight) -> tuple[int, int]:
        """(rows, columns) of tiles."""
        limit = self.tiles if most is None else min(self.tiles, max(1, most - self.overview))
        found = nearest_aspect(width, height, within(self.fewest, limit), sight.side)
        if found is None:
            raise FoveateError(
                f"{self.name}: a budget of {most} views leaves {limit} tiles, and fewest={self.fewest} are asked for: raise the budget"
            )
        return found

    def lay(self, width: int, height: int, most: int | None, sight: Sight) -> ImagePlan:
        grid = self.grid(width, height, most, sight)
        if grid == (1, 1):
            return ImagePlan.laid((width, height), (overview(sight),), (Block(0),))
        crops = (*tiles(stretched(grid, sight), grid, sight), *([overview(sight)] if self.overview else []))
        return ImagePlan.laid((width, height), crops, tuple(Block(i) for i in range(len(crops))))
