"""What several tilings share: how a grid is chosen, and how views are cut from it. All of it in whole numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from fractions import Fraction

from foveate.errors import FoveateError
from foveate.tilings.base import Pair, Sight
from foveate.tokens import Canvas, Crop

Grid = Pair
"""(rows, columns) of tiles."""


# ---- choosing --------------------------------------------------------------------------------------------------------------------------


def fitted(width: int, height: int, wide: int, high: int) -> Pair:
    """(width, height) of a picture as large as it can be within `wide` x `high` pixels, rounded down."""
    return (wide, wide * height // width) if wide * height <= high * width else (high * width // height, high)


def effective(width: int, height: int, grid: Grid, side: int) -> Pair:
    """(effective, wasted) pixels of a grid: those that carry information, and the others."""
    rows, columns = grid
    w, h = fitted(width, height, columns * side, rows * side)
    useful = min(w * h, width * height)
    return useful, rows * columns * side * side - useful


def best_fit(width: int, height: int, grids: Iterable[Grid], side: int) -> Grid:
    """The grid with the most effective pixels, then the least waste; of two that tie the first."""

    def worth(grid: Grid) -> Pair:
        useful, wasted = effective(width, height, grid, side)
        return useful, -wasted

    return max(grids, key=worth)


def nearest_aspect(width: int, height: int, grids: Iterable[Grid], side: int) -> Grid | None:
    """The grid of the nearest aspect ratio. Of two that tie the later, which is the larger, if it has at most twice the image's pixels.

    Ratios are compared in floating point, as in the released code: 7/12 lies as far from 1/2 as from 2/3, and there is nearer to the
    latter."""
    found, best = None, math.inf
    for rows, columns in sorted(grids, key=lambda grid: (grid[0] * grid[1], grid[1])):
        apart = abs(width / height - columns / rows)
        if apart < best or (apart == best and 2 * width * height > side * side * rows * columns):
            found, best = (rows, columns), apart
    return found


def within(fewest: int, most: int) -> list[Grid]:
    """All grids of `fewest` to `most` tiles."""
    return [(r, c) for r in range(1, most + 1) for c in range(1, most // r + 1) if fewest <= r * c]


def half_even(number: int, divisor: int) -> int:
    """`number` / `divisor` rounded as Python rounds: halves to the even neighbour."""
    return round(Fraction(number, divisor))


def read_grids(text: str, what: str) -> list[Grid]:
    """ "1x2/2x2": grids of rows x columns, in the order in which they are tried; "1x1..3x3": all between two, row after row."""
    try:
        if ".." in text:
            (r0, c0), (r1, c1) = (map(int, end.split("x")) for end in text.split(".."))
            found = [(r, c) for r in range(r0, r1 + 1) for c in range(c0, c1 + 1)]
        else:
            found = [(rows, columns) for rows, columns in (map(int, grid.split("x")) for grid in text.split("/"))]
    except (ValueError, AttributeError):
        found = []
    if not found or min(map(min, found)) < 1:
        raise FoveateError(
            f'{what}: grids={text!r} cannot be read; write rows x columns as in "1x2/2x1/2x2", or a range such as "1x1..3x3"'
        )
    return found


# ---- cutting ---------------------------------------------------------------------------------------------------------------------------


def overview(sight: Sight, kind: str = "overview") -> Crop:
    """The whole image resized to one view, whatever its shape."""
    side = sight.side
    return square(Canvas((side, side), (side, side)), (0, 0), sight, kind)


def square(canvas: Canvas, at: Pair, sight: Sight, kind: str, every: int = 1) -> Crop:
    """The view whose upper left corner is at a place of a canvas."""
    reach = (sight.side - 1) * every + 1
    grid = sight.grid(sight.side, sight.side)
    return Crop.of(canvas, (*at, at[0] + reach, at[1] + reach), kind, grid, *sight.made(grid), every)


def tiles(canvas: Canvas, grid: Grid, sight: Sight, kind: str = "tile") -> tuple[Crop, ...]:
    """The tiles of a canvas, row after row."""
    side = sight.side
    return tuple(square(canvas, (c * side, r * side), sight, kind) for r in range(grid[0]) for c in range(grid[1]))


def stretched(grid: Grid, sight: Sight) -> Canvas:
    """A canvas of a grid that the picture fills, whatever its shape."""
    size = grid[1] * sight.side, grid[0] * sight.side
    return Canvas(size, size)


def padded(width: int, height: int, grid: Grid, sight: Sight, fill: int = 0) -> Canvas:
    """A canvas of a grid with the picture as large as it fits in the middle. The shorter side is rounded up, in floating point as in the
    released code, where 300 * (336 / 300) is a little more than 336."""
    wide, high = grid[1] * sight.side, grid[0] * sight.side
    across, down = wide / width, high / height
    shorter = min(math.ceil(height * across), high) if across < down else min(math.ceil(width * down), wide)
    picture = (wide, shorter) if across < down else (shorter, high)
    return Canvas((wide, high), picture, ((wide - picture[0]) // 2, (high - picture[1]) // 2), fill)
