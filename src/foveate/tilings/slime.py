"""SliME: the whole image by the bridge, and tiles compressed by learned queries in front of it (Zhang et al., arXiv 2406.08487).

n = ceil(pixels / side²), at most `tiles`; the grids are all pairs of factors of n - 1, n and n + 1 tiles (one tile is none), and the
any-resolution rule takes the best, with black around the image. Of a tile's features a lens makes `queries` x `queries`
(`foveate.bridges.tile_queries`), which the bridge then reads as it reads the patches of the whole image: an MLP makes queries² tokens of
them. The tiles' tokens lie as the tiles do in the image, and a learned separator stands between them and those of the whole image.

Read in the released code: the bridge is the same for both, and a tile's tokens are laid out by their queries' places. Two things of the
paper are not here. The whole image goes through the bridge alone, as it does by a switch of the code, and not through a mixture of it and
a second adapter. And all tokens of the tiles are kept: in the paper those stay that are most like the words of the text, up to a share of
the sum. How many that are no plan can say, for which there is no text yet; the count is the most that the paper has, and a reducer that
reads the question may take some of them away. The separator is learned here; there it is the embedding of one fixed token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from foveate.errors import FoveateError
from foveate.tilings.base import Sight, Tiling
from foveate.tilings.common import best_fit, overview, padded, tiles
from foveate.tokens import Block, ImagePlan, Mark


@dataclass(frozen=True)
class SliME(Tiling):
    """The overview, a separator, and about `tiles` tiles at most, of each of which the bridge reads `queries`² features."""

    name: ClassVar[str] = "slime"
    paper: ClassVar[str] = "2406.08487"
    sight: ClassVar[Sight] = Sight(336)
    marks: ClassVar[tuple[str, ...]] = ("separator",)
    tiles: int = 6
    queries: int = 12

    def check(self) -> None:
        self.least(2, "tiles")
        self.least(1, "queries")

    @property
    def lens(self) -> dict[str, Any]:
        return {"kind": "tile_queries", "side": self.queries}

    def lay(self, width: int, height: int, most: int | None, sight: Sight) -> ImagePlan:
        n = max(2, min(-(-width * height // sight.side**2), self.tiles))
        counts = (n, n + 1) if n == 2 else (n - 1, n, n + 1)
        grids = [(k // c, c) for k in counts for c in range(1, k + 1) if k % c == 0 and (most is None or k < most)]
        if not grids:
            raise FoveateError(f"slime: a budget of {most} views has no room for {counts[0]} tiles and the whole image; raise it")
        grid, whole, read = best_fit(width, height, grids, sight.side), overview(sight), (self.queries, self.queries)
        try:
            tokens, cells = sight.made(read)
        except FoveateError as error:
            raise FoveateError(
                f"slime: the bridge is given {self.queries} x {self.queries} features of a tile, and cannot read them: {error}. Set "
                "queries to what it can read, or take mlp, which reads any number"
            ) from error
        cut = tiles(padded(width, height, grid, sight), grid, sight)
        local = [replace(crop, grid=read, tokens=tokens, cells=cells, lens=True) for crop in cut]
        laid = (Block(1, *grid),) if cells is not None else tuple(Block(1 + number) for number in range(len(local)))
        return ImagePlan.laid((width, height), (whole, *local), (Block(0), Mark("separator"), *laid))
