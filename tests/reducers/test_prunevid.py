"""PruneVid's first stage against its rules, and the examples of the reference."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from foveate.contract import ImageSize, Workload
from foveate.errors import FoveateError
from foveate.reducers import PruneVid
from foveate.reducers.prunevid import runs, scenes, smoothed, standing
from tests.reducers.moving import Clips, alone, batches, check, count, film
from tests.reducers.test_density import oracle as clusters


@pytest.mark.parametrize(
    ("labels", "smooth"),
    [
        ([0, 0, 1, 0, 2, 2], [0, 0, 0, 0, 2, 2]),  # the reference's
        ([0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 0, 0]),  # two runs that tie stay two windows
        ([0, 1, 2, 3], [0, 0, 0, 0]),
        ([2, 2, 2], [2, 2, 2]),
        ([1, 0, 0], [0, 0, 0]),
        ([0, 0, 1, 2, 2, 2], [0, 0, 2, 2, 2, 2]),
        ([0, 0, 0, 1, 2, 2, 2, 1, 3, 3, 3, 3], [0, 0, 0, 0, 2, 2, 2, 3, 3, 3, 3, 3]),
    ],
)
def test_flicker_is_smoothed(labels: list[int], smooth: list[int]) -> None:
    assert smoothed(labels) == smooth


@settings(max_examples=50)
@given(st.lists(st.integers(0, 3), min_size=2, max_size=12))
def test_no_window_is_of_one_frame(labels: list[int]) -> None:
    found = smoothed(labels)
    assert len(found) == len(labels)
    assert all(len(run) > 1 for run in runs(found))


def test_two_frames_of_cosine_ninety_percent_stand_still() -> None:
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.9, 0.19**0.5], [1.0, 0.0]])
    assert standing(x, torch.tensor([[0, 1], [2, 3]])).tolist() == pytest.approx([0.9, 0.0], abs=1e-6)
    assert standing(x, torch.tensor([[0, 1], [2, -1]])).tolist() == [pytest.approx(0.9, abs=1e-6), -math.inf]


def test_the_counts_of_the_reference() -> None:
    """A window of 4 frames and 144 places, 100 of them static: 50 + 4 * 22 tokens."""
    x = torch.randn(4, 144, 40, generator=torch.Generator().manual_seed(0))
    x[:, :100] = x[0, :100]
    assert len(alone(PruneVid(), x)[0]) == 138
    assert count(PruneVid(), 4, 144) >= 138


def oracle(x: Tensor, ratio: float, tau: float) -> list[tuple[int, list[int]]]:
    P = x.shape[1]
    out: list[tuple[int, list[int]]] = []
    for w in scenes(x.double().mean(1), 0.25):
        unit = x[list(w)].double() / x[list(w)].double().norm(dim=-1, keepdim=True)
        L, static = len(w), []
        for p in range(P if L > 1 else 0):
            pairs = math.fsum(float(unit[f, p] @ unit[g, p]) for f in range(L) for g in range(L) if f != g)
            if round(pairs / (L * (L - 1)), 6) > tau:
                static.append(p)
        for frames, places in [(list(w), static), *(([f], [p for p in range(P) if p not in static]) for f in w)]:
            n = len(places)
            c = int(ratio * n) if n > 14 else n
            if not n:
                continue
            points = x[frames][:, places].double().mean(0).tolist()
            centres, label = clusters(points, c, min(7, n)) if c < n else (list(range(n)), list(range(n)))
            for j, centre in enumerate(centres):
                out.append((frames[0] * P + places[centre], sorted(f * P + places[i] for i in range(n) if label[i] == j for f in frames)))
    return sorted(out)


@pytest.mark.parametrize("shape", [(1, 4, 4), (2, 4, 5), (6, 5, 5), (9, 2, 4)])
@pytest.mark.parametrize("still", [0.0, 0.8])
def test_the_rules(shape: tuple[int, int, int], still: float) -> None:
    x = film(shape, seed=2, still=still)
    kept, token_map = alone(PruneVid(), x)
    wanted = oracle(x, 0.5, 0.8)
    assert kept == [at for at, _ in wanted]
    assert [token_map.sources(0, m) for m in range(len(kept))] == [own for _, own in wanted]
    y = token_map.apply(x.reshape(1, -1, x.shape[-1]))[0]
    means = torch.stack([x.reshape(-1, x.shape[-1])[own].mean(0) for _, own in wanted])
    assert torch.allclose(y, means, atol=1e-5)


def test_identical_frames_become_one() -> None:
    kept, token_map = alone(PruneVid(), film((8, 2, 5), still=1.0))
    assert kept == list(range(10))
    assert token_map.sources(0, 3) == [3 + 10 * f for f in range(8)]
    assert alone(PruneVid(1.0), film((8, 2, 5), still=1.0))[1].is_identity


def test_budgets_and_options() -> None:
    assert PruneVid().at(0.25) == PruneVid(0.25)
    assert count(PruneVid(0.25), 1, 100) == 25
    assert count(PruneVid(), 6, 14) == 84  # what is small stays
    assert count(PruneVid(), 2, 20) == 34  # 6 static tokens and 14 of each frame, none of them clustered
    pair = Workload((ImageSize((9,), (9,)), ImageSize((9,), (9,))), (9, 9))
    assert PruneVid().exact(pair)
    assert not PruneVid(scope="sample").exact(pair)
    for options in ({"ratio": 0.0}, {"ratio": 2.0}, {"tau": 1.5}, {"scenes": 0}):
        with pytest.raises(FoveateError, match="is not possible"):
            PruneVid(**options)


@settings(max_examples=20)
@given(batches())
def test_rows_are_what_they_are_alone(batch: Clips) -> None:
    for reducer in (PruneVid(), PruneVid(0.3, scope="sample")):
        check(reducer, batch)
