"""LEOPARD: one budget of views for all images of a prompt (Jia et al., arXiv 2410.01744).

An image wants round(height / side) * round(width / side) tiles, halves rounded to the even number, and none if that is one. The views of
the whole images are paid first; where the tiles are more than what is left, each image gets its part, rounded down. Within what it may have
an image takes the grid of the any-resolution rule. Tokens of a tile follow one another, with no newline.

What is settled here: the authors' code takes the whole images alone where they use up the budget, however many they are; more images than
views are an error here. Numbers and marks around each image belong to the prompt's template.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from foveate.tilings.base import Pair, Sight, Tiling
from foveate.tilings.common import best_fit, half_even, overview, padded, tiles, within
from foveate.tokens import Block, ImagePlan


@dataclass(frozen=True)
class Leopard(Tiling):
    """The overview of each image, and tiles as the `budget` allows."""

    name: ClassVar[str] = "leopard"
    paper: ClassVar[str] = "2410.01744"
    sight: ClassVar[Sight] = Sight(364, merge=2)  # 26 x 26 patches
    budget: int | None = field(default=50, kw_only=True)

    def wanted(self, width: int, height: int, sight: Sight) -> int:
        """Tiles at most, before the budget."""
        count = half_even(height, sight.side) * half_even(width, sight.side)
        return 0 if count == 1 else count

    def share(self, sizes: Sequence[Pair], budget: int | None = None, sight: Sight | None = None) -> list[int | None]:
        whole = self.budget if budget is None else budget
        if whole is None or len(sizes) > whole or not sizes:
            return super().share(sizes, budget, sight)
        wanted, left = [self.wanted(*size, sight or self.sight) for size in sizes], whole - len(sizes)
        return [1 + (n if sum(wanted) <= left else n * left // sum(wanted)) for n in wanted]

    def lay(self, width: int, height: int, most: int | None, sight: Sight) -> ImagePlan:
        limit = self.wanted(width, height, sight)
        limit = limit if most is None else min(limit, most - 1)
        crops = [overview(sight)]
        if limit > 1:
            grid = best_fit(width, height, within(2, limit), sight.side)
            crops += tiles(padded(width, height, grid, sight), grid, sight)
        return ImagePlan.laid((width, height), tuple(crops), tuple(Block(i) for i in range(len(crops))))
