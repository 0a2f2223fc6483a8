"""VidCom2 against its equations and the numbers of the reference."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from foveate.reducers import VidCom2
from foveate.reducers.common import dealt
from foveate.reducers.vidcom2 import frame_shares, kernel
from tests.reducers.moving import Clips, alone, batches, check, count, film


def test_the_numbers_of_the_reference() -> None:
    assert kernel(torch.tensor([0.0, 1.0])).tolist() == [5.0, pytest.approx(1.9069, abs=1e-4)]
    shares = frame_shares([0.0, 1.0, 1.0, 1.0], 0.25)
    assert shares == pytest.approx([0.4375, 0.1875, 0.1875, 0.1875])
    assert [max(1, round(share * 20)) for share in shares] == [9, 4, 4, 4]  # the authors', which is one too many
    assert dealt(20 * 4 // 4, [share * 20 for share in shares], [20] * 4, 1) == [9, 4, 4, 3]


def oracle(x: Tensor, number: int) -> list[int]:
    F, P, D = x.shape
    rows = x.double().flatten(0, 1).tolist()
    spread = []
    for d in range(D):
        mean = math.fsum(row[d] for row in rows) / len(rows)
        spread.append(round(math.fsum((row[d] - mean) ** 2 for row in rows) / len(rows), 6))
    calm = sorted(sorted(range(D), key=lambda d: (spread[d], d))[: D // 2])
    y = [[row[d] / math.sqrt(sum(row[e] ** 2 for e in calm)) for d in calm] for row in rows]

    def middle(part: list[list[float]]) -> list[float]:
        return [math.fsum(column) / len(part) for column in zip(*part, strict=True)]

    def K(z: list[float], m: list[float]) -> float:
        return sum(math.exp(-(math.dist(z, m) ** 2) / (2 * 2.0**k)) for k in range(-3, 2))

    whole = middle(y)
    a = [K(z, whole) for z in y]
    b = [K(z, middle(y[i // P * P : i // P * P + P])) for i, z in enumerate(y)]
    u = [round(-math.fsum(a[f * P : f * P + P]) / P, 6) / 0.01 for f in range(F)]
    total = sum(math.exp(v - max(u)) for v in u)
    share = [min(number / (F * P) * (1 + math.exp(v - max(u)) / total - 1 / F), 1) for v in u]
    kept = []
    for f, n in enumerate(dealt(number, share, [P] * F, 1)):
        score = {i: round(a[i] + b[i], 6) for i in range(f * P, f * P + P)}
        kept += sorted(score, key=lambda i: (score[i], i))[:n]
    return sorted(kept)


@pytest.mark.parametrize("shape", [(1, 2, 3), (2, 1, 5), (5, 2, 2), (6, 3, 3)])
@pytest.mark.parametrize("share", [0.2, 0.6])
def test_the_equations(shape: tuple[int, int, int], share: float) -> None:
    x = film(shape, seed=3, still=0.3)
    number = max(1, math.floor(share * shape[0] * shape[1] * shape[2] + 0.5))
    assert alone(VidCom2(number), x)[0] == oracle(x, number)


def test_identical_frames_share_evenly_and_the_first_tokens_go_on() -> None:
    x = torch.ones(4, 3, 4)
    assert alone(VidCom2(0.5), x)[0] == [0, 1, 3, 4, 6, 9]


def test_more_frames_than_budget_and_counts() -> None:
    assert len(alone(VidCom2(3), film((20, 1, 4)))[0]) == 3
    assert [count(VidCom2(keep), 10, 7) for keep in (0.05, 0.25, 1.0, 30)] == [4, 18, 70, 30]


@settings(max_examples=20)
@given(batches())
def test_rows_are_what_they_are_alone(batch: Clips) -> None:
    for reducer in (VidCom2(0.3), VidCom2(0.5, scope="sample")):
        check(reducer, batch)
