"""VScan against loops over windows and groups, the counts of its card, and what every merge must hold."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from foveate import FoveateError
from foveate.contract import Attention, AttentionRows, ClsAttention, View
from foveate.reducers.vscan import VScan
from foveate.tokens import budget
from tests.reducers.ragged import Ragged, batches, check_raster, check_rows, counted, edges, keeps, kept, make

quick = settings(max_examples=20)


def chosen(grid: tuple[int, int], near: list[float], far: list[float], left: int, windows: int) -> list[int]:
    """Local ones window by window, then global ones."""
    rows, columns = grid
    local: list[int] = []
    for wr in range(windows):
        for wc in range(windows):
            inside = [i for i in range(rows * columns) if (i // columns * windows // rows, i % columns * windows // columns) == (wr, wc)]
            local += sorted(inside, key=lambda i: (-near[i], i))[: left // 2 // windows**2]
    others = sorted((i for i in range(rows * columns) if i not in local), key=lambda i: (-far[i], i))
    return sorted(local + others[: left - len(local)])


def oracle(states: Tensor, picks: list[int]) -> dict[int, list[int]]:
    """Which patches each kept one stands for."""
    x = states.double().numpy()
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    groups = {i: [i] for i in picks}
    for j in range(len(x)):
        if j not in picks:
            groups[picks[int(np.argmax([x[j] @ x[i] for i in picks]))]].append(j)
    return groups


def view(batch: Ragged, near: Tensor, far: Tensor) -> View:
    return View.of(batch.tokens, layout=batch.layout, signals={ClsAttention(5): near, ClsAttention(-2): far})


@quick
@given(batches(), keeps, st.sampled_from([1, 2, 4]), st.integers(0, 99))
def test_each_image_of_a_ragged_batch(batch: Ragged, keep: Any, windows: int, seed: int) -> None:
    reducer = VScan(keep, windows=windows)
    near, far = torch.rand(2, *batch.layout.shape, generator=torch.Generator().manual_seed(seed))
    token_map = reducer.reduce(view(batch, near, far)).map
    for (row, slots), grid in zip(batch.images(), batch.grids, strict=True):
        left = budget(keep, len(slots))
        groups = oracle(batch.tokens[row, slots], chosen(grid, near[row, slots].tolist(), far[row, slots].tolist(), left, windows))
        found = {slots.index(r): members for r, members in edges(token_map, row) if r in slots}
        assert {r: [slots.index(s) for s, _ in members] for r, members in found.items()} == {r: sorted(m) for r, m in groups.items()}
        for members in found.values():
            assert [w for _, w in members] == pytest.approx([1 / len(members)] * len(members))
        assert counted(reducer, len(slots), len(slots)) == left
    check_raster(batch, token_map, [budget(keep, r * c) for r, c in batch.grids])
    alone = [
        view(row, near[b : b + 1, start:end], far[b : b + 1, start:end])
        for b, (row, (start, end)) in enumerate(zip(batch.rows, batch.spans, strict=True))
    ]
    check_rows(batch, token_map, [reducer.reduce(single).map for single in alone])


def test_counts_of_the_card() -> None:
    """T = 100 on 24 x 24: 3 in each of 16 windows; theirs keeps 98, here the global ones take what is left."""
    batch = make([[(24, 24), 1]])
    near, far = torch.rand(2, *batch.layout.shape)
    picks = [i for i in kept(VScan(100).reduce(view(batch, near, far)).map) if i < 576]
    assert len(picks) == 100
    windows = [(i // 24 // 6) * 4 + i % 24 // 6 for i in picks]
    assert min(windows.count(w) for w in range(16)) >= 3
    assert VScan(96).visual_tokens(576, 32) == [96] * 16 + [32] * 16
    assert VScan().visual_tokens(576, 32) == [96] * 16 + [32] * 16
    assert VScan().positions == "renumber"


def test_equal_patches_merge_to_themselves() -> None:
    batch = make([[(3, 4), 1]])
    batch.tokens[0, :12] = torch.randn(6)
    token_map = VScan(3).reduce(view(batch, *torch.rand(2, 1, 13))).map
    torch.testing.assert_close(token_map.apply(batch.tokens)[0, :3], batch.tokens[0, :3])


def test_patches_of_no_raster_are_one_window() -> None:
    batch = make([[(3, 4), 1]])
    near, far = torch.rand(2, 1, 13)
    batch.layout.place[..., 3:] = -1
    found = [i for i in kept(VScan(8, windows=2).reduce(view(batch, near, far)).map) if i < 12]
    best = int(near[0, :12].argmax())
    assert found == sorted([best, *[i for i in far[0, :12].argsort(descending=True).tolist() if i != best][:7]])


def test_late_it_ranks_by_the_asking_row() -> None:
    batch = make([[(2, 3), 2]])
    weights = torch.rand(1, 2, 8, 8)
    at = View.of(batch.tokens, layout=batch.layout, signals={Attention(15): AttentionRows.of(weights)})
    best = weights.mean(1)[0, 7, :6].argsort(descending=True)[:2].sort().values.tolist()
    assert kept(VScan().reduce(at, stage=1).map) == [*best, 6, 7]
    assert counted(VScan(), 6, 6, stage=1) == 2


@pytest.mark.parametrize("keep", [1.0, 16, 64])
def test_keeping_everything_is_the_identity(keep: Any) -> None:
    batch = make([[1, (4, 4), 2], [3]], left=True)
    assert VScan(keep, rest=1.0).reduce(view(batch, *torch.rand(2, *batch.layout.shape))).map.is_identity


@pytest.mark.parametrize(
    "options", [{"keep": 0}, {"rest": 0}, {"late": 0}, {"windows": 0}, {"local": 0.5}, {"layer": "last"}, {"scope": "sample"}]
)
def test_options_that_are_not_possible(options: dict[str, Any]) -> None:
    with pytest.raises(FoveateError, match="keep" if next(iter(options)) == "rest" else next(iter(options))):
        VScan(**options)
