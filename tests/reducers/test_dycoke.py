"""DyCoke's first stage against its rule and the counts of the reference; FewerFrames beside it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from foveate.errors import FoveateError
from foveate.reducers import DyCoke, FewerFrames
from foveate.reducers.dycoke import compared
from tests.reducers.moving import Clips, alone, batches, check, count, film


def test_the_counts_of_the_reference() -> None:
    assert count(DyCoke(0.7), 8, 10) == 45
    assert count(DyCoke(0.7), 16, 196) == 1618
    kept = alone(DyCoke(0.7), film((8, 2, 5)))[0]
    assert [sum(i // 10 == f for i in kept) for f in range(8)] == [10, 3, 3, 3, 10, 3, 10, 3]


def test_which_frames_are_compared() -> None:
    assert compared(1) == []
    assert compared(2) == [(1, 0)]
    assert compared(5) == [(1, 0), (3, 2), (2, 0)]
    assert compared(8) == [(1, 0), (3, 2), (5, 4), (7, 6), (2, 0)]


def oracle(x: Tensor, k: int) -> list[int]:
    F, P, _ = x.shape
    kept = {f: list(range(P)) for f in range(F)}
    others = {f: f - 1 for f in range(1, F, 2)} | {f: f - 2 for f in range(2, F, 4) if f - 2 < F - 4}
    for f, g in others.items():
        like = [round(float(torch.cosine_similarity(x[f, p].double(), x[g, p].double(), 0)), 6) for p in range(P)]
        kept[f] = sorted(sorted(range(P), key=lambda p: (like[p], p))[:k])
    return [f * P + p for f in range(F) for p in kept[f]]


@pytest.mark.parametrize("shape", [(1, 2, 3), (2, 1, 5), (5, 2, 2), (7, 1, 5), (9, 3, 3)])
@pytest.mark.parametrize("drop", [0.7, 0.4, 1.0])
def test_the_rule(shape: tuple[int, int, int], drop: float) -> None:
    x, P = film(shape, seed=5), shape[1] * shape[2]
    assert alone(DyCoke(drop), x)[0] == oracle(x, (P * round(10 - 10 * drop)) // 10)


def test_identical_frames_keep_their_first_tokens() -> None:
    assert alone(DyCoke(0.5), film((2, 1, 4), still=1.0))[0] == [0, 1, 2, 3, 4, 5]


def test_shares_are_the_decimals_that_were_meant() -> None:
    assert count(DyCoke(0.7), 2, 10) == 13  # where 1 - 0.7 is 0.30000000000000004, and 1 - 0.9 is 0.09999999999999998
    assert count(DyCoke(0.9), 2, 10) == 11


def test_budgets_that_it_can_and_cannot_have() -> None:
    assert DyCoke().at(0.475) == DyCoke(0.7)
    assert count(DyCoke().at(0.25), 100, 12) == pytest.approx(300, rel=0.05)
    with pytest.raises(FoveateError, match=r"keeps at least a quarter of the tokens, so it cannot be set to keep=0\.2"):
        DyCoke().at(0.2)
    for drop in (-0.1, 1.1, 1, "most"):
        with pytest.raises(FoveateError, match=r"give a share in \[0, 1\]"):
            DyCoke(drop)  # type: ignore[arg-type]


@settings(max_examples=20)
@given(batches())
def test_rows_are_what_they_are_alone(batch: Clips) -> None:
    for reducer in (DyCoke(0.6), DyCoke(scope="sample"), FewerFrames(0.4), FewerFrames(1, scope="sample")):
        check(reducer, batch)


def test_fewer_frames_are_whole_and_spaced() -> None:
    assert alone(FewerFrames(0.5), film((4, 1, 3)))[0] == [3, 4, 5, 9, 10, 11]
    assert alone(FewerFrames(1), film((5, 1, 2)))[0] == [4, 5]
    assert alone(FewerFrames(0.1), film((1, 1, 2)))[0] == [0, 1]
    assert count(FewerFrames(0.25), 10, 7) == 21  # three frames, rounded half up
