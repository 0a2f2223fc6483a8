import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.bridges.bridge_oracle import window_merge

from foveate.bridges.windows import window_boxes, window_grid, window_partition
from foveate.errors import FoveateError


def test_windows_of_a_4_x_4_grid() -> None:
    """Reference, property 2."""
    patches = torch.arange(16).view(1, 16, 1)
    windows = window_partition(patches, (4, 4), 2)
    assert windows[..., 0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    assert torch.equal(window_merge(windows, (4, 4), 2), patches)


@given(down=st.integers(1, 4), across=st.integers(1, 4), window=st.integers(1, 4), images=st.integers(0, 3))
def test_merge_is_the_exact_inverse_of_partition(down: int, across: int, window: int, images: int) -> None:
    grid = (down * window, across * window)
    x = torch.randn(images, grid[0] * grid[1], 2)
    y = window_partition(x, grid, window)
    assert y.shape == (images * down * across, window * window, 2)
    assert torch.equal(window_merge(y, grid, window), x)
    assert torch.equal(window_partition(window_merge(y, grid, window), grid, window), y)


@given(down=st.integers(1, 4), across=st.integers(1, 4), window=st.integers(1, 4))
def test_boxes_hold_the_patches_of_their_windows(down: int, across: int, window: int) -> None:
    grid = (down * window, across * window)
    ids = window_partition(torch.arange(grid[0] * grid[1]).view(1, -1, 1), grid, window)[..., 0].tolist()
    assert ids == [[r * grid[1] + c for r in range(r0, r1) for c in range(c0, c1)] for r0, c0, r1, c1 in window_boxes(grid, window)]


def test_partition_takes_a_view_without_cls() -> None:
    x = torch.randn(2, 17, 3)
    assert torch.equal(window_partition(x[:, 1:], (4, 4), 2), window_partition(x[:, 1:].contiguous(), (4, 4), 2))


@pytest.mark.parametrize("grid", [(6, 4), (4, 6)])
def test_a_window_has_to_divide_both_sides(grid: tuple[int, int]) -> None:
    with pytest.raises(FoveateError, match=f"window 4 does not divide the grid of {grid[0]} x {grid[1]} patches"):
        window_grid(grid, 4)
