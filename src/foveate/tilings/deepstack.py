"""DeepStack: an overview in the prompt, and tiles whose tokens are added to its own inside the language model (Meng et al., NeurIPS 2024,
arXiv 2406.04334).

The image is stretched over the grid of tiles that shows most of it. The tiles' tokens, (a * rows, b * columns) as one map M, become a * b
stacks that lie over the overview's: stack (i, j) is M[i::a, j::b], so that each token of the overview gets, one stack after the other, what
the tiles show at its own place. In front of decoder layer `start`, and of every `interval`-th after it, the next stack is added to the
hidden states of the visual slots. No token is added to the prompt, and no position changes.

This is DeepStack-L. Not here: stacks inside the tower (-V), and tiles in the prompt that have stacks of their own (-HD). What is settled
here: of grids that tie in what they show and waste, that of fewer rows wins; with a budget too small for any grid the overview is alone,
which is the model without stacks to the last bit, as `tiles=0` is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from foveate.errors import FoveateError
from foveate.tilings.base import Sight, Tiling
from foveate.tilings.common import best_fit, overview, stretched, tiles, within
from foveate.tokens import Block, ImagePlan


@dataclass(frozen=True)
class DeepStack(Tiling):
    """At most `tiles` tiles, 0 for none, as many stacks, from decoder layer `start` on (counted from 0) in steps of `interval`."""

    name: ClassVar[str] = "deepstack"
    paper: ClassVar[str] = "2406.04334"
    sight: ClassVar[Sight] = Sight(336)
    tiles: int = 4
    start: int = 1
    interval: int = 1

    def check(self) -> None:
        self.least(0, "tiles", "start")
        self.least(1, "interval")
        if self.tiles == 1:
            raise FoveateError("deepstack: tiles=1 is not possible: one tile shows what the overview shows; give 0, or at least 2")

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(self.start + self.interval * number for number in range(self.tiles))

    def lay(self, width: int, height: int, most: int | None, sight: Sight) -> ImagePlan:
        whole, limit = overview(sight), self.tiles if most is None else min(self.tiles, most - 1)
        grids = within(2, limit)
        if not grids:
            return ImagePlan.laid((width, height), (whole,), (Block(0),))
        if whole.cells is None:
            raise FoveateError(
                "deepstack: the tokens of a view have to be a raster, over which stacks can lie, and this bridge makes none: take mlp, "
                "avg_pool2d or pixel_shuffle"
            )
        grid = best_fit(width, height, grids, sight.side)
        crops = (whole, *tiles(stretched(grid, sight), grid, sight))
        return ImagePlan.laid((width, height), crops, (Block(0),), Block(1, *grid))
