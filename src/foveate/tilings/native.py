"""Native resolution, by Qwen2-VL's rule: no tiles, the image itself with its sides rounded to whole tokens (Wang et al., arXiv 2409.12191).

Sides are rounded to the nearest multiple of a token's pixels, halves to the even one. An image of more than `most_tokens` or fewer than
`least_tokens` is scaled to fit, its sides rounded down or up. A side of less than half a token would be rounded to nothing and becomes one
token; the released code refuses an image more than 200 times as long as wide, and so does this. The limits are the defaults of its class.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from foveate.errors import FoveateError
from foveate.tilings.base import Sight, Tiling
from foveate.tilings.common import half_even
from foveate.tokens import Block, Canvas, Crop, ImagePlan

LONGEST = 200


@dataclass(frozen=True)
class Native(Tiling):
    """One view of `least_tokens` to `most_tokens`, in the image's own shape."""

    name: ClassVar[str] = "native"
    paper: ClassVar[str] = "2409.12191"
    sight: ClassVar[Sight] = Sight(28, merge=2)
    shapes: ClassVar[bool] = True
    least_tokens: int = 4
    most_tokens: int = 1280

    def check(self) -> None:
        self.least(1, "least_tokens", "most_tokens")
        if self.least_tokens > self.most_tokens:
            raise FoveateError(f"native: least_tokens={self.least_tokens} is more than most_tokens={self.most_tokens}")

    def lay(self, width: int, height: int, most: int | None, sight: Sight) -> ImagePlan:
        if max(width, height) > LONGEST * min(width, height):
            raise FoveateError(f"native: an image of {width} x {height} pixels is more than {LONGEST} times as long as wide; cut it up")
        size = self.resized(width, height, sight.patch * sight.merge)
        grid = sight.grid(*size)
        crop = Crop.of(Canvas(size, size), (0, 0, *size), "overview", grid, *sight.made(grid))
        return ImagePlan.laid((width, height), (crop,), (Block(0),))

    def resized(self, width: int, height: int, step: int) -> tuple[int, int]:
        """(width, height) in pixels, both multiples of `step`. Scaling is in floating point, as in the released code: in whole numbers a
        quotient that is one would not fall short of it."""
        low, high = self.least_tokens * step**2, self.most_tokens * step**2
        sides = [half_even(side, step) * step for side in (width, height)]
        if sides[0] * sides[1] > high:
            shrink = math.sqrt((height * width) / high)
            sides = [max(step, math.floor(side / shrink / step) * step) for side in (width, height)]
        elif sides[0] * sides[1] < low:
            grow = math.sqrt(low / (height * width))
            sides = [math.ceil(side * grow / step) * step for side in (width, height)]
        w, h = (max(step, side) for side in sides)
        return w, h
