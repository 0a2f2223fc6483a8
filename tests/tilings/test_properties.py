"""What every tiling holds to, at any size: it counts what it lays, and every token keeps its place in the picture."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from foveate.errors import FoveateError
from foveate.tilings import TILINGS, Sight, cut, parse
from foveate.tokens import Block, Crop, ImagePlan, Kind, wire

SMALL = Sight(28, 7, 2)  # four patches a side, 2 x 2 tokens
COVERING = TILINGS.keys() - {"whole", "native"}
SIZES = st.tuples(st.integers(1, 4000), st.integers(1, 4000))
SPELLED = [
    *TILINGS,
    "whole:pad=true",
    "anyres:grids=1x1..3x3,limit=1",
    "internvl:overview=false",
    "minimonkey:fewest=1,coarse_fewest=1",
    "lrs:level=1",
]


def planned(spelled: str, size: tuple[int, int], **how: Any) -> ImagePlan | None:
    """The plan; None where it must be refused, as an image that is far too long is at native resolution, and is."""
    if spelled == "native" and max(size) > 200 * min(size):
        with pytest.raises(FoveateError, match="times as long as wide"):
            parse(spelled).plan(*size, **how)
        return None
    return parse(spelled).plan(*size, **how)


@pytest.mark.parametrize("spelled", SPELLED)
@settings(max_examples=12, deadline=None)
@given(size=SIZES)
@example(size=(1, 4000))
@example(size=(4000, 1))
@example(size=(3, 3))
@example(size=(1, 1))
@example(size=(997, 1009))
@example(size=(3001, 2))
def test_slots_are_those_that_are_counted(spelled: str, size: tuple[int, int]) -> None:
    plan = planned(spelled, size, sight=SMALL)
    if plan is None:
        return
    wired = wire(plan)
    assert len(wired.mark) == plan.tokens == sum(run for run in plan.runs if isinstance(run, int))
    assert int((wired.kind == Kind.PATCH).sum()) == plan.visual
    assert len(plan.marks) == int((wired.mark > 0).sum())
    assert [run for run in plan.runs if isinstance(run, str)] == list(plan.tags)
    of = wired.source[wired.mark == 0]
    assert int(of.min()) >= 0
    assert int(of.max()) < sum(crop.tokens for crop in plan.crops)
    torch.testing.assert_close(wired.weight[wired.mark == 0].sum(1), torch.ones(plan.visual))
    box = wired.box[wired.mark == 0]
    assert bool((box[:, :2] <= box[:, 2:]).all())
    assert bool((box >= 0).all())
    assert bool((box <= torch.tensor(size * 2)).all())
    place = wired.place[wired.mark == 0]
    assert {int(label) for label in place[:, 0].unique()} <= set(plan.labels)
    assert len(plan.crops) == 1 or (plan.crops[plan.labels.index(0)].kind == "overview") == any(c.kind == "overview" for c in plan.crops)


@pytest.mark.parametrize("spelled", sorted(COVERING))
@settings(max_examples=12, deadline=None)
@given(size=SIZES)
@example(size=(1, 4000))
@example(size=(3, 3))
@example(size=(997, 1009))
def test_tiles_cover_the_picture(spelled: str, size: tuple[int, int]) -> None:
    """Every pixel lies in the box of some crop that is no overview, where there is one; and nowhere outside of the picture."""
    plan = planned(spelled, size, sight=SMALL)
    assert plan is not None
    for kind in {crop.kind for crop in plan.crops}:
        boxes = np.array([crop.box for crop in plan.crops if crop.kind == kind])
        assert boxes.min() >= 0
        assert boxes.max() <= 1
        assert tuple(boxes[:, :2].min(0)) == (0, 0)
        assert tuple(boxes[:, 2:].max(0)) == (1, 1)
        if kind in ("tile", "detail") and spelled != "s2":
            area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
            assert abs(area.sum() - 1) < 1e-6  # and tiles of one grid do not overlap


@pytest.mark.parametrize("spelled", SPELLED)
@settings(max_examples=8, deadline=None)
@given(size=SIZES, budget=st.integers(1, 30))
@example(size=(1, 4000), budget=2)
def test_a_budget_is_kept_to_or_refused(spelled: str, size: tuple[int, int], budget: int) -> None:
    fewest = 1
    while (wanted := counted(spelled, size, fewest)) is None and fewest < 40:
        fewest += 1
    found = counted(spelled, size, budget)
    assert (found is None) == (budget < fewest)
    assert found is None or 1 <= found <= budget
    assert wanted is None or wanted <= fewest


def counted(spelled: str, size: tuple[int, int], budget: int) -> int | None:
    """Views within a budget, None where it is refused."""
    try:
        return len(parse(spelled).plan(*size, budget=budget, sight=SMALL).crops)
    except FoveateError:
        return None


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(SIZES, min_size=1, max_size=5), budget=st.integers(5, 40))
def test_images_share_a_budget(sizes: list[tuple[int, int]], budget: int) -> None:
    for spelled in ("internvl", "leopard", "anyres"):
        tiling = parse(spelled)
        plans = tiling.plans(sizes, budget, SMALL)
        assert len(plans) == len(sizes)
        assert sum(len(plan.crops) for plan in plans) <= budget
        assert parse(f"{spelled}:budget={budget}").plans(sizes, sight=SMALL) == plans
        free = [tiling.plan(*size, 99, SMALL) for size in sizes]
        if sum(len(plan.crops) for plan in free) <= budget:
            assert [plan.parts for plan in plans] == [plan.parts for plan in free]


@pytest.mark.parametrize("spelled", SPELLED)
def test_spellings_are_read_back(spelled: str) -> None:
    tiling = parse(spelled)
    assert parse(str(tiling)) == tiling
    assert parse(tiling.spelled(always=[f.name for f in fields(tiling) if f.name != "budget"])) == tiling


@pytest.mark.parametrize("spelled", [name for name in TILINGS if name != "native"])
def test_views_are_what_the_tower_takes(spelled: str) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 131, 3), dtype=np.uint8))
    plan = parse(spelled).plan(131, 50, sight=SMALL)
    assert {view.size for view in cut(picture, plan)} == {(28, 28)}
    assert [view.size for view in cut(picture.convert("L"), plan)] == [crop.pixels for crop in plan.crops]


def test_strides_put_together_again_are_the_picture() -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (84, 84, 3), dtype=np.uint8))
    plan = parse("inf_llava").plan(84, 84, sight=SMALL)
    again, blocks = np.zeros((84, 84, 3), np.uint8), np.zeros((84, 84, 3), np.uint8)
    for crop, view in zip(plan.crops, cut(picture, plan), strict=True):
        left, top, right, bottom = crop.window
        if crop.kind == "stride":
            again[top :: crop.every, left :: crop.every] = np.asarray(view)
        elif crop.kind == "tile":
            blocks[top:bottom, left:right] = np.asarray(view)
    assert np.array_equal(again, np.asarray(picture))
    assert np.array_equal(blocks, np.asarray(picture))


def test_a_token_keeps_its_box() -> None:
    """Of a picture twice as wide as high, on two tiles of 2 x 2 tokens: each shows a quarter of its half."""
    wired = wire(parse("anyres").plan(80, 40, sight=SMALL))
    overview, mosaic = wired.box[:4].tolist(), wired.box[4:].tolist()
    assert overview == [[0, 0, 40, 20], [40, 0, 80, 20], [0, 20, 40, 40], [40, 20, 80, 40]]
    assert mosaic[:4] == [[0, 0, 20, 20], [20, 0, 40, 20], [40, 0, 60, 20], [60, 0, 80, 20]]
    assert mosaic[4] == [-1] * 4  # the newline
    assert wired.place[4:9, 0].tolist() == [1, 1, 2, 2, -1]
    assert wired.place[4:9, 2:].tolist() == [[0, 0], [0, 1], [0, 2], [0, 3], [-1, -1]]


def test_a_bridge_of_windows_says_its_own_boxes() -> None:
    """Tokens that are no raster: one of the whole view and one of each quarter, as the boxes of patches say."""
    plan = ImagePlan.laid((40, 40), (Crop((4, 4), 5),), (Block(0),))
    boxes = ((0, 0, 4, 4), (0, 0, 2, 2), (0, 2, 2, 4), (2, 0, 4, 2), (2, 2, 4, 4))
    assert wire(plan, (((4, 4), boxes),)).box.tolist() == [
        [0, 0, 40, 40],
        [0, 0, 20, 20],
        [20, 0, 40, 20],
        [0, 20, 20, 40],
        [20, 20, 40, 40],
    ]


def test_padding_shows_nothing() -> None:
    """A picture of one row of pixels on white: the token that holds the row shows all of its height, the one below none of it."""
    plan = parse("xcomposer:tiles=9").plan(2700, 20, sight=SMALL)
    canvas = plan.crops[1].canvas
    assert canvas is not None
    assert (canvas.size, canvas.picture, canvas.at, canvas.fill) == ((252, 28), (252, 1), (0, 13), 255)
    wired = wire(plan)
    shown = wired.box[wired.mark == 0][4:].tolist()  # after the overview's
    assert shown[:2] + shown[18:20] == [[0, 0, 150, 20], [150, 0, 300, 20], [0, 20, 150, 20], [150, 20, 300, 20]]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: parse("anyres").plan(0, 10), "0 x 10 pixels is none: its width"),
        (lambda: parse("anyres").plan(10, -3), "its height is a whole number"),
        (lambda: parse("internvl").plan(10.5, 3), "10.5 x 3 pixels is none"),  # type: ignore[arg-type]
        (lambda: parse("internvl").plan(10, 10, budget=0), "a budget of 0 views is below one view"),
        (lambda: parse("internvl:budget=0"), "budget=0 is not possible"),
        (lambda: parse("internvl").plans([(10, 10)] * 3, 2), "3 images cannot share a budget of 2 views"),
        (lambda: parse("leopard").plans([(10, 10)] * 51), "51 images cannot share a budget of 50 views"),
        (lambda: parse("s2").plan(10, 10, budget=13), "3 sizes take 14 views; a budget of 13"),
        (lambda: parse("inf_llava").plan(10, 10, budget=18), "take 19 views; a budget of 18"),
        (lambda: parse("slime").plan(10, 10, budget=1), "no room for 2 tiles"),
        (lambda: parse("minimonkey").plan(10, 10, budget=3), "a budget of 3 views is less than fewest=4"),
        (lambda: parse("lrs").plan(4000, 3000, budget=5), "no room for the coarsest level"),
        (lambda: parse("internvl:fewest=8").plan(10, 10, budget=5), "a budget of 5 views leaves 4 tiles, and fewest=8"),
        (lambda: parse("native").plan(1, 4000), "more than 200 times as long as wide"),
        (lambda: parse("anyres:grids=nonsense"), "grids='nonsense' cannot be read"),
        (lambda: parse("anyres:grids=0x2"), "grids='0x2' cannot be read"),
        (lambda: parse("internvl:tiles=0"), "tiles=0 is not possible"),
        (lambda: parse("internvl:tiles=2,fewest=3"), "fewest=3 tiles are more than tiles=2"),
        (lambda: parse("minimonkey:coarse=2"), "coarse_fewest=3 is more than coarse=2"),
        (lambda: parse("nvlm:tile=a-b"), "tile='a-b' is not possible"),
        (lambda: parse("bluelm:slack=2"), "slack=2 is not possible"),
        (lambda: parse("xcomposer:first=last"), "first='last' is not possible"),
        (lambda: parse("intern"), "unknown tiling 'intern' .did you mean 'internvl'"),
        (lambda: parse("internvl:tile=3"), "internvl has no option 'tile'"),
    ],
)
def test_what_cannot_be_is_said(call: Any, said: str) -> None:
    with pytest.raises(FoveateError, match=said):
        call()
