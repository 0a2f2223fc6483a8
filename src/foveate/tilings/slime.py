"""SliME: a global view by a mixture of adapters, and compressed tiles (Zhang et al., arXiv 2406.08487).

n = ceil(pixels / side²), at most `tiles`; the grids are all pairs of factors of n - 1, n and n + 1 tiles (one tile is none), and the
any-resolution rule takes the best, with black around the image. A tile has `queries`² tokens, of a resampler of its own; a separator stands
between them and the tokens of the whole image. The text then picks among the tiles' tokens: the plan says how many there are at most.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from foveate.errors import FoveateError
from foveate.tilings.base import Sight, Tiling
from foveate.tilings.common import best_fit, overview, padded, tiles
from foveate.tokens import Block, ImagePlan, Mark


@dataclass(frozen=True)
class SliME(Tiling):
    """The overview, a separator, and at most about `tiles` tiles of `queries`² tokens."""

    name: ClassVar[str] = "slime"
    paper: ClassVar[str] = "2406.08487"
    sight: ClassVar[Sight] = Sight(336)
    marks: ClassVar[tuple[str, ...]] = ("separator",)
    lacks: ClassVar[str] = "the second adapter for tiles, the mixture of adapters for the whole image, and the text that picks among tokens"
    tiles: int = 6
    queries: int = 12

    def check(self) -> None:
        self.least(2, "tiles")
        self.least(1, "queries")

    def lay(self, width: int, height: int, most: int | None, sight: Sight) -> ImagePlan:
        n = max(2, min(-(-width * height // sight.side**2), self.tiles))
        counts = (n, n + 1) if n == 2 else (n - 1, n, n + 1)
        grids = [(k // c, c) for k in counts for c in range(1, k + 1) if k % c == 0 and (most is None or k < most)]
        if not grids:
            raise FoveateError(f"slime: a budget of {most} views has no room for {counts[0]} tiles and the whole image; raise it")
        grid = best_fit(width, height, grids, sight.side)
        cut = tiles(padded(width, height, grid, sight), grid, sight)
        local = [replace(crop, tokens=self.queries**2, cells=(self.queries, self.queries)) for crop in cut]
        parts = (Block(0), Mark("separator"), Block(1, *grid))
        return ImagePlan.laid((width, height), (overview(sight), *local), parts)
