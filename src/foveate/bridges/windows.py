"""Non-overlapping square windows on a grid of patches: pure functions that the bridges share."""

from torch import Tensor

from foveate.errors import FoveateError

Grid = tuple[int, int]
Box = tuple[int, int, int, int]


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
