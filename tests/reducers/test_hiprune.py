"""HiPrune against loops over the grid, the counts and the corner of its card, and what every selection must hold."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from foveate import FoveateError
from foveate.contract import ReceivedAttention, View
from foveate.reducers.hiprune import HiPrune
from foveate.tokens import budget
from tests.reducers.ragged import Ragged, batches, check_raster, check_rows, counted, crops, keeps, kept, make

quick = settings(max_examples=20)


def oracle(cells: list[tuple[int, int]], object_: list[float], deep: list[float], left: int, alpha: float) -> list[int]:
    """Anchors, their neighbours, and the rest by the deep block."""
    n = len(cells)

    def ranked(score: list[float]) -> list[int]:
        return sorted(range(n), key=lambda i: (-score[i], i))

    anchors = ranked(object_)[: int(alpha * left / 5 + 0.5)]
    beside = {(r + dr, c + dc) for i in anchors for r, c in [cells[i]] for dr, dc in [(0, 1), (0, -1), (1, 0), (-1, 0)]}
    buffers = [i for i in ranked(deep) if cells[i] in beside and i not in anchors]
    rest = [i for i in ranked(deep) if i not in anchors and i not in buffers]
    return sorted((anchors + buffers + rest)[:left])


def view(batch: Ragged, object_: Tensor, deep: Tensor) -> View:
    return View.of(batch.tokens, layout=batch.layout, signals={ReceivedAttention(9): object_, ReceivedAttention(-2): deep})


@quick
@given(batches(), keeps, st.sampled_from([0.0, 0.1, 0.5, 1.0]), st.integers(0, 99))
def test_each_image_of_a_ragged_batch(batch: Ragged, keep: Any, alpha: float, seed: int) -> None:
    reducer = HiPrune(keep, alpha=alpha)
    object_, deep = torch.rand(2, *batch.layout.shape, generator=torch.Generator().manual_seed(seed))
    token_map = reducer.reduce(view(batch, object_, deep)).map
    for row, slots in batch.images():
        left = budget(keep, len(slots))
        cells = [(int(r), int(c)) for r, c in batch.layout.place[row, slots, 3:]]
        picks = oracle(cells, object_[row, slots].tolist(), deep[row, slots].tolist(), left, alpha)
        assert [i for i in kept(token_map, row) if i in slots] == [slots[i] for i in picks]
        assert counted(reducer, len(slots), len(slots)) == left
    check_raster(batch, token_map, [budget(keep, r * c) for r, c in batch.grids])
    alone = [
        view(row, object_[b : b + 1, start:end], deep[b : b + 1, start:end])
        for b, (row, (start, end)) in enumerate(zip(batch.rows, batch.spans, strict=True))
    ]
    check_rows(batch, token_map, [reducer.reduce(single).map for single in alone])


def picked(side: int, anchor: int, T: int, deep: Tensor, alpha: float = 0.1) -> list[int]:
    """What stays of one square image with one best anchor."""
    batch = make([[(side, side), 1]])
    object_ = torch.zeros(1, side * side + 1)
    object_[0, anchor] = 1.0
    return [i for i in kept(HiPrune(T, alpha=alpha).reduce(view(batch, object_, deep)).map) if i < side * side]


def test_counts_of_the_card() -> None:
    """T = 64 and alpha = 0.1: an anchor, its four neighbours and 59 registers."""
    deep = torch.zeros(1, 24 * 24 + 1)
    deep[0, :100] = torch.linspace(0.2, 0.1, 100)
    anchor = 24 * 12 + 12
    found = picked(24, anchor, 64, deep)
    assert len(found) == 64
    assert found == [*range(59), anchor - 24, anchor - 1, anchor, anchor + 1, anchor + 24]


def test_a_corner_has_two_neighbours_and_the_rest_fills() -> None:
    deep = torch.zeros(1, 26)
    deep[0, 20:25] = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5])
    assert picked(5, 0, 8, deep, alpha=0.6) == [0, 1, 5, 20, 21, 22, 23, 24]
    assert picked(5, 4, 8, deep, alpha=0.6) == [3, 4, 9, 20, 21, 22, 23, 24]  # a row's end is not beside the next one's beginning


def test_tiles_are_not_beside_each_other_and_patches_of_no_raster_beside_none() -> None:
    batch = make([[(2, 4), 1]])
    object_, deep = torch.tensor([[0, 0, 1.0, 0, 0, 0, 0, 0, 0]]), torch.tensor([[0, 0.1, 0, 0, 0.2, 0.1, 0, 0.3, 0]])
    split = crops(batch, torch.where(batch.layout.place[..., 4] < 2, 0, 1))
    # Three of each tile's four: of the second tile patch 2 with its neighbours 3 and 6; patch 1 lies in the first.
    assert kept(HiPrune(3, alpha=1.0).reduce(view(split, object_, deep)).map) == [0, 1, 2, 3, 4, 6, 8]
    batch.layout.place[..., 3:] = -1
    assert kept(HiPrune(4, alpha=1.0).reduce(view(batch, object_, deep)).map) == [1, 2, 4, 7, 8]


@pytest.mark.parametrize("keep", [1.0, 16, 64])
def test_keeping_everything_is_the_identity(keep: Any) -> None:
    batch = make([[1, (4, 4), 2], [3]], left=True)
    assert HiPrune(keep).reduce(view(batch, *torch.rand(2, *batch.layout.shape))).map.is_identity


@pytest.mark.parametrize("options", [{"keep": 0}, {"alpha": 1.5}, {"alpha": 1}, {"object": 0.5}, {"layer": "last"}, {"scope": "sample"}])
def test_options_that_are_not_possible(options: dict[str, Any]) -> None:
    with pytest.raises(FoveateError, match=next(iter(options))):
        HiPrune(**options)
