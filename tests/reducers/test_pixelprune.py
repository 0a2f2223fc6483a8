"""PixelPrune against the reference's examples, a slow loop, and what it promises: no block that went is farther than `tau` from what
stands for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import foveate
from foveate import FoveateError
from foveate.contract import Pixels, View, Workload
from foveate.errors import NotApplicable, Reason
from foveate.reducers import PixelPrune
from foveate.reducers.base import Reducer


def kept(reducer: PixelPrune, raster: list[list[Any]]) -> list[int]:
    """The blocks that stay, of a raster of numbers or of lists of them."""
    values = torch.tensor(raster, dtype=torch.float32)
    blocks = values.reshape(values.shape[0], values.shape[1], -1)
    return reducer.kept(blocks).flatten().nonzero()[:, 0].tolist()


def through_a_view(reducer: Reducer, pixels_RCv: Tensor, order: Tensor | None = None) -> list[int]:
    R, C, v = pixels_RCv.shape
    flat = pixels_RCv.view(1, R * C, v)
    view = View.of(torch.zeros(1, R * C, 3), grid=(R, C), signals={Pixels(): flat})
    found = reducer.reduce(view)
    return found.map.representative[0].tolist()  # type: ignore[union-attr]


def test_the_examples_of_the_reference() -> None:
    page = [[1, 1, 2], [1, 1, 2], [3, 3, 2]]
    assert kept(PixelPrune(), page) == [0, 2, 6, 8]  # the last one stays although the one above is its equal
    assert kept(PixelPrune(anchored=False), page) == [0, 2, 6, 8]
    ramp = [[0.0, 0.03, 0.06, 0.09, 0.12]]
    assert kept(PixelPrune(tau=0.05), ramp) == [0, 2, 4]
    assert kept(PixelPrune(tau=0.05, anchored=False), ramp) == [0]
    assert kept(PixelPrune(tau=0.05), [[x] for x in ramp[0]]) == [0, 2, 4]


@pytest.mark.parametrize(("distance", "near"), [("max", 0.3), ("mean", 0.1), ("rms", 0.1732)], ids=["max", "mean", "rms"])
def test_the_distances(distance: str, near: float) -> None:
    pair = [[[0.0, 0.0, 0.0], [0.3, 0.0, 0.0]]]
    assert kept(PixelPrune(tau=near + 0.01, distance=distance), pair) == [0]
    assert kept(PixelPrune(tau=near - 0.01, distance=distance), pair) == [0, 1]


def slow(values: Tensor, tau: float, anchored: bool) -> tuple[list[int], Tensor]:
    """(blocks that stay, what is known of each) block by block."""
    R, C = values.shape[:2]
    known, stay = values.clone(), []

    def alike(a: Tensor, b: Tensor) -> bool:
        return bool((a - b).abs().max() <= tau)

    for r in range(R):
        for c in range(C):
            if r == c == 0:
                stay.append(0)
                continue
            foretold = known[r, c - 1] if c else known[r - 1, c]
            if r and c and alike(known[r - 1, c - 1], known[r, c - 1]) and not alike(known[r - 1, c - 1], known[r - 1, c]):
                foretold = known[r - 1, c]
            if not alike(values[r, c], foretold):
                stay.append(r * C + c)
            elif anchored:
                known[r, c] = foretold
    return stay, known


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 10**6), st.sampled_from([0.0, 0.2, 0.5]), st.booleans())
def test_the_slow_loop_and_the_bound(R: int, C: int, seed: int, tau: float, anchored: bool) -> None:
    values = torch.randint(0, 4, (R, C, 2), generator=torch.Generator().manual_seed(seed)) / 5
    stay, known = slow(values, tau, anchored)
    assert through_a_view(PixelPrune(tau=tau, anchored=anchored), values) == stay
    if anchored:
        assert float((known - values).abs().max()) <= tau + 1e-6


def test_what_stays_of_plain_pictures() -> None:
    assert kept(PixelPrune(), [[5] * 6] * 4) == [0]
    assert kept(PixelPrune(tau=-1.0), [[5] * 6] * 4) == list(range(24))
    stripes = [[1, 2, 3, 4]] * 3
    assert kept(PixelPrune(), stripes) == [0, 1, 2, 3]
    assert kept(PixelPrune(), [[1, 1, 1], [2, 2, 2], [3, 3, 3]]) == [0, 3, 6]


def test_what_it_says_of_itself() -> None:
    work = Workload((), (24, 16))
    assert PixelPrune().count(work) == [24, 16]
    assert not PixelPrune().exact(work)
    assert PixelPrune(tau=-1.0).exact(work)


def test_blocks_that_are_no_raster() -> None:
    view = View.of(torch.zeros(1, 6, 3), signals={Pixels(): torch.zeros(1, 6, 2)})
    with pytest.raises(NotApplicable, match="no full raster") as error:
        foveate.reducers.PixelPrune().reduce(view)
    assert error.value.reason == Reason.NO_RASTER


@pytest.mark.parametrize("options", [{"tau": -0.5}, {"tau": 1}, {"tau": float("nan")}, {"distance": "cosine"}, {"anchored": 1}])
def test_options_that_are_not_possible(options: dict[str, Any]) -> None:
    with pytest.raises(FoveateError, match=next(iter(options))):
        PixelPrune(**options)
