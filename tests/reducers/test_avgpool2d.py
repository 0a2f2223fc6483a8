"""Two-dimensional pooling against torch's own, image by image, and what every merge must hold."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from foveate import FoveateError
from foveate.contract import BeforeLM, FromLayer, View
from foveate.reducers.avgpool2d import AvgPool2d
from foveate.reducers.divprune import DivPrune
from foveate.tokens import Layout, TokenMap
from tests.reducers.ragged import Ragged, batches, check_raster, check_rows, counted, edges, make

quick = settings(max_examples=25)


def pooled(stride: int, batch: Ragged) -> TokenMap:
    return AvgPool2d(stride).reduce(batch.view()).map


def oracle(x_LD: Tensor, grid: tuple[int, int], stride: int) -> Tensor:
    x = torch.nn.functional.avg_pool2d(x_LD.double().T.reshape(1, -1, *grid), stride)
    return x.flatten(2)[0].T.to(x_LD.dtype)


@quick
@given(batches(least=3), st.integers(1, 3))
def test_each_image_of_a_ragged_batch(batch: Ragged, stride: int) -> None:
    token_map = pooled(stride, batch)
    applied = token_map.apply(batch.tokens)
    for image, ((row, slots), grid) in enumerate(zip(batch.images(), batch.grids, strict=True)):
        at = token_map.target.visual[row] & (token_map.target.image[row] == image)
        torch.testing.assert_close(applied[row, at], oracle(batch.tokens[row, slots], grid, stride))
        assert token_map.target.size[row, at].tolist() == [stride**2] * int(at.sum())
    check_raster(batch, token_map, [(r // stride) * (c // stride) for r, c in batch.grids])
    check_rows(batch, token_map, [pooled(stride, row) for row in batch.rows])


@pytest.mark.parametrize("side", range(1, 9))
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_count_of_a_square_and_of_whole_cells(side: int, stride: int) -> None:
    reducer = AvgPool2d(stride)
    for grid in ((side, side), (stride * side, 2 * stride)):
        if min(grid) >= stride:
            target = pooled(stride, make([[grid]])).target
            assert int(target.visual.sum()) == counted(reducer, grid[0] * grid[1], grid[0] * grid[1])


def test_places_are_the_upper_left_of_the_four_in_the_middle() -> None:
    batch = make([[1, (4, 6), 1]])
    assert [r for r, _ in edges(pooled(2, batch), 0)] == [0, 1, 3, 5, 13, 15, 17, 25]
    assert edges(pooled(2, batch), 0)[1][1] == [(1, 0.25), (2, 0.25), (7, 0.25), (8, 0.25)]
    assert [r for r, _ in edges(pooled(3, batch), 0)] == [0, 8, 11, 25]


def test_crops_and_frames_are_pooled_each_on_its_own() -> None:
    """Two tiles side by side in the sequence, each a grid that begins at row 0."""
    x = torch.randn(1, 18, 3)
    layout = Layout.sequence(torch.ones(1, 18, dtype=torch.bool))
    for axis in (1, 2):
        place = layout.place.clone()
        place[..., axis], place[..., 3], place[..., 4] = torch.arange(18) // 9, torch.arange(9).repeat(2) // 3, torch.arange(18) % 3
        view = View.of(x, layout=replace(layout, place=place))
        torch.testing.assert_close(AvgPool2d(3).reduce(view).map.apply(x)[0], x.view(2, 9, 3).mean(1))


def test_twice_is_once_by_the_product() -> None:
    batch = make([[1, (8, 4), 2]], left=True)
    once = pooled(2, batch)
    twice = once.then(AvgPool2d(2).reduce(View(once.target)).map)
    torch.testing.assert_close(twice.apply(batch.tokens), pooled(4, batch).apply(batch.tokens))


def test_gradients() -> None:
    batch = make([[1, (2, 3), 1]])
    x = batch.tokens.clone().requires_grad_()
    pooled(2, batch).apply(x)[0, 1].sum().backward()
    assert x.grad is not None
    assert x.grad[0, :, 0].tolist() == [0, 0.25, 0.25, 0, 0.25, 0.25, 0, 0]


def test_stride_1_is_the_identity() -> None:
    assert pooled(1, make([[1, (4, 4), 2], [3]], left=True)).is_identity
    assert AvgPool2d(1).reduce(View(Layout.sequence(torch.ones(1, 5, dtype=torch.bool)))).map.is_identity


def test_a_text_only_batch() -> None:
    assert pooled(2, make([[3], [2]])).is_identity


def test_sites() -> None:
    assert AvgPool2d().sites(4) == [BeforeLM()]
    assert AvgPool2d(layer=2).sites(4) == [FromLayer(2)]


def test_images_that_are_no_grid() -> None:
    with pytest.raises(FoveateError, match="the 5 tokens of image 0 are no full grid"):
        AvgPool2d().reduce(View(Layout.sequence(torch.ones(1, 5, dtype=torch.bool))))
    batch = make([[1, (4, 4), 2]])
    pruned = DivPrune(10).reduce(batch.view()).map.target
    with pytest.raises(FoveateError, match="the 10 tokens of image 0 are no full grid"):
        AvgPool2d().reduce(View(pruned))
    twice = replace(batch.layout, place=batch.layout.place.clone())
    twice.place[0, 2] = twice.place[0, 1]
    with pytest.raises(FoveateError, match="no full grid"):
        AvgPool2d().reduce(View(twice))


def test_a_grid_smaller_than_the_stride() -> None:
    with pytest.raises(FoveateError, match="stride 3 is larger than the 2 x 4 tokens"):
        pooled(3, make([[(2, 4)]]))


@pytest.mark.parametrize("options", [{"stride": 0}, {"stride": 2.0}, {"stride": True}, {"layer": -1}, {"positions": "x"}])
def test_options_that_are_not_possible(options: dict[str, Any]) -> None:
    with pytest.raises(FoveateError, match=next(iter(options))):
        AvgPool2d(**options)
