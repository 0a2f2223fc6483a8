"""EVS against its equations, the reference's example, and the edges of clips."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from foveate.reducers import EVS
from tests.reducers.moving import Clips, alone, batches, check, count, film


def turned(changes: list[list[float]]) -> Tensor:
    """A clip of vectors in the plane that turn from frame to frame so that 1 - cosine is what is wanted, whatever their length."""
    angle = torch.zeros(len(changes) + 1, len(changes[0]), dtype=torch.float64)
    for f, row in enumerate(changes):
        angle[f + 1] = angle[f] + torch.tensor([math.acos(1 - d) for d in row])
    return torch.stack([angle.cos(), angle.sin()], -1).float() * torch.arange(1, len(changes) + 2).view(-1, 1, 1)


@pytest.mark.parametrize(
    ("keep", "kept"),
    [(0.5, [0, 1, 2, 3, 7, 10]), (0.25, [0, 1, 2, 3]), (0.75, [0, 1, 2, 3, 5, 7, 8, 10, 11]), (1, [0, 1, 2, 3]), (1.0, list(range(12)))],
)
def test_the_example_of_the_reference(keep: float, kept: list[int]) -> None:
    x = turned([[0, 0.5, 0.1, 1], [0.2, 0, 0.9, 0.3]])
    assert alone(EVS(keep), x)[0] == kept


def oracle(x: Tensor, number: int) -> list[int]:
    F, P, _ = x.shape
    scores = []
    for f in range(F):
        for p in range(P):
            a, b = x[f, p].double(), x[f - 1, p].double()
            scores.append(255.0 if f == 0 else round(1 - float(a @ b / (a.norm() * b.norm())), 6))
    return sorted(sorted(range(F * P), key=lambda i: (-scores[i], i))[: max(P, number)])


@pytest.mark.parametrize("shape", [(1, 2, 3), (2, 1, 5), (5, 2, 2), (6, 3, 3)])
@pytest.mark.parametrize("number", [1, 7, 20])
def test_the_equations(shape: tuple[int, int, int], number: int) -> None:
    x = film(shape, seed=number)
    assert alone(EVS(number), x)[0] == oracle(x, number)


def test_identical_frames_leave_the_first_and_then_the_earliest() -> None:
    x = film((4, 1, 5), still=1.0)
    assert alone(EVS(0.4), x)[0] == list(range(8))


def test_one_frame_and_more_frames_than_budget() -> None:
    assert alone(EVS(0.1), film((1, 2, 2)))[0] == [0, 1, 2, 3]
    assert len(alone(EVS(3), film((20, 1, 4)))[0]) == 4
    assert [count(EVS(keep), 10, 7) for keep in (0.05, 0.25, 1.0, 30)] == [7, 18, 70, 30]


@settings(max_examples=20)
@given(batches())
def test_rows_are_what_they_are_alone(batch: Clips) -> None:
    for reducer in (EVS(0.3), EVS(0.5, scope="sample")):
        check(reducer, batch)


def test_places_that_a_frame_lacks_are_compared_with_the_last_that_has_them() -> None:
    from tests.reducers.moving import make

    x = film((3, 1, 2), still=0.0)
    x[2, 0] = x[0, 0]  # and frame 1 lacks the place
    x[2, 1] = -x[1, 1]
    token_map = EVS(4).reduce(make([[(3, 1, 2)]], [[x]], missing={(1, 0, 0)}).view).map
    assert [int(s) for s in token_map.representative[0] if token_map.source.visual[0, s]] == [1, 2, 4, 7]  # not slot 6
