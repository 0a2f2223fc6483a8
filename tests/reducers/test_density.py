"""Density peaks against a slow oracle and the example of the reference."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.reducers.density import density_peaks


def oracle(points: list[list[float]], c: int, k: int) -> tuple[list[int], list[int]]:
    """The formulas, point by point."""
    N = len(points)
    D = [[math.dist(a, b) / math.sqrt(len(a)) for b in points] for a in points]
    rho = [math.exp(-sum(d * d for d in sorted(row)[:k]) / k) for row in D]
    delta = []
    for i in range(N):
        denser = [D[i][j] for j in range(N) if rho[j] > rho[i] or (rho[j] == rho[i] and j < i)]
        delta.append(min(denser) if denser else max(map(max, D)))
    gamma = [r * d for r, d in zip(rho, delta, strict=True)]
    centres = sorted(range(N), key=lambda i: (-gamma[i], i))[:c]
    label = [min(range(c), key=lambda j: (D[i][centres[j]], j)) for i in range(N)]
    for j, i in enumerate(centres):
        label[i] = j
    return centres, label


def test_the_example_of_the_reference() -> None:
    centres, label = density_peaks(torch.tensor([[0.0], [1.0], [2.0], [4.0], [5.0]]), 2, 3)
    assert centres.tolist() == [1, 3]
    assert label.tolist() == [0, 0, 0, 1, 1]


@settings(max_examples=40)
@given(st.integers(1, 9), st.integers(1, 4), st.integers(0, 999), st.data())
def test_the_oracles_clusters(n: int, width: int, seed: int, data: st.DataObject) -> None:
    points = torch.randn(n, width, generator=torch.Generator().manual_seed(seed)).double()
    c, k = data.draw(st.integers(1, n)), data.draw(st.integers(1, n))
    centres, label = density_peaks(points, c, k)
    assert (centres.tolist(), label.tolist()) == oracle(points.tolist(), c, k)


def test_equal_points_and_small_numbers_are_settled() -> None:
    same = torch.ones(4, 3)
    centres, label = density_peaks(same, 2, 9)  # more neighbours than points
    assert centres.tolist() == [0, 1]
    assert label.tolist() == [0, 1, 0, 0]
    assert density_peaks(same[:1], 5, 7)[0].tolist() == [0]
    assert density_peaks(torch.tensor([[0.0], [3.0]]), 0, 0)[0].tolist() == [0]
    far = torch.tensor([[0.0], [1e6], [3e6], [3.1e6]])  # whose densities are all 0 in floating point
    assert density_peaks(far, 2, 2)[0].tolist() == [2, 3]  # the densest, all the same


def test_broken_points_are_clusters_like_others() -> None:
    centres, label = density_peaks(torch.tensor([[0.0], [math.nan], [1.0]]), 2, 2)
    assert len(set(centres.tolist())) == 2
    assert len(label) == 3
