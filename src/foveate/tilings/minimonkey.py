"""Mini-Monkey's complementary pyramid: two grids whose cuts do not coincide, and the whole image (Huang et al., arXiv 2408.02034).

Both grids are InternVL's, of different numbers of tiles. A coarse grid is left out where its cuts are all cuts of the fine one as well:
where its columns divide the fine one's, and its rows too. That is the rule of the published evaluation. The code that it was trained with
asks that neither divides, which leaves nearly every image without a second grid; it is not offered. A grid of one tile shows what the
overview shows and is left out. The order is that of training and evaluation: fine, coarse, whole; the demo has coarse before fine.

The defaults are the demo's; the evaluation's are fewest=12,tiles=24,coarse_fewest=3,coarse=5. Of scale compression, which scores the fine
tiles by two layers of the language model and starts it anew with half of them, `compressed` counts what is left.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from foveate.errors import FoveateError
from foveate.tilings.base import Pair, Sight, Tiling
from foveate.tilings.common import nearest_aspect, overview, stretched, tiles, within
from foveate.tokens import Block, ImagePlan, budget


@dataclass(frozen=True)
class MiniMonkey(Tiling):
    """`fewest` to `tiles` fine tiles, `coarse_fewest` to `coarse` coarse ones, and the overview."""

    name: ClassVar[str] = "minimonkey"
    paper: ClassVar[str] = "2408.02034"
    sight: ClassVar[Sight] = Sight(448, merge=2)
    tiles: int = 12
    fewest: int = 4
    coarse: int = 7
    coarse_fewest: int = 3

    def check(self) -> None:
        self.least(1, "tiles", "fewest", "coarse", "coarse_fewest")
        for low, high in (("fewest", "tiles"), ("coarse_fewest", "coarse")):
            if getattr(self, low) > getattr(self, high):
                raise FoveateError(f"minimonkey: {low}={getattr(self, low)} is more than {high}={getattr(self, high)}")

    def lay(self, width: int, height: int, most: int | None, sight: Sight) -> ImagePlan:
        grids = self.grids(width, height, most, sight)
        crops = [
            crop
            for grid, kind in zip(grids, ("detail", "tile"), strict=True)
            if grid != (1, 1)
            for crop in tiles(stretched(grid, sight), grid, sight, kind)
        ]
        crops.append(overview(sight))
        return ImagePlan.laid((width, height), tuple(crops), tuple(Block(i) for i in range(len(crops))))

    def grids(self, width: int, height: int, most: int | None, sight: Sight) -> tuple[Pair, Pair]:
        """(rows, columns) of the fine and of the coarse grid, (1, 1) where there is none. A budget takes from the fine grid first; one too
        small for its fewest tiles beside the coarse ones leaves these out."""
        coarse = (1, 1)
        for limit in range(self.tiles, self.fewest - 1, -1):
            fine = nearest_aspect(width, height, within(self.fewest, limit), sight.side) or (1, 1)
            other = [grid for grid in within(self.coarse_fewest, self.coarse) if fine[1] % grid[1] or fine[0] % grid[0]]
            coarse = nearest_aspect(width, height, other, sight.side) or (1, 1)
            views = 1 + sum(grid[0] * grid[1] for grid in (fine, coarse) if grid != (1, 1))
            if most is None or views <= most:
                return fine, coarse
        assert most is not None
        alone = nearest_aspect(width, height, within(self.fewest, max(1, most - 1)), sight.side)
        if alone is None:
            raise FoveateError(f"minimonkey: a budget of {most} views is less than fewest={self.fewest} tiles and the whole image")
        return alone, (1, 1)

    def compressed(self, plan: ImagePlan, keep: float = 0.5) -> int:
        """Visual tokens that scale compression leaves of a plan: of the fine tiles a share, of the others all."""
        fine = sum(crop.tokens for crop in plan.crops if crop.kind == "detail")
        return plan.visual - fine + (budget(keep, fine) if fine else 0)
