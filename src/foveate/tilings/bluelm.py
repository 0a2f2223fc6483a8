"""BlueLM-V's relaxed choice: a smaller grid wins if it shows nearly as much and wastes less (Lu et al., arXiv 2411.10640).

Grids are visited from the largest on. One replaces the best so far if it shows more by the share `slack`, or less by under that share with
less waste; what it shows is then the measure, also where that is less than before. The image keeps its shape in the middle of the grid, on
black. The paper leaves open in which order grids of as many tiles come: here those of more rows first.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from foveate.errors import FoveateError
from foveate.tilings.base import Sight, Tiling
from foveate.tilings.common import effective, overview, padded, tiles
from foveate.tokens import Block, ImagePlan


@dataclass(frozen=True)
class BlueLM(Tiling):
    """The overview, then at most `rows` x `columns` tiles."""

    name: ClassVar[str] = "bluelm"
    paper: ClassVar[str] = "2411.10640"
    sight: ClassVar[Sight] = Sight(384, merge=2)  # 27 x 27 patches, 14 x 14 tokens
    rows: int = 3
    columns: int = 3
    slack: float = 0.1

    def check(self) -> None:
        self.least(1, "rows", "columns")
        if type(self.slack) not in (float, int) or not 0 <= self.slack < 1:
            raise FoveateError(f"bluelm: slack={self.slack!r} is not possible; give a share from 0 to less than 1")

    def grid(self, width: int, height: int, most: int | None, side: int) -> tuple[int, int] | None:
        """(rows, columns) of tiles, None where the budget leaves room for none."""
        grids = [(r, c) for r in range(1, self.rows + 1) for c in range(1, self.columns + 1) if most is None or r * c < most]
        found, shown, waste = None, 0, 0
        for grid in sorted(grids, key=lambda grid: (grid[0] * grid[1], grid[0]), reverse=True):
            useful, wasted = effective(width, height, grid, side)
            edge = Fraction(str(self.slack)) * shown
            if found is None or useful - shown > edge or (shown - useful < edge and wasted < waste):
                found, shown, waste = grid, useful, wasted
        return found

    def lay(self, width: int, height: int, most: int | None, sight: Sight) -> ImagePlan:
        grid = self.grid(width, height, most, sight.side)
        crops = [overview(sight)]
        if grid is not None:
            crops += tiles(padded(width, height, grid, sight), grid, sight)
        return ImagePlan.laid((width, height), tuple(crops), tuple(Block(i) for i in range(len(crops))))
