"""SparseVLM's clusters by hand: whose neighbours count, in what order the clusters come back, and where."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from foveate.contract import Attention, AttentionRows, View
from foveate.reducers import SparseVLM
from foveate.reducers.sparsevlm import peaks
from foveate.tokens import Layout, TokenMap


def line(*places: float) -> Tensor:
    return torch.tensor(places, dtype=torch.float32)[:, None]


@pytest.mark.parametrize(
    ("places", "clusters", "centres", "owners"),
    [
        # Of two neighbours one is the token itself: densities e^-.5 (0, 1) and e^-2 (3, 10, 12); times 12, 1, 2, 7, 2.
        # Were it left out, token 1 would be the densest.
        ((0, 1, 3, 10, 12), 2, [0, 3], [0, 0, 0, 3, 3]),
        # The highest peak stands behind the second: e^-2 (0, 2) and e^-.5 (10, 11), times 10, 2, 11, 1.
        ((0, 2, 10, 11), 2, [2, 0], [0, 0, 2, 2]),
        # One cluster: every token is its own only neighbour, all are equally dense, and the first is as far as any from a denser one.
        ((5, 0, 6, 7), 1, [0], [0, 0, 0, 0]),
        ((4,), 1, [0], [0]),
        # As many clusters as tokens: e^-(9 + 100)/3, e^-(9 + 49)/3, e^-(49 + 100)/3; the middle one is the densest.
        ((0, 3, 10), 3, [1, 0, 2], [0, 1, 2]),
    ],
)
def test_peaks_by_hand(places: tuple[float, ...], clusters: int, centres: list[int], owners: list[int]) -> None:
    found = peaks(line(*places), clusters)
    assert found[0].tolist() == centres
    assert found[1].tolist() == owners


def test_width_divides_the_distance() -> None:
    """Sixteen equal coordinates are four times as far apart, over the root of 16: the same clusters as of one coordinate."""
    x = torch.randn(30, 1)
    for a, b in zip(peaks(x, 4), peaks(x.expand(-1, 16).contiguous(), 4), strict=True):
        assert torch.equal(a, b)


def image_of(states: Tensor, score: Tensor) -> View:
    """One image and a word behind it, which attends to the image's tokens by `score`."""
    n = len(states)
    weights = torch.zeros(1, 1, n + 1, n + 1)
    weights[0, 0, n, :n] = score
    layout = Layout.sequence(torch.arange(n + 1)[None] < n)
    return View.of(torch.cat([states, states[:1]])[None], layout=layout, signals={Attention(1): AttentionRows.of(weights)})


def recycled(order: str, merge: str = "sum") -> TokenMap:
    """Of 32 tokens the last two stay; the ten best of the others are 20 to 29: a loose cloud (20 to 24), then a dense one (25 to 29)."""
    states = torch.zeros(32, 1)
    states[20:25, 0] = torch.tensor([0.0, 2.0, 4.0, 6.0, 8.0])
    states[25:30, 0] = torch.tensor([50.0, 50.1, 50.2, 50.3, 50.4])
    score = torch.arange(32) / 64
    return SparseVLM(keep=2, layers=2, order=order, merge=merge).reduce(image_of(states, score)).map


def test_recycled_tokens_come_behind_the_kept_by_falling_peak() -> None:
    appended, raster = recycled("append"), recycled("raster")
    assert raster.representative.tolist() == [[20, 25, 30, 31, 32]]
    assert appended.representative.tolist() == [[30, 31, 25, 20, 32]]  # the dense cloud first
    assert appended.sources(0, 2) == [25, 26, 27, 28, 29]
    assert appended.sources(0, 3) == [20, 21, 22, 23, 24]
    assert appended.target.size.tolist() == [[1, 1, 5, 5, 0]]


@pytest.mark.parametrize(("merge", "dense", "loose"), [("sum", 251.0, 20.0), ("mean", 50.2, 4.0)])
def test_sum_and_mean_of_the_clusters(merge: str, dense: float, loose: float) -> None:
    token_map = recycled("append", merge)
    x = torch.zeros(1, 33, 1)
    x[0, 20:25, 0] = torch.tensor([0.0, 2.0, 4.0, 6.0, 8.0])
    x[0, 25:30, 0] = torch.tensor([50.0, 50.1, 50.2, 50.3, 50.4])
    y = token_map.apply(x)[0, :, 0]
    assert math.isclose(float(y[2]), dense, rel_tol=1e-6)
    assert math.isclose(float(y[3]), loose, rel_tol=1e-6)


def test_several_images_append_to_their_own() -> None:
    """Two images of 32 tokens side by side, the second with its clouds the other way round."""
    first, second = torch.zeros(32, 1), torch.zeros(32, 1)
    first[20:25, 0], first[25:30, 0] = torch.arange(5) * 2.0, 50 + torch.arange(5) / 10
    second[20:25, 0], second[25:30, 0] = 50 + torch.arange(5) / 10, torch.arange(5) * 2.0
    states = torch.cat([first, torch.zeros(1, 1), second, torch.zeros(1, 1)])
    visual = torch.ones(1, 66, dtype=torch.bool)
    visual[0, [32, 65]] = False
    weights = torch.zeros(1, 1, 66, 66)
    weights[0, 0, 32:, :32] = weights[0, 0, 32:, 33:65] = torch.arange(32) / 64
    view = View.of(states[None], layout=Layout.sequence(visual, [32, 32]), signals={Attention(1): AttentionRows.of(weights)})
    token_map = SparseVLM(keep=2, layers=2, order="append").reduce(view).map
    assert token_map.representative.tolist() == [[30, 31, 25, 20, 32, 63, 64, 53, 58, 65]]
