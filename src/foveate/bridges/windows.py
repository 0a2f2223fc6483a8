"""Windows on a grid of patches, and their places: pure functions that the bridges share."""

import math
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from foveate.errors import FoveateError

Grid = tuple[int, int]
Box = tuple[int, int, int, int]

WAVES = 4  # of each axis: half a period, one, two and four over the image


def window_grid(grid: Grid, window: int, what: str = "window") -> Grid:
    """(rows, columns) of windows of side `window` on a grid of (rows, columns) patches. `what` names the number in the error."""
    rows, columns = grid
    if rows < 1 or columns < 1:
        raise FoveateError(f"a grid needs at least one row and one column of patches, got {rows} x {columns}")
    if rows % window or columns % window:
        raise FoveateError(
            f"{what} {window} does not divide the grid of {rows} x {columns} patches; choose a divisor of both sides or another image size"
        )
    return rows // window, columns // window


def window_partition(x: Tensor, grid: Grid, window: int) -> Tensor:
    """(B, rows * columns, C) in raster order -> (B * windows, window², C): windows in raster order, patches in raster order inside each."""
    down, across = window_grid(grid, window)
    x = x.reshape(x.shape[0], down, window, across, window, x.shape[-1])
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, window * window, x.shape[-1])


def window_boxes(grid: Grid, window: int) -> list[Box]:
    """(row0, column0, row1, column1) of each window in raster order, in patches, half-open."""
    down, across = window_grid(grid, window)
    return [(r * window, c * window, (r + 1) * window, (c + 1) * window) for r in range(down) for c in range(across)]


def adaptive_boxes(grid: Grid, side: int) -> list[Box]:
    """The windows over which `adaptive_pool` takes its means, in raster order; where `side` divides no side of the grid they overlap.

    FoveateError for a grid with fewer rows or columns."""
    rows, columns = window_grid(grid, 1)
    if side > min(rows, columns):
        raise FoveateError(f"side {side} is more than a grid of {rows} x {columns} patches has; take fewer tokens or larger images")
    down, across = ([(i * n // side, -(-(i + 1) * n // side)) for i in range(side)] for n in (rows, columns))
    return [(top, left, bottom, right) for top, bottom in down for left, right in across]


def adaptive_pool(x: Tensor, side: int) -> Tensor:
    """(N, C, rows, columns) -> the means (N, C, side, side)."""
    return F.adaptive_avg_pool2d(x, side)


def square_only(kind: str, side: int, grid: Grid) -> None:
    """FoveateError unless the grid is the one that a bridge was made for, `side` x `side`."""
    if tuple(grid) != (side, side):
        raise FoveateError(
            f"this {kind} bridge is made for a grid of {side} x {side} patches, got {grid[0]} x {grid[1]}; use images of that size, or "
            "make a bridge for another grid"
        )


@lru_cache(maxsize=8)
def sines(grid: Grid, width: int) -> Tensor:
    """(rows * columns, width) float32: sines and cosines of the column in the first half, of the row in the second, at frequencies from 1
    down to 1 / 10000. FoveateError for a width that is no multiple of 4."""
    if width % 4:
        raise FoveateError(f"sines and cosines of rows and columns need a width that is a multiple of 4, not {width}")
    with torch.device("cpu"), torch.inference_mode(False):
        row, column = (torch.arange(n)[:, None] / 10000 ** (torch.arange(width // 4) / (width / 4)) for n in grid)
        down, across = (torch.cat([angles.sin(), angles.cos()], dim=1) for angles in (row, column))
        return torch.cat([across.repeat(grid[0], 1), down.repeat_interleave(grid[1], 0)], dim=1)


def waves(grid: Grid, like: Tensor) -> Tensor:
    """(rows * columns, 4 * WAVES) as `like`: of the centre (y, x) of each patch in shares of the image, in raster order, sin and cos of
    π 2^k y, then of π 2^k x, for k below WAVES."""
    rows, columns = grid
    down, across = ((torch.arange(n, device=like.device, dtype=torch.float32) + 0.5) / n for n in (rows, columns))
    centres = torch.stack([down[:, None].expand(grid), across.expand(grid)], -1).reshape(-1, 2, 1)
    angles = centres * (math.pi * 2 ** torch.arange(WAVES, device=like.device))
    return torch.stack([angles.sin(), angles.cos()], 2).flatten(1).to(like.dtype)
