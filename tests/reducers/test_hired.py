"""HiRED's budgets and choices against the paper's rule in plain loops and exact fractions."""

from fractions import Fraction
from math import floor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from foveate import FoveateError
from foveate.contract import ClsAttention, View
from foveate.reducers.hired import HiRED
from foveate.tokens import Layout, budget
from tests.reducers.ragged import counted
from tests.reducers.test_fastervlm import (
    IMAGES,
    Patches,
    batch,
    batches,
    best,
    check_alone,
    check_sane,
    keeps,
    kept_of,
    members,
    mosaic,
    quick,
    scores,
    view_of,
)

FINE, COARSE = ClsAttention(-2), ClsAttention(0)
NEXT = mosaic((24, 24), (2, 2), (24, 24))


def look(patches: Patches, coarse: Tensor, fine: Tensor | None = None, **options: object) -> list[int]:
    """Kept patches of each crop of one image."""
    layout = batch([[1, patches, 1]])
    pad = torch.nn.functional.pad
    fine = scores(0, layout) if fine is None else pad(fine[None], (1, 1))
    m = HiRED(**options).reduce(view_of(layout, {FINE: fine, COARSE: pad(coarse[None], (1, 1))})).map  # type: ignore[arg-type]
    return torch.bincount(m.target.place[m.target.visual][:, 1], minlength=1 + max(p[0] for p in patches)).tolist()


def shows(patches: Patches, raster: bool = False) -> list[int]:
    """The tile that each base patch shows."""
    base = [p for p in patches if p[0] == 0]
    cells = {(r, c): crop for crop, r, c in patches if crop}
    if raster:
        tiles = sorted(set(cells.values()))
        return [tiles[i * len(tiles) // len(base)] for i in range(len(base))]
    H, W = (1 + max(cell[i] for cell in cells) for i in (0, 1))
    R, C = (1 + max(p[i] for p in base) for i in (1, 2))
    return [cells[floor(Fraction(2 * r + 1, 2 * R) * H), floor(Fraction(2 * c + 1, 2 * C) * W)] for _, r, c in base]


def quotas(patches: Patches, coarse: list[float], N_b: int, share: str, raster: bool) -> dict[int, int]:
    """The paper's rule, or the code's shares, with alpha = 1/2."""
    lengths = {crop: sum(p[0] == crop for p in patches) for crop in sorted({p[0] for p in patches})}
    if len(lengths) == 1 or N_b == len(patches):
        return dict.fromkeys(lengths, N_b)
    n = lengths[0]
    worth = [Fraction(x) for x in coarse[:n]]
    if share == "count":
        top = sorted(range(n), key=lambda i: (-worth[i], i))[: n // 2]
        worth = [Fraction(i in top) for i in range(n)]
    base = min(N_b // 2, n)
    s = dict.fromkeys([crop for crop in lengths if crop], Fraction(0))
    for tile, x in zip(shows(patches, raster), worth, strict=True):
        s[tile] += x
    found = {0: base}
    for tile in s:
        found[tile] = min(floor((N_b - base) * s[tile] / sum(s.values())), lengths[tile]) if any(s.values()) else (N_b - base) // len(s)
    return found if sum(found.values()) else {**found, 0: 1}


@quick
@given(
    batches(),
    keeps,
    st.integers(0, 99),
    st.sampled_from(["sum", "count"]),
    st.sampled_from(["tiles", "raster"]),
    st.sampled_from(["leave", "give"]),
)
def test_the_rule(layout: Layout, keep: float, seed: int, share: str, regions: str, unspent: str) -> None:
    reducer = HiRED(keep, share=share, regions=regions, unspent=unspent)
    fine, coarse = scores(seed, layout), scores(seed + 1, layout)
    view = view_of(layout, {FINE: fine, COARSE: coarse})
    m = reducer.reduce(view).map
    expected: set[tuple[int, int]] = set()
    for image in members(layout, (0,)):
        patches = [(int(layout.place[at][1]), int(layout.place[at][3]), int(layout.place[at][4])) for at in image]
        N_b = budget(keep, len(image))
        quota = quotas(patches, [float(coarse[at]) for at in image], N_b, share, regions == "raster")
        own: set[tuple[int, int]] = set()
        for crop, T in quota.items():
            own |= best([at for at, p in zip(image, patches, strict=True) if p[0] == crop], fine, T)
        if unspent == "give":
            own |= best([at for at in image if at not in own], fine, N_b - len(own))
        assert 1 <= len(own) <= counted(reducer, len(image), len(image))
        assert len(own) == N_b or (unspent == "leave" and len(quota) > 1)
        expected |= own
    assert set(map(tuple, kept_of(view, m).nonzero().tolist())) == expected
    check_sane(view, m)
    check_alone(view, m, reducer.reduce)


def quadrants(weights: tuple[float, ...]) -> Tensor:
    s = torch.tensor(weights).view(2, 2).repeat_interleave(12, 0).repeat_interleave(12, 1).flatten() / 144
    return torch.cat([s, torch.full((4 * 576,), 9.0)])  # the tiles' own attention in block 0 must not matter


def test_tiles_whose_rows_and_columns_overlap_are_an_error() -> None:
    """Each tile's own raster does not say which part of the picture it shows."""
    apart = [(crop, r, c) for crop in range(3) for r in range(2) for c in range(2)]
    coarse = torch.rand(len(apart))
    with pytest.raises(FoveateError, match="where in the picture the tiles lie is not known"):
        look(apart, coarse)
    assert sum(look(apart, coarse, regions="raster", unspent="give")) == budget(0.2, len(apart))


def test_the_hand_example() -> None:
    coarse = quadrants((0.4, 0.3, 0.2, 0.1))
    assert budget(0.2, len(NEXT)) == 576
    for scale in (1.0, 16.0):  # the mean over heads or their sum
        assert look(NEXT, coarse * scale) == [288, 115, 86, 57, 28]
    assert sum(look(NEXT, coarse, unspent="give")) == 576


def test_no_crop_gets_more_than_it_has() -> None:
    coarse = quadrants((0.0, 0.9, 0.1, 0.0))
    assert look(NEXT, coarse, keep=0.5) == [576, 0, 576, 86, 0]  # 864 left for the tiles, 777 of them for tile 2
    given = look(NEXT, coarse, keep=0.5, unspent="give")
    assert sum(given) == 1440
    assert given[0] == given[2] == 576


def test_the_only_tile_takes_the_whole_rest_and_a_single_crop_everything() -> None:
    patches = mosaic((4, 4), (1, 1), (4, 5))
    coarse = torch.rand(len(patches))
    assert look(patches, coarse, keep=12) == [6, 6]
    assert look(patches, coarse, keep=13) == [6, 7]
    assert look(patches, coarse, keep=12, alpha=0.3) == [3, 9]
    assert look(mosaic((4, 4)), torch.rand(16), keep=12, alpha=0.0) == [12]


def test_alpha_is_the_decimal_that_was_meant() -> None:
    patches = mosaic((10, 10), (1, 1), (10, 10))
    assert int(0.29 * 100) == 28
    assert look(patches, torch.ones(200), keep=100, alpha=0.29) == [29, 71]


def test_equal_attention_shares_equally_without_losing_to_rounding() -> None:
    patches = mosaic((6, 6), (1, 3), (6, 6))
    assert look(patches, torch.full((len(patches),), 0.1), keep=60) == [30, 10, 10, 10]
    assert look(patches, torch.zeros(len(patches)), keep=60) == [30, 10, 10, 10]


def test_an_unpadded_mosaic_is_laid_over_the_base_image_edge_to_edge() -> None:
    patches = mosaic((4, 4), (2, 1), (4, 4), (2, 0))  # six rows: tile 1 is the upper two thirds
    coarse = torch.cat([torch.eye(4)[2].repeat_interleave(4), torch.zeros(24)])  # centre of row 2: at 6 * 2.5 / 4 = 3.75
    assert look(patches, coarse, keep=10) == [5, 5, 0]
    coarse = torch.cat([torch.eye(4)[3].repeat_interleave(4), torch.zeros(24)])
    assert look(patches, coarse, keep=10) == [5, 0, 5]


def test_the_codes_shares() -> None:
    """Raster runs of a 4 x 4 base image are its rows; one strong patch counts as much as one that is only just among the best half."""
    patches = mosaic((4, 4), (2, 2), (4, 4))
    coarse = torch.full((80,), 0.01)
    coarse[torch.tensor([4, 5, 6, 8, 9, 10, 11, 12])] = torch.tensor([9.0, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1])
    assert look(patches, coarse, keep=16, share="count", regions="raster") == [8, 0, 3, 4, 1]
    assert look(patches, coarse, keep=16, share="sum", regions="raster") == [8, 0, 7, 0, 0]
    # In quadrants: upper left 4 5, upper right 6, lower left 8 9 12, lower right 10 11.
    assert look(patches, coarse, keep=16, share="count") == [8, 2, 1, 3, 2]
    # int(16 * (1 - alpha)) best patches are counted: with alpha 3/4 the first four of the equal ones, and the base keeps 12 of 16.
    assert look(patches, coarse, keep=16, share="count", alpha=0.75) == [12, 2, 1, 1, 0]


def test_layers_are_not_swapped() -> None:
    patches = mosaic((2, 2), (2, 2), (1, 1))
    coarse, fine = torch.tensor([0.0, 0, 0, 1, 0, 0, 0, 0]), torch.tensor([1.0, 0, 0, 0, 1, 1, 1, 1])
    assert look(patches, coarse, fine, keep=2) == [1, 0, 0, 0, 1]
    (site,) = HiRED(layer=-1, budget_layer=3).sites(4)
    assert (site.layer, site.needs) == (0, (ClsAttention(3), ClsAttention(-1)))
    assert HiRED().positions == "renumber"


@pytest.mark.parametrize("unspent", ["leave", "give"])
def test_a_single_token_is_the_base_images_best(unspent: str) -> None:
    assert look(NEXT, quadrants((0.4, 0.3, 0.2, 0.1)), torch.linspace(2, 1, len(NEXT)), keep=1, unspent=unspent) == [1, 0, 0, 0, 0]


@pytest.mark.parametrize("keep", [1.0, 1000])
def test_keeping_everything_is_the_identity(keep: float) -> None:
    layout = batch([[2, IMAGES[3], 1], [1, IMAGES[0], 1, IMAGES[4], 1], [3]], left=True)
    view = view_of(layout, {FINE: scores(0, layout), COARSE: scores(1, layout)})
    assert HiRED(keep).reduce(view).map.is_identity
    assert not HiRED(0.5).reduce(view).map.is_identity
    text = batch([[2], [3]])
    assert HiRED(1).reduce(view_of(text, {FINE: scores(0, text), COARSE: scores(0, text)})).map.is_identity


def test_images_without_tiles_need_no_grid() -> None:
    view = View.of(torch.randn(2, 9, 3), text=1, signals={FINE: torch.rand(2, 8), COARSE: torch.rand(2, 8)})
    assert HiRED(0.5).reduce(view).map.target.shape == (2, 5)
    assert counted(HiRED(0.5), 8, 8) == 4


def test_a_mosaic_must_be_known() -> None:
    with pytest.raises(FoveateError, match="crop 0"):
        look([(1, 0, 0), (2, 0, 1)], torch.ones(2), keep=1)
    unknown = [(crop, -1, -1) for crop in (0, 0, 1, 2)]
    with pytest.raises(FoveateError, match='regions="raster"'):
        look(unknown, torch.ones(4), keep=2)
    assert sum(look(unknown, torch.ones(4), keep=3, regions="raster")) == 3


@pytest.mark.parametrize(
    "options",
    [
        {"keep": 0},
        {"alpha": 1.5},
        {"alpha": "half"},
        {"layer": 0.5},
        {"budget_layer": None},
        {"share": "mean"},
        {"regions": "grid"},
        {"unspent": True},
        {"positions": "x"},
    ],
)
def test_bad_options(options: dict[str, object]) -> None:
    with pytest.raises(FoveateError, match=next(iter(options))):
        HiRED(**options)  # type: ignore[arg-type]
