"""The parts that methods for videos share: tables of clips, changes, budgets shared out to the token, segments, maps."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.reducers.common import dealt
from foveate.reducers.frames import best, clips, earlier, means, mixed, segments, selected, spaced, unlike
from tests.reducers.moving import film, make

quick = settings(max_examples=30)


def test_a_clip_is_a_table_of_frames_and_places() -> None:
    shape = (3, 2, 2)
    batch = make([[shape]], [[film(shape)]], missing={(1, 0, 1)})
    (table,) = clips(batch.layout)
    assert table.tolist() == [[1, 2, 3, 4], [6, -1, 7, 8], [10, 11, 12, 13]]  # a text behind each frame
    assert earlier(table).tolist() == [[-1] * 4, [1, 2, 3, 4], [6, 2, 7, 8]]  # the place that was left out: as it was before


def test_pictures_are_clips_of_one_frame_and_a_sample_is_one_clip() -> None:
    batch = make([[(1, 2, 2), (1, 2, 2)], [(2, 1, 3)]], [[film((1, 2, 2))] * 2, [film((2, 1, 3))]])
    assert [tuple(table.shape) for table in clips(batch.layout)] == [(1, 4), (1, 4), (2, 3)]
    assert [tuple(table.shape) for table in clips(batch.layout, "sample")] == [(2, 4), (2, 3)]


def test_without_rows_and_columns_a_place_is_a_rank() -> None:
    batch = make([[(2, 1, 3)]], [[film((2, 1, 3))]])
    batch.layout.place[..., 3:] = -1
    assert [table.tolist() for table in clips(batch.layout)] == [[[1, 2, 3], [5, 6, 7]]]


def test_unlike_is_one_minus_the_cosine() -> None:
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0], [3.0, 0.0], [math.nan, 0.0]])
    found = unlike(x, torch.tensor([0, 0, 0, 0, 0, -1]), torch.tensor([1, 2, 3, 4, -1, 0]))
    assert found.tolist() == [1.0, pytest.approx(1 - 0.5**0.5, abs=1e-6), 0.0, math.inf, math.inf, math.inf]


def test_what_did_not_change_is_not_unlike_at_all() -> None:
    x = torch.randn(50, 33)
    slots = torch.arange(50)
    assert unlike(torch.cat([x, 3 * x]), slots, slots + 50).tolist() == [0.0] * 50


def test_means_leave_out_what_is_not_there() -> None:
    x = torch.tensor([[1.0], [3.0], [8.0]])
    assert means(x, torch.tensor([[0, 1], [2, -1]])).tolist() == [[2.0], [8.0]]


def test_the_best_of_equal_ones_is_the_first() -> None:
    assert best(torch.tensor([1.0, 2.0, 2.0, 0.0, 2.0]), 2).tolist() == [1, 2]
    assert best(torch.tensor([1.0, math.nan, 2.0]), 1).tolist() == [1]


# ---- largest remainders


@pytest.mark.parametrize(
    ("total", "weights", "most", "least", "given"),
    [
        (10, [3, 3, 2, 1], [10] * 4, 0, [4, 3, 2, 1]),
        (20, [0.4375, 0.1875, 0.1875, 0.1875], [20] * 4, 1, [9, 4, 4, 3]),
        (7, [1, 1, 1], [9] * 3, 0, [3, 2, 2]),
        (10, [100, 1, 1], [4, 9, 9], 0, [4, 3, 3]),  # who passes the cap stands at it, the others share the rest
        (10, [100, 1, 1], [20] * 3, 2, [6, 2, 2]),
        (3, [0, 0, 0], [9] * 3, 0, [1, 1, 1]),
        (3, [math.nan, 1, 1], [9] * 3, 0, [1, 1, 1]),
        (2, [5, 1, 1], [9] * 3, 1, [2, 0, 0]),  # too few for everyone's least
        (9, [1, 1], [2, 3], 0, [2, 3]),
        (0, [1, 2], [3, 3], 1, [0, 0]),
        (5, [], [], 0, []),
    ],
)
def test_a_total_is_shared_out_to_the_token(total: int, weights: list[float], most: list[int], least: int, given: list[int]) -> None:
    assert dealt(total, weights, most, least) == given


@quick
@given(st.data())
def test_shares_hold_their_bounds_and_their_sum(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 6))
    most = data.draw(st.lists(st.integers(0, 9), min_size=n, max_size=n))
    weights = data.draw(st.lists(st.floats(0, 9), min_size=n, max_size=n))
    total, least = data.draw(st.integers(0, 60)), data.draw(st.integers(0, 3))
    found = dealt(total, weights, most, least)
    assert sum(found) == min(total, sum(most))
    floors = [min(least, cap) for cap in most]
    enough = sum(floors) <= total
    assert all((low if enough else 0) <= value <= cap for low, value, cap in zip(floors, found, most, strict=True))
    if least == 0 and all(cap == 9 for cap in most) and sum(found) < sum(most) and sum(weights) > 0:
        quota = [min(total, sum(most)) * weight / sum(weights) for weight in weights]
        if max(quota) <= 9:
            assert all(abs(value - wanted) < 1 for value, wanted in zip(found, quota, strict=True))


def test_frames_are_spaced_by_the_middles_of_equal_parts() -> None:
    assert [spaced(8, n) for n in (1, 2, 4, 8)] == [[4], [2, 6], [1, 3, 5, 7], list(range(8))]
    assert spaced(5, 3) == [0, 2, 4]


# ---- segments


@pytest.mark.parametrize(
    ("similarity", "at_least", "below", "lengths"),
    [
        ([0.95, 0.5, 0.95], 1, 0.9, [2, 2]),
        ([0.95, 0.5, 0.94], 3, 0.9, [2, 1, 1]),
        ([1.0, 1.0, 1.0], 3, 0.9, [1, 1, 2]),  # of equal ones the first
        ([0.1, 0.2], 8, 0.9, [1, 1, 1]),  # fewer frames than segments
        ([], 8, 0.9, [1]),
        ([math.nan, 1.0], 1, 0.9, [1, 2]),
    ],
)
def test_segments(similarity: list[float], at_least: int, below: float, lengths: list[int]) -> None:
    found = segments(similarity, at_least, below)
    assert [len(part) for part in found] == lengths
    assert [f for part in found for f in part] == list(range(len(similarity) + 1))


# ---- maps


def test_a_source_may_go_into_several_targets() -> None:
    batch = make([[(2, 1, 2)], [(1, 1, 1)]], [[film((2, 1, 2))], [film((1, 1, 1))]])
    layout, N = batch.layout, batch.layout.shape[1]  # slots 1, 2 and 4, 5; in the second row slot 1
    some = torch.tensor([1, 1, 4, 4]), torch.tensor([1, 5, 4, 5]), torch.tensor([0.5, 0.5, 0.75, 0.25], dtype=torch.float64)
    token_map = mixed(layout, [some, selected(torch.tensor([N + 1]))])
    assert token_map.representative.tolist() == [[0, 1, 3, 4, 6], [0, 1, 2, -1, -1]]
    x = batch.view.tokens
    assert x is not None
    y = token_map.apply(x)
    assert torch.allclose(y[0, 1], 0.5 * x[0, 1] + 0.5 * x[0, 5])
    assert torch.allclose(y[0, 3], 0.75 * x[0, 4] + 0.25 * x[0, 5])
    assert torch.equal(y[0, [0, 2, 4]], x[0, [0, 3, 6]])
    assert token_map.target.size[0].tolist() == [0, 2, 0, 2, 0]


def test_edges_that_select_are_a_selection_and_none_leave_text_alone() -> None:
    batch = make([[(2, 1, 2)]], [[film((2, 1, 2))]])
    slots = batch.layout.visual.flatten().nonzero()[:, 0]
    assert mixed(batch.layout, [selected(slots)]).is_identity
    assert mixed(batch.layout, []).representative.tolist() == [[0, 3, 6]]
