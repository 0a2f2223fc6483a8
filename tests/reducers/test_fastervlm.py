"""FasterVLM against its equations, and the batches that the tests of the other methods before the LM use too."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from foveate import FoveateError
from foveate.contract import ClsAttention, Cut, Signal, View
from foveate.reducers.fastervlm import FasterVLM
from foveate.tokens import Layout, TokenMap, budget
from tests.reducers.ragged import counted

quick = settings(max_examples=40)

Patches = list[tuple[int, int, int]]  # crop, row, column of each patch of one image
Rows = list[list[int | Patches]]  # prompts: numbers of text tokens, and images


def mosaic(
    base: tuple[int, int], tiles: tuple[int, int] = (0, 0), tile: tuple[int, int] = (0, 0), cut: tuple[int, int] = (0, 0)
) -> Patches:
    """The base image (crop 0), then a mosaic of tiles in raster order of the whole, its last `cut` rows and columns un-padded away."""
    patches = [(0, r, c) for r in range(base[0]) for c in range(base[1])]
    for r in range(tiles[0] * tile[0] - cut[0]):
        patches += [(1 + r // tile[0] * tiles[1] + c // tile[1], r, c) for c in range(tiles[1] * tile[1] - cut[1])]
    return patches


def batch(rows: Rows, left: bool = False) -> Layout:
    lengths = [sum(p if isinstance(p, int) else len(p) for p in row) for row in rows]
    slots = torch.full((len(rows), max(lengths)), 2)
    places: list[tuple[int, int, int]] = []
    for b, row in enumerate(rows):
        n = max(lengths) - lengths[b] if left else 0
        for part in row:
            size = part if isinstance(part, int) else len(part)
            slots[b, n : n + size] = 0 if isinstance(part, int) else 1
            places += [] if isinstance(part, int) else part
            n += size
    layout = Layout.sequence(slots == 1, [len(p) for row in rows for p in row if not isinstance(p, int)], valid_BN=slots != 2)
    for column in range(3):
        layout.place[..., (1, 3, 4)[column]][layout.visual] = torch.tensor([p[column] for p in places], dtype=torch.int64)
    return layout


IMAGES = (
    mosaic((2, 3)),
    mosaic((1, 1)),
    mosaic((2, 2), (1, 1), (2, 3)),
    mosaic((2, 2), (2, 2), (2, 2)),
    mosaic((3, 3), (2, 3), (2, 2), (1, 2)),
)


@st.composite
def batches(draw: st.DrawFn) -> Layout:
    """Ragged batches: several images a row, tiled and not, rows of text alone, padding on either side."""
    rows: Rows = [
        [draw(st.integers(0, 2)), *[part for _ in range(draw(st.integers(0, 2))) for part in (draw(st.sampled_from(IMAGES)), 1)], 1]
        for _ in range(draw(st.integers(1, 3)))
    ]
    return batch(rows, draw(st.booleans()))


def scores(draw_seed: int, layout: Layout, levels: int = 6) -> Tensor:
    """(B, N) few different values, so that there are ties; padding and text score highest."""
    generator = torch.Generator().manual_seed(draw_seed)
    score = torch.randint(1, levels, layout.shape, generator=generator) / 8
    return torch.where(layout.visual, score, 9.0)


def view_of(layout: Layout, signals: dict[Signal, Tensor], seed: int = 0) -> View:
    tokens = torch.randn(*layout.shape, 5, generator=torch.Generator().manual_seed(seed))
    return View.of(tokens, layout=layout, signals=signals)


def alone(view: View, row: int) -> tuple[View, Tensor]:
    """One row without its padding, and its slots in the batch."""
    slots = view.layout.valid[row].nonzero()[:, 0]
    assert view.tokens is not None
    signals = {k: v[row, slots][None] for k, v in view.signals.items()}
    one = Layout(*(getattr(view.layout, f)[row, slots][None] for f in ("kind", "valid", "position", "place", "size")))
    return View.of(view.tokens[row, slots][None], layout=one, signals=signals), slots


def check_alone(view: View, m: TokenMap, reduce: Callable[[View], Cut]) -> None:
    """The batch's map does to each row what the row's own map does."""
    y = m.apply(view.tokens)  # type: ignore[arg-type]
    for row in range(view.layout.shape[0]):
        single, slots = alone(view, row)
        own = reduce(single).map
        there = m.target.valid[row]
        assert m.representative[row, there].tolist() == slots[own.representative[0]].tolist()
        assert torch.equal(y[row, there], own.apply(single.tokens)[0])  # type: ignore[arg-type]
        assert own.target.valid.all()


def check_sane(view: View, m: TokenMap) -> None:
    """Text stays, in order, and so do the patches: the kept slots ascend."""
    for row in range(view.layout.shape[0]):
        kept = m.representative[row][m.target.valid[row]].tolist()
        assert kept == sorted(set(kept))
        text = (view.layout.valid & ~view.layout.visual)[row].nonzero()[:, 0].tolist()
        assert set(text) <= set(kept)


def kept_of(view: View, m: TokenMap) -> Tensor:
    """(B, N) bool: visual slots that are the representative of some target."""
    kept = torch.zeros_like(view.layout.visual)
    rows, targets = m.target.visual.nonzero(as_tuple=True)
    kept[rows, m.representative[rows, targets]] = True
    return kept


def members(layout: Layout, columns: tuple[int, ...] = (0, 1)) -> list[list[tuple[int, int]]]:
    """(row, slot) of the patches of each image (columns (0,)) or crop, by plain loops."""
    groups: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for b, n in layout.visual.nonzero().tolist():
        groups.setdefault(tuple(layout.place[b, n, list(columns)].tolist()), []).append((b, n))
    return list(groups.values())


def best(group: list[tuple[int, int]], score: Tensor, T: int) -> set[tuple[int, int]]:
    return set(sorted(group, key=lambda at: (-float(score[at]), at))[:T])


keeps = st.sampled_from([1, 2, 5, 100, 0.1, 0.25, 0.5, 0.9, 1.0])


# ---- FasterVLM


def on(score: Tensor, **options: object) -> list[int]:
    """Kept slots of one image of plain tokens."""
    view = View.of(torch.randn(1, len(score), 3), signals={ClsAttention(-2): score[None]})
    m = FasterVLM(**options).reduce(view).map  # type: ignore[arg-type]
    return m.representative[0].tolist()


@quick
@given(batches(), keeps, st.integers(0, 99))
def test_the_best_of_each_crop_are_kept_and_nothing_is_mixed(layout: Layout, keep: float, seed: int) -> None:
    reducer, score = FasterVLM(keep), scores(seed, layout)
    view = view_of(layout, {ClsAttention(-2): score})
    m = reducer.reduce(view).map
    expected = set().union(*(best(g, score, counted(reducer, len(g), len(g))) for g in members(layout)))
    assert set(map(tuple, kept_of(view, m).nonzero().tolist())) == expected
    assert m.member.shape[-1] == 1
    assert view.tokens is not None
    assert torch.equal(m.apply(view.tokens)[m.target.valid], view.tokens[kept_of(view, m) | (layout.valid & ~layout.visual)])
    check_sane(view, m)
    check_alone(view, m, reducer.reduce)


@quick
@given(batches(), keeps, st.integers(0, 99))
def test_scope_image_counts_over_the_tiles(layout: Layout, keep: float, seed: int) -> None:
    reducer, score = FasterVLM(keep, scope="image"), scores(seed, layout)
    view = view_of(layout, {ClsAttention(-2): score})
    expected = set().union(*(best(g, score, budget(keep, len(g))) for g in members(layout, (0,))))
    assert set(map(tuple, kept_of(view, reducer.reduce(view).map).nonzero().tolist())) == expected


def test_two_heads_over_four_patches() -> None:
    heads = torch.tensor([[0.4, 0.1, 0.2, 0.3], [0.1, 0.5, 0.2, 0.2]])
    for order in ([0, 1], [1, 0]):
        mean = heads[order].mean(0)
        torch.testing.assert_close(mean, torch.tensor([0.25, 0.3, 0.2, 0.25]))
        assert on(mean, keep=1) == [1]
        assert on(mean, keep=2) == [0, 1]  # 0 and 3 tie
        assert on(mean, keep=3) == [0, 1, 3]
        assert on(mean, keep=4) == [0, 1, 2, 3]


def test_budgets_of_the_paper() -> None:
    assert [counted(FasterVLM(keep), 576, 576) for keep in (0.25, 0.1, 0.05, 29, 1.0)] == [144, 58, 29, 29, 576]


def test_an_integer_is_per_tile() -> None:
    layout = batch([[1, mosaic((3, 3), (2, 2), (3, 3)), 1]])
    view = view_of(layout, {ClsAttention(-2): scores(0, layout)})
    kept = FasterVLM(2).reduce(view).map.target
    assert torch.bincount(kept.place[kept.visual][:, 1]).tolist() == [2, 2, 2, 2, 2]


@pytest.mark.parametrize("change", [lambda s: 3 * s, lambda s: s + 2.0])
def test_only_the_ranking_counts(change: Callable[[Tensor], Tensor]) -> None:
    score = torch.rand(40, generator=torch.Generator().manual_seed(0))
    assert on(score, keep=7) == on(change(score), keep=7) == sorted(score.topk(7).indices.tolist())
    assert on(score, keep=7) != on(-score, keep=7)


@pytest.mark.parametrize("keep", [1.0, 100])
def test_keeping_everything_is_the_identity(keep: float) -> None:
    layout = batch([[2, IMAGES[3], 1], [1, IMAGES[0], 1], [3]], left=True)
    view = view_of(layout, {ClsAttention(-2): scores(0, layout)})
    assert FasterVLM(keep).reduce(view).map.is_identity
    assert not FasterVLM(0.5).reduce(view).map.is_identity


def test_text_only_batches_pass() -> None:
    layout = batch([[2], [3]])
    assert FasterVLM(1).reduce(view_of(layout, {ClsAttention(-2): scores(0, layout)})).map.is_identity


def test_it_asks_for_one_row_of_the_towers_attention_and_renumbers() -> None:
    (site,) = FasterVLM(layer=-3).sites(4)
    assert (site.layer, site.needs) == (0, (ClsAttention(-3),))
    assert FasterVLM().positions == "renumber"


@pytest.mark.parametrize(
    "options", [{"keep": 0}, {"keep": 1.5}, {"keep": True}, {"layer": 0.5}, {"scope": "sample"}, {"scope": "tile"}, {"positions": "x"}]
)
def test_bad_options(options: dict[str, object]) -> None:
    with pytest.raises(FoveateError, match=next(iter(options))):
        FasterVLM(**options)  # type: ignore[arg-type]
