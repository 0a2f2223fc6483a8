"""The numbers that papers and their code give, each by its name."""

from __future__ import annotations

import pytest

from foveate.tilings import LRS, TILINGS, AnyRes, BlueLM, Leopard, MiniMonkey, Native, OneVision, XComposer, parse
from foveate.tokens import Block, ImagePlan

RULES = {  # 1000 x 500 pixels: passes of the encoder, tokens in the language model
    "whole:pad=true": (1, 576),  # LLaVA-1.5; MG-LLaVA's rule for its first tower as well
    "s2": (14, 576),
    "deepstack": (3, 576),
    "inf_llava": (19, 576),
    "native": (1, 648),
    "leopard": (3, 507),
    "internvl": (3, 768),
    "nvlm": (3, 768),
    "bluelm": (7, 1372),
    "xcomposer:tiles=9": (9, 1333),
    "slime": (7, 1441),
    "lrs": (7, 576 + 18 * 36 + 18),  # at most 576 + 864 and a newline a row
    "anyres": (3, 1752),
    "minimonkey": (15, 3840),
    "onevision": (7, 4009),
}


@pytest.mark.parametrize("rule", RULES)
def test_the_table_of_1000_by_500(rule: str) -> None:
    plan = parse(rule).plan(1000, 500)
    passes, tokens = RULES[rule]
    assert plan.tokens == tokens
    assert len(plan.crops) == passes


@pytest.mark.parametrize(("tiles", "most"), [(9, 1561), (16, 2653), (25, 4057), (55, 8737)])
def test_xcomposers_maxima(tiles: int, most: int) -> None:
    tiling = XComposer(tiles=tiles)
    assert tiling.plan(336, 336 * tiles).tokens == most
    assert max(tiling.plan(w, h).tokens for w in range(100, 4001, 300) for h in range(100, 4001, 300)) <= most


@pytest.mark.parametrize(
    ("size", "tiles", "grid", "tokens", "picture", "top"),
    [
        ((1000, 500), 9, (2, 4), 1333, (1344, 672), 0),
        ((1000, 500), 16, (3, 5), 2353, (1680, 840), 84),
        ((1000, 500), 25, (3, 6), 2785, (2016, 1008), 0),
        ((1000, 500), 55, (5, 10), 7417, (3360, 1680), 0),
        ((500, 1000), 9, (4, 2), 1357, (672, 1344), 0),
        ((3840, 1600), 55, (5, 11), 8137, (3696, 1540), 70),
    ],
)
def test_xcomposer(size: tuple[int, int], tiles: int, grid: tuple[int, int], tokens: int, picture: tuple[int, int], top: int) -> None:
    plan = XComposer(tiles=tiles).plan(*size)
    canvas = plan.crops[1].canvas
    assert canvas is not None
    assert (plan.tokens, canvas.picture, canvas.at[1]) == (tokens, picture, top)
    assert canvas.size == (336 * grid[1], 336 * grid[0])


def map_of(plan: ImagePlan) -> tuple[int, int]:
    """(rows, columns) of the tiles' map."""
    block = plan.parts[-1]
    assert isinstance(block, Block)
    assert block.window is not None
    top, left, bottom, right = block.window
    return block.shape or (bottom - top, right - left)


@pytest.mark.parametrize(
    ("size", "grid", "shape", "tokens"),
    [
        ((1000, 500), (1, 2), (24, 48), 1752),
        ((500, 1000), (2, 1), (48, 24), 1776),
        ((640, 480), (2, 2), (36, 48), 2340),
        ((1920, 1080), (2, 2), (28, 48), 1948),
        ((4000, 400), (1, 3), (8, 72), 1160),
        ((300, 300), (1, 2), (24, 24), 1176),  # a tie, in transformers' order
    ],
)
def test_llava_next(size: tuple[int, int], grid: tuple[int, int], shape: tuple[int, int], tokens: int) -> None:
    plan = AnyRes().plan(*size)
    block = plan.parts[-1]
    assert isinstance(block, Block)
    assert ((block.rows, block.columns), map_of(plan), plan.tokens) == (grid, shape, tokens)


def test_llava_nexts_own_order_decides_ties_the_other_way() -> None:
    authors = AnyRes(grids="2x1/1x2/2x2/1x3/3x1")
    assert [tiling.plan(100, 37).tokens for tiling in (authors, AnyRes())] == [776, 1458]


@pytest.mark.parametrize(
    ("size", "shape", "tokens"), [((1000, 500), (40, 81), 4009), ((1920, 1080), (60, 108), 7269), ((2304, 2304), (81, 81), 7371)]
)
def test_llava_onevision(size: tuple[int, int], shape: tuple[int, int], tokens: int) -> None:
    plan = OneVision().plan(*size)
    assert (map_of(plan), plan.tokens) == (shape, tokens)


@pytest.mark.parametrize(
    ("size", "six", "twelve"),
    [
        ((1000, 500), (1, 2), (1, 2)),
        ((3000, 1500), (1, 2), (2, 4)),
        ((640, 480), (2, 3), (3, 4)),
        ((1920, 1080), (1, 2), (2, 4)),
        ((300, 300), (1, 1), (1, 1)),
        ((380, 76), (1, 5), (1, 5)),
    ],
)
def test_internvl(size: tuple[int, int], six: tuple[int, int], twelve: tuple[int, int]) -> None:
    for tiles, (rows, columns) in ((6, six), (12, twelve)):
        plan = parse(f"internvl:tiles={tiles}").plan(*size)
        count = rows * columns
        assert len(plan.crops) == count + (count > 1)
        assert plan.tokens == 256 * len(plan.crops)
        assert plan.crops[0].canvas is not None
        assert plan.crops[0].canvas.size == (448 * columns, 448 * rows)


def test_nvlms_tags() -> None:
    plan = parse("nvlm").plan(1000, 500)
    assert plan.runs == ("<tile_1>", 256, "<tile_2>", 256, "<tile_global_thumbnail>", 256)
    assert parse("nvlm").plan(300, 300).runs == ("<tile_global_thumbnail>", 256)
    assert max(parse("nvlm").plan(w, h).tokens for w in range(50, 2000, 130) for h in range(50, 2000, 130)) == 7 * 256


@pytest.mark.parametrize(
    ("options", "size", "grids", "tokens", "compressed"),
    [
        ({}, (1000, 500), ((2, 4), (2, 3)), 3840, 2816),
        ({"fewest": 12, "tiles": 24, "coarse_fewest": 3, "coarse": 5}, (1000, 500), ((3, 6), (2, 2)), 5888, 3584),
        ({}, (1000, 1000), ((3, 3), (2, 2)), 3584, 2432),
    ],
)
def test_mini_monkey(
    options: dict[str, int], size: tuple[int, int], grids: tuple[tuple[int, int], ...], tokens: int, compressed: int
) -> None:
    tiling = MiniMonkey(**options)
    plan = tiling.plan(*size)
    assert tiling.grids(*size, None, tiling.sight) == grids
    assert (plan.tokens, tiling.compressed(plan)) == (tokens, compressed)


def test_leopards_budget() -> None:
    tiling = Leopard()
    assert [plan.tokens for plan in tiling.plans([(1000, 500)])] == [507]
    pages = tiling.plans([(1700, 2200)] * 4)
    assert [len(page.crops) for page in pages] == [1 + 3 * 3] * 4
    assert sum(page.tokens for page in pages) == 6760
    assert tiling.plans([(300, 300)])[0].tokens == 169


@pytest.mark.parametrize(("size", "grid"), [((394, 390), (1, 1)), ((380, 76), (1, 1)), ((380, 393), (1, 1)), ((500, 102), (1, 2))])
def test_bluelms_four_sizes(size: tuple[int, int], grid: tuple[int, int]) -> None:
    assert BlueLM().grid(*size, None, 384) == grid


def test_bluelms_tokens() -> None:
    assert BlueLM().plan(1000, 500).tokens == 7 * 196
    assert 9 * 196 == 1764 == BlueLM(rows=4, columns=2).plan(2 * 384, 4 * 384).tokens


def test_s2_and_inf_llava_see_all_of_it_at_every_size() -> None:
    s2, inf = parse("s2").plan(700, 700), parse("inf_llava").plan(700, 700)
    assert [len(s2.crops), len(inf.crops)] == [14, 19]
    assert [crop.kind for crop in inf.crops].count("stride") == 9
    assert {crop.pixels for plan in (s2, inf) for crop in plan.crops} == {(336, 336)}


def test_inf_llavas_strides() -> None:
    strides = [crop for crop in parse("inf_llava:sides=2").plan(4, 4).crops if crop.kind == "stride"]
    assert [(crop.window[:2], crop.every) for crop in strides] == [((0, 0), 2), ((1, 0), 2), ((0, 1), 2), ((1, 1), 2)]


@pytest.mark.parametrize(
    ("size", "levels"),
    [
        ((1000, 500), [(2, 3)]),
        ((4000, 3000), [(3, 3), (5, 6), (9, 12)]),
        ((8064, 6048), [(3, 3), (5, 6), (9, 12), (18, 24)]),
    ],
)
def test_the_pyramid_of_lrs(size: tuple[int, int], levels: list[tuple[int, int]]) -> None:
    assert LRS().levels(*size, 336) == levels
    for level, (rows, columns) in enumerate(levels):
        assert len(LRS(level=level).plan(*size).crops) == 1 + rows * columns


@pytest.mark.parametrize(
    ("size", "resized", "tokens"),
    [
        ((1000, 500), (1008, 504), 648),
        ((1920, 1080), (1316, 728), 1222),
        ((4000, 4000), (980, 980), 1225),
        ((20, 20), (56, 56), 4),
        ((42, 28), (84, 56), 6),
    ],
)
def test_qwen2_vls_sizes(size: tuple[int, int], resized: tuple[int, int], tokens: int) -> None:
    plan = Native().plan(*size)
    assert (plan.crops[0].pixels, plan.tokens) == (resized, tokens)


def test_every_tiling_is_in_a_table() -> None:
    assert {rule.partition(":")[0] for rule in RULES} == TILINGS.keys() - {"idefics3"}
