"""MMTok against sums over every column, the matrix of its card, and what every selection must hold."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from foveate import FoveateError
from foveate.contract import View
from foveate.reducers.mmtok import MMTok, covering
from foveate.tokens import Kind, budget
from tests.reducers.ragged import Ragged, batches, check_raster, check_rows, counted, crops, keeps, kept, make

quick = settings(max_examples=20)
COVER = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.1, 0.1], [0.1, 0.2, 0.1], [0.05, 0.05, 0.3]])


def greedy(cover: "np.ndarray", picks: int) -> list[int]:
    """Each pick makes the sum of the rows' largest chosen entries largest."""
    chosen: list[int] = []
    for _ in range(picks):
        others = [j for j in range(cover.shape[1]) if j not in chosen]
        worth = [float(cover[:, [*chosen, j]].max(1).sum()) for j in others]
        chosen.append(others[int(np.argmax(worth))])
    return chosen


def softmax(x: "np.ndarray") -> "np.ndarray":
    e = np.exp(x - x.max(1, keepdims=True))
    found: np.ndarray = e / e.sum(1, keepdims=True)
    return found


def oracle(states: Tensor, words: Tensor, picks: int) -> list[int]:
    x, e = (t.double().numpy() for t in (states, words))
    x, e = (t / np.linalg.norm(t, axis=1, keepdims=True) for t in (x, e))
    A = softmax(e @ x.T / 0.02) / max(1, len(e)) if len(e) else np.zeros((0, len(x)))
    return greedy(np.concatenate([A, 0.5 * softmax(x @ x.T / 0.2) / len(x)]), picks)


def words_of(batch: Ragged, row: int) -> Tensor:
    return batch.tokens[row, batch.layout.valid[row] & ~batch.layout.visual[row]]


def test_the_matrix_of_the_card() -> None:
    assert covering(COVER, 3).tolist() == [0, 2, 1]
    assert covering(COVER[:, [1, 0, 2]], 3).tolist() == [1, 2, 0]
    assert COVER.sum(0).argsort(descending=True).tolist()[:2] == [0, 1]  # what relevance alone would take
    assert greedy(COVER.numpy(), 3) == [0, 2, 1]


def test_equal_columns_are_picked_in_order_and_never_twice() -> None:
    assert covering(torch.ones(3, 5), 5).tolist() == [0, 1, 2, 3, 4]
    assert covering(torch.zeros(0, 3), 3).tolist() == [0, 1, 2]


@quick
@given(batches(), keeps)
def test_each_image_of_a_ragged_batch(batch: Ragged, keep: Any) -> None:
    reducer = MMTok(keep)
    token_map = reducer.reduce(batch.view()).map
    for row, slots in batch.images():
        left = budget(keep, len(slots))
        found = [i for i in kept(token_map, row) if i in slots]
        assert found == sorted(slots[i] for i in oracle(batch.tokens[row, slots], words_of(batch, row), left))
        assert counted(reducer, len(slots), len(slots)) == left
    check_raster(batch, token_map, [budget(keep, r * c) for r, c in batch.grids])
    check_rows(batch, token_map, [reducer.reduce(row.view()).map for row in batch.rows])


def test_the_set_for_one_token_more_has_the_set_for_fewer() -> None:
    batch = make([[1, (3, 4), 2]])
    sets = [set(kept(MMTok(T).reduce(batch.view()).map)) for T in range(1, 13)]
    assert all(a < b for a, b in pairwise(sets))


def test_the_words_decide_and_without_words_the_image_does() -> None:
    x = torch.eye(6)
    assert kept(MMTok(1).reduce(View.of(x[None], text=x[None, 4:5])).map) == [4, 6]
    assert kept(MMTok(2).reduce(View.of(x[None], text=x[None, [4, 1]])).map) == [1, 4, 6, 7]
    assert kept(MMTok(2).reduce(View.of(x[None])).map) == [0, 1]  # all alike
    crowd = torch.cat([torch.eye(3)[:1].repeat(5, 1), torch.eye(3)[1:2]])  # five of one and one of another
    assert kept(MMTok(2).reduce(View.of(crowd[None])).map) == [0, 5]


def test_an_images_own_newlines_are_no_words() -> None:
    x = torch.eye(6)
    view = View.of(x[None], text=x[None, [4, 1]])
    view.layout.kind[0, 6] = int(Kind.NEWLINE)
    assert kept(MMTok(1).reduce(view).map) == [1, 6, 7]


def test_tokens_are_counted_for_each_crop() -> None:
    batch = make([[1, (2, 4), 2]])
    split = crops(batch, torch.where(batch.layout.rank_in_image < 3, 0, 1))
    target = MMTok(2).reduce(split.view()).map.target
    assert [int((target.visual & (target.place[..., 1] == c)).sum()) for c in (0, 1)] == [2, 2]
    assert int(MMTok(2, scope="image").reduce(split.view()).map.target.visual.sum()) == 2


@pytest.mark.parametrize("keep", [1.0, 16, 64])
def test_keeping_everything_is_the_identity(keep: Any) -> None:
    assert MMTok(keep).reduce(make([[1, (4, 4), 2], [3]], left=True).view()).map.is_identity


@pytest.mark.parametrize(
    "options", [{"keep": 0}, {"alpha": 0.0}, {"temperature": 1}, {"text_temperature": float("nan")}, {"scope": "sample"}]
)
def test_options_that_are_not_possible(options: dict[str, Any]) -> None:
    with pytest.raises(FoveateError, match=next(iter(options))):
        MMTok(**options)
