"""HoloV against loops over the picture's parts, what its card asks of quotas, and what every selection must hold."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from foveate import FoveateError
from foveate.contract import ClsAttention, View
from foveate.reducers.common import dealt
from foveate.reducers.holov import HoloV
from foveate.tokens import budget
from tests.reducers.ragged import Ragged, batches, check_raster, check_rows, counted, keeps, kept, make

quick = settings(max_examples=20)


def oracle(states: Tensor, attention: list[float], left: int, parts: int) -> list[int]:
    """H of each patch and the best of each part; the quotas are the rule's own, which has a test of its own."""
    x = states.double().numpy()
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    n, count = len(x), min(parts, len(x))
    runs = [list(range(n * p // count, n * (p + 1) // count)) for p in range(count)]
    V = [float(np.var([x[i] @ x[j] for j in run])) for run in runs for i in run]
    gamma = sum(attention) / sum(V) if sum(V) > 1e-12 else 0.0
    H = [gamma * v + a for v, a in zip(V, attention, strict=True)]
    quotas = dealt(left, [float(np.mean([H[i] for i in run])) for run in runs], list(map(len, runs)))
    best = [sorted(run, key=lambda i: (-H[i], i))[:q] for run, q in zip(runs, quotas, strict=True)]
    return sorted(i for run in best for i in run)


def view(batch: Ragged, scores: Tensor) -> View:
    return View.of(batch.tokens, layout=batch.layout, signals={ClsAttention(-2): scores})


@quick
@given(batches(least=2), keeps, st.sampled_from([1, 2]), st.integers(0, 99))
def test_each_image_of_a_ragged_batch(batch: Ragged, keep: Any, parts: int, seed: int) -> None:
    reducer = HoloV(keep, parts=parts)
    scores = torch.rand(batch.layout.shape, generator=torch.Generator().manual_seed(seed))
    token_map = reducer.reduce(view(batch, scores)).map
    for row, slots in batch.images():
        left = budget(keep, len(slots))
        picks = oracle(batch.tokens[row, slots], scores[row, slots].tolist(), left, parts)
        assert [i for i in kept(token_map, row) if i in slots] == [slots[i] for i in picks]
        assert counted(reducer, len(slots), len(slots)) == left
    check_raster(batch, token_map, [budget(keep, r * c) for r, c in batch.grids])
    alone = [view(row, scores[b : b + 1, start:end]) for b, (row, (start, end)) in enumerate(zip(batch.rows, batch.spans, strict=True))]
    check_rows(batch, token_map, [reducer.reduce(single).map for single in alone])


def test_what_is_dealt_by_largest_remainders() -> None:
    assert dealt(10, [3, 3, 2, 1], [10] * 4) == [4, 3, 2, 1]
    assert dealt(5, [1, 1], [9, 9]) == [3, 2]
    assert dealt(10, [8, 1, 1], [4, 9, 9]) == [4, 3, 3]
    assert dealt(6, [1, 0, 0], [2, 3, 3]) == [2, 2, 2]  # what is over goes to those that weigh nothing
    assert dealt(3, [0, 0, 0], [2, 2, 2]) == dealt(3, [float("nan")] * 3, [2, 2, 2]) == [1, 1, 1]
    assert dealt(0, [1, 2], [3, 3]) == [0, 0]
    assert dealt(6, [1, 2], [3, 3]) == [3, 3]
    assert dealt(2, [1, 1, 1], [0, 1, 1]) == [0, 1, 1]


@quick
@given(st.lists(st.tuples(st.floats(0, 9), st.integers(0, 9)), min_size=1, max_size=9), st.data())
def test_everything_is_dealt_and_no_one_has_too_much(parts: list[tuple[float, int]], data: st.DataObject) -> None:
    weights, most = [w for w, _ in parts], [m for _, m in parts]
    total = data.draw(st.integers(0, sum(most)))
    found = dealt(total, weights, most)
    assert sum(found) == total
    assert all(0 <= f <= m for f, m in zip(found, most, strict=True))


def test_attention_alone_decides_where_all_patches_are_alike() -> None:
    batch = make([[(4, 4), 1]])
    batch.tokens[0, :16] = torch.ones(6)
    scores = torch.zeros(1, 17)
    scores[0, :16] = torch.tensor([0.0] * 4 + [0.1] * 4 + [0.1, 0.4, 0.1, 0.2] + [0.0] * 4)
    assert [i for i in kept(HoloV(3, parts=4).reduce(view(batch, scores)).map) if i < 16] == [4, 9, 11]


@pytest.mark.parametrize("tau", [0.5, 1.0, 4.0])
def test_tau_sharpens_the_quotas_and_every_row_is_a_patch(tau: float) -> None:
    batch = make([[(4, 8), 1]])
    token_map = HoloV(16, parts=4, tau=tau).reduce(view(batch, torch.rand(1, 33))).map
    assert int(token_map.target.visual.sum()) == 16
    assert bool((token_map.apply(batch.tokens)[0].abs().sum(1) > 0).all())


@pytest.mark.parametrize("keep", [1.0, 16, 64])
def test_keeping_everything_is_the_identity(keep: Any) -> None:
    batch = make([[1, (4, 4), 2], [3]], left=True)
    assert HoloV(keep).reduce(view(batch, torch.rand(batch.layout.shape))).map.is_identity


@pytest.mark.parametrize("options", [{"keep": 0}, {"parts": 0}, {"tau": 0.0}, {"tau": 1}, {"layer": 0.5}, {"scope": "sample"}])
def test_options_that_are_not_possible(options: dict[str, Any]) -> None:
    with pytest.raises(FoveateError, match=next(iter(options))):
        HoloV(**options)
