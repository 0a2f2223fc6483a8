"""`count` is what `reduce` does, to the token, in images of several crops and frames: of every method that says that sizes decide it."""

from __future__ import annotations

import zlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from foveate.accounting.prompts import Prompt
from foveate.contract import Attention, AttentionRows, ImageSize, Keys, Signal, States, TowerKeys, View, Workload
from foveate.engine.record import Record
from foveate.reducers import METHODS, Reducer, in_model, parse
from foveate.reducers.base import acting, tokens_by_layer
from foveate.reducers.seeing import Seeing
from foveate.tokens import Layout
from tests.reducers.ragged import mapped

DEPTH = 4
Grids = list[list[tuple[int, int]]]  # of each image, its crops or frames


def layout_of(images: Grids, *, frames: bool = False, text: int = 3) -> Layout:
    """One row of images, with text after each; each image's parts one after the other, the tiles of a mosaic below each other."""
    kinds, cells = [], []
    for i, parts in enumerate(images):
        above = 0
        for part, (rows, columns) in enumerate(parts):
            at = (i, -1, part) if frames else (i, part, -1)
            cells += [(*at, above + n // columns, n % columns) for n in range(rows * columns)]
            above += rows if part and not frames else 0  # tiles count their rows over the whole mosaic
        kinds += [True] * sum(rows * columns for rows, columns in parts) + [False] * text
    visual = torch.tensor([kinds])
    layout = Layout.sequence(visual)
    place_BN5 = layout.place.clone()
    place_BN5[visual] = torch.tensor(cells)
    return replace(layout, place=place_BN5)


class Scores(dict[Signal, Any]):
    """Whatever is asked for: random, but the same for the same question."""

    def __init__(self, slots: int) -> None:
        self.slots = slots

    def __contains__(self, signal: object) -> bool:
        return True

    def __missing__(self, signal: Signal) -> Any:
        generator = torch.Generator().manual_seed(zlib.crc32(repr(signal).encode()))
        N = self.slots
        if isinstance(signal, Attention):
            return AttentionRows.of(torch.rand(1, 2, N, N, generator=generator).softmax(-1))
        more = (6,) if isinstance(signal, TowerKeys | Keys | States) else ()
        return torch.rand(1, N, *more, generator=generator)


def sizes(layout: Layout) -> tuple[ImageSize, ...]:
    (prompt,) = Record(layouts=[layout]).prompts
    assert isinstance(prompt, Prompt)
    return tuple(prompt.images)


def lengths(layout: Layout, images: int) -> list[int]:
    return [int((layout.visual & (layout.image == i)).sum()) for i in range(images)]


def first_cut(reducer: Reducer, layout: Layout) -> tuple[list[int], list[int]]:
    """(said, left): tokens of each image after the reducer's first site, as counted and as they are."""
    N, sizes_ = layout.shape[1], sizes(layout)
    tokens = torch.randn(1, N, 6, generator=torch.Generator().manual_seed(N))
    view = View.of(tokens, layout=layout, layers=DEPTH)
    object.__setattr__(view, "signals", Scores(N))
    left = lengths(mapped(reducer.reduce(view)).target, len(sizes_))
    return reducer.count(Workload(sizes_, tuple(size.tokens for size in sizes_), layers=DEPTH)), left


SPELLED = [
    text
    for m in METHODS.values()
    if in_model([m()]) and not issubclass(m, Seeing) and "pixels" not in m.looks_at  # in the tower each crop is a row by itself
    for text in (*m.examples, *m.keeps_all)
    if "+" not in text
]
MORE = [
    "fastervlm:keep=0.3,scope=frame",
    "fastervlm:keep=2,scope=image",
    "divprune:keep=0.4,scope=crop",
    "divprune:keep=0.4,scope=frame",
    "cdpruner:keep=0.3,scope=frame",
    "cdpruner:keep=3,scope=crop",
    "visionzip:dominant=0.3,contextual=0.2,scope=frame",
    "visionzip:dominant=2,contextual=2,scope=crop",
    "tome:keep=0.4,scope=crop",
    "tome:keep=0.4,scope=frame",
    "aim:keep=0.4,steps=0,scope=crop",
    "hired:keep=0.3,unspent=give",
    "uniform:keep=0.3,of=original",
    "avgpool2d:stride=3",
]
parts = st.lists(st.lists(st.tuples(st.integers(3, 5), st.integers(3, 5)), min_size=1, max_size=3), min_size=1, max_size=3)


@pytest.mark.parametrize("text", [*SPELLED, *MORE])
@settings(max_examples=5)
@given(images=parts, frames=st.booleans())
def test_what_is_counted_is_what_is_left(text: str, images: Grids, frames: bool) -> None:
    (reducer,) = parse(text)
    layout = layout_of(images, frames=frames)
    work = Workload(sizes(layout), tuple(size.tokens for size in sizes(layout)), layers=DEPTH)
    said, left = first_cut(reducer, layout)
    if reducer.exact(work):
        assert said == left
    else:  # never more than is said, and short by less than a row or a floor in each crop
        assert all(a >= b for a, b in zip(said, left, strict=True))


@pytest.mark.parametrize("scope", ["crop", "frame", "image", "sample"])
@pytest.mark.parametrize("method", ["divprune", "cdpruner", "tome", "aim:steps=0"])
def test_a_sample_is_counted_as_a_whole(method: str, scope: str) -> None:
    """Where a row's images compete, how many stay of all of them is known."""
    (reducer,) = parse(f"{method}{',' if ':' in method else ':'}keep=0.3,scope={scope}")
    said, left = first_cut(reducer, layout_of([[(3, 4), (5, 5)], [(2, 3)]]))
    assert sum(said) == sum(left)
    if scope != "sample":
        assert said == left


def test_rounding_in_crops_is_not_rounding_of_the_image() -> None:
    """Five crops of 7 tokens at a half: 4 of each, 20 in all, where a half of the image is 18."""
    image = ImageSize((7,) * 5, (35,))
    work = Workload((image,), (35,))
    assert parse("fastervlm:keep=0.5")[0].count(work) == [20]
    assert parse("fastervlm:keep=0.5,scope=image")[0].count(work) == [18]
    assert parse("cdpruner:keep=10")[0].count(work) == [35]
    assert parse("aim:keep=0.5,start=1,stop=2,steps=2")[0].count(work, 1) == [9]  # a half of 18, which a frame has after merging
    video = ImageSize((35,), (7,) * 5)
    assert parse("aim:keep=0.5,start=1,stop=2,steps=2")[0].count(Workload((video,), (20,)), 1) == [10]


@pytest.mark.parametrize(
    ("text", "grids", "left"),
    [
        ("avgpool2d:stride=2", [(3, 5)], 2),
        ("avgpool2d:stride=2", [(3, 5), (4, 4)], 6),
        ("avgpool2d:stride=3", [(7, 3), (3, 8)], 4),
        ("fopru:keep=0.5,strategy=row", [(3, 7)], 7),
        ("fopru:keep=0.5,strategy=row", [(4, 6), (2, 6)], 18),
        ("fopru:keep=1,strategy=row", [(2, 9)], 9),
    ],
)
def test_grids_that_are_no_squares(text: str, grids: list[tuple[int, int]], left: int) -> None:
    (reducer,) = parse(text)
    layout = layout_of([grids])
    assert first_cut(reducer, layout) == ([left], [left])
    assert sizes(layout)[0].grids == tuple(grids)
    assert reducer.exact(Workload(sizes(layout), (sizes(layout)[0].tokens,)))
    assert not reducer.exact(Workload((ImageSize.whole(30),), (30,)))


def test_what_content_decides_says_so() -> None:
    crops, whole = ImageSize((9, 9), (18,)), ImageSize((9,), (9,))
    (leaves,), (gives,) = parse("hired:keep=0.5"), parse("hired:keep=0.5,unspent=give")
    assert [leaves.exact(Workload((size,), (size.tokens,))) for size in (crops, whole)] == [False, True]
    assert gives.exact(Workload((crops,), (18,)))
    uneven = Workload((ImageSize((12, 10), (22,), ((3, 4), (2, 5))),), (22,))
    assert not parse("fopru:strategy=row")[0].exact(uneven)


def test_grids_are_read_where_they_are_full() -> None:
    def of(cells: list[tuple[int, int, int, int]]) -> tuple[tuple[int, int], ...]:
        return ImageSize.of(torch.tensor(cells)).grids

    full = [(0, -1, r, c) for r in range(2) for c in range(3)]
    assert of(full) == ((2, 3),)
    assert of(full[:-1]) == of([*full, full[0]]) == of([(0, -1, -1, -1)]) == ()
    assert of([*full, (1, -1, 5, 7)]) == ((2, 3), (1, 1))  # a mosaic counts its rows over all tiles
    empty: Tensor = torch.zeros((0, 4), dtype=torch.int64)
    assert ImageSize.of(empty).grids == ()


def test_the_tower_acts_first_and_on_each_crop() -> None:
    """ToMe in the tower halves each crop of 5 to 3; what stands in front of the language model comes after, whatever the order."""
    image = ImageSize((5, 5), (10,))
    for text in ("tome:keep=0.5,site=tower,blocks=1+random:keep=0.5", "random:keep=0.5+tome:keep=0.5,site=tower,blocks=1"):
        reducers = parse(text)
        assert [reducer.name for _, reducer, _ in acting(reducers, DEPTH)] == ["tome", "random"]
        assert tokens_by_layer(reducers, [image], DEPTH) == [[3]] * DEPTH
    video = ImageSize((10,), (5, 5))
    assert tokens_by_layer(parse("tome:keep=0.5,site=tower,blocks=1"), [video, image], 2) == [[6, 6]] * 2
