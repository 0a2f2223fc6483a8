"""Evenly spaced selection: exact counts, even spacing, and what every selection must hold."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate import FoveateError
from foveate.contract import BeforeLM, FromLayer, View
from foveate.reducers.uniform import Uniform, subgrid
from foveate.tokens import Layout, TokenMap, budget
from tests.reducers.ragged import Ragged, batches, check_raster, check_rows, counted, crops, keeps, kept, make

quick = settings(max_examples=40)


def reduced(reducer: Uniform, batch: Ragged) -> TokenMap:
    return reducer.reduce(batch.view()).map


@quick
@given(st.integers(1, 9), st.integers(1, 9), st.data())
def test_a_subgrid_is_exact_and_even(rows: int, columns: int, data: st.DataObject) -> None:
    tokens = data.draw(st.integers(0, rows * columns))
    cells = subgrid(rows, columns, tokens)
    assert len(set(cells)) == len(cells) == tokens
    assert cells == sorted(cells)
    assert all(0 <= r < rows and 0 <= c < columns for r, c in cells)
    used = sorted({r for r, _ in cells})
    shares = [sum(r == row for r, _ in cells) for row in used]
    assert not shares or max(shares) - min(shares) <= 1
    for line in [used, *([c for r, c in cells if r == row] for row in used)]:
        gaps = [b - a for a, b in pairwise(line)]
        assert not gaps or max(gaps) - min(gaps) <= 1


def test_a_quarter_is_every_second_row_and_column() -> None:
    assert subgrid(24, 24, 144) == [(r, c) for r in range(1, 24, 2) for c in range(1, 24, 2)]
    assert subgrid(4, 8, 8) == [(r, c) for r in (1, 3) for c in (1, 3, 5, 7)]


def test_small_examples() -> None:
    assert subgrid(3, 3, 1) == [(1, 1)]
    assert subgrid(4, 4, 4) == [(1, 1), (1, 3), (3, 1), (3, 3)]
    assert subgrid(1, 6, 3) == [(0, 1), (0, 3), (0, 5)]
    assert subgrid(6, 1, 3) == [(1, 0), (3, 0), (5, 0)]
    assert subgrid(2, 9, 10) == [(r, c) for r in (0, 1) for c in (0, 2, 4, 6, 8)]  # one row would be nearer, but has no room
    assert subgrid(3, 3, 5) == [(0, 0), (0, 2), (2, 0), (2, 1), (2, 2)]


@quick
@given(batches(), keeps)
def test_each_image_of_a_ragged_batch(batch: Ragged, keep: Any) -> None:
    reducer = Uniform(keep)
    token_map = reduced(reducer, batch)
    for (row, slots), (rows, columns) in zip(batch.images(), batch.grids, strict=True):
        cells = subgrid(rows, columns, budget(keep, len(slots)))
        assert [i for i in kept(token_map, row) if i in slots] == [slots[r * columns + c] for r, c in cells]
        assert counted(reducer, len(slots), len(slots)) == len(cells)
    check_raster(batch, token_map, [budget(keep, r * c) for r, c in batch.grids])
    check_rows(batch, token_map, [reduced(reducer, row) for row in batch.rows])


def test_without_a_grid_along_the_sequence() -> None:
    layout = Layout.sequence(torch.tensor([[False] + [True] * 9 + [False]]))
    assert kept(Uniform(3).reduce(View(layout)).map) == [0, 2, 5, 8, 10]
    batch = make([[(3, 4)]])
    holed = TokenMap.keep(batch.layout, torch.arange(12)[None] != 5).target  # 11 left of 12: no full grid any more
    assert kept(Uniform(3).reduce(View(holed)).map) == [1, 5, 9]


def test_a_grid_that_has_lost_whole_rows_is_a_grid() -> None:
    batch = make([[(4, 4)]])
    halved = TokenMap.keep(batch.layout, batch.layout.place[..., 3] % 2 == 1).target
    assert kept(Uniform(2).reduce(View(halved)).map) == [5, 7]
    assert kept(Uniform(1).reduce(View(halved)).map) == [6]


@pytest.mark.parametrize("keep", range(1, 22))
def test_crops_share_the_images_number(keep: int) -> None:
    batch = make([[1, (3, 7), 1]])
    rank = batch.layout.rank_in_image
    split = crops(batch, (rank >= 7).to(torch.int64) + (rank >= 14))  # a row of the image each
    target = reduced(Uniform(keep), split).target
    assert target.visual.sum() == keep
    assert all(abs(int((target.place[..., 1] == crop).sum()) - keep / 3) < 1 for crop in range(3))


@pytest.mark.parametrize("of", ["arriving", "original"])
def test_what_the_share_is_of(of: str) -> None:
    batch = make([[1, (4, 4), 1, (2, 4)], [2]])
    first = batch.view()
    cut = Uniform(0.5).reduce(first).map
    view = View(cut.target, cut.apply(batch.tokens), first=first)
    reducer = Uniform(0.375, layer=2, of=of)
    target = reducer.reduce(view).map.target
    numbers = [3, 2] if of == "arriving" else [6, 3]
    assert [int((target.visual & (target.image == i)).sum()) for i in (0, 1)] == numbers
    assert [counted(reducer, 8, 16), counted(reducer, 4, 8)] == numbers
    assert counted(Uniform(10, of=of), 8, 16) == 8


@pytest.mark.parametrize("keep", [1.0, 16, 99])
def test_keeping_everything_is_the_identity(keep: Any) -> None:
    assert reduced(Uniform(keep), make([[1, (4, 4), 2], [3]], left=True)).is_identity


def test_sites() -> None:
    assert Uniform().sites(4) == [BeforeLM()]
    assert Uniform(layer=2).sites(4) == [FromLayer(2)]


@pytest.mark.parametrize("options", [{"keep": 0}, {"keep": 1.5}, {"layer": -1}, {"layer": 0.5}, {"of": "image"}, {"positions": "x"}])
def test_options_that_are_not_possible(options: dict[str, Any]) -> None:
    with pytest.raises(FoveateError, match=next(iter(options))):
        Uniform(**options)
