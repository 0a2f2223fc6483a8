"""The algebra of token maps, and the budgets."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from foveate import FoveateError
from foveate.tokens import Kind, Layout, TokenMap, budget, top

quick = settings(max_examples=60)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Ragged batches: rows of text, images of several lengths and padding on either side."""
    lengths: list[int] = []
    rows: list[list[int]] = []
    for _ in range(draw(st.integers(1, 3))):
        row = [0] * draw(st.integers(0, 3))
        for _ in range(draw(st.integers(0, 2))):
            n = draw(st.integers(4, 9))
            lengths.append(n)
            row += [1] * n + [0] * draw(st.integers(0, 2))
        rows.append([*row, 0])
    longest = max(map(len, rows))
    left = draw(st.booleans())
    pads = [[2] * (longest - len(row)) for row in rows]
    slots = torch.tensor([p + r if left else r + p for p, r in zip(pads, rows, strict=True)])
    return Layout.sequence(slots == 1, lengths, valid_BN=slots != 2)


@st.composite
def maps(draw: st.DrawFn, layout: Layout) -> TokenMap:
    kind = draw(st.sampled_from(["identity", "keep", "pool"]))
    if kind == "identity":
        return TokenMap.identity(layout)
    if kind == "keep":
        bits = draw(st.lists(st.booleans(), min_size=layout.kind.numel(), max_size=layout.kind.numel()))
        return TokenMap.keep(layout, torch.tensor(bits).view(layout.shape))
    shortest = min(layout.lengths(), default=1)
    return TokenMap.pool(layout, draw(st.sampled_from([s for s in (1, 2, 4) if s <= shortest])))


def dense(m: TokenMap) -> Tensor:
    """The map as a (B, M, N) matrix: the slow oracle, edge by edge."""
    B, M, E = m.member.shape
    matrix = torch.zeros(B, M, m.source.shape[1], dtype=torch.float64)
    for b in range(B):
        for t in range(M):
            for e in range(E):
                s = int(m.member[b, t, e])
                if s >= 0:
                    matrix[b, t, s] += 1.0 if m.weight is None else float(m.weight[b, t, e])
    return matrix


@quick
@given(st.data())
def test_apply_is_the_matrix(data: st.DataObject) -> None:
    m = data.draw(layouts().flatmap(maps))
    x = torch.randn(*m.source.shape, 3, dtype=torch.float64)
    torch.testing.assert_close(m.apply(x), dense(m) @ x)


@quick
@given(st.data())
def test_identity_is_neutral_and_exact(data: st.DataObject) -> None:
    layout = data.draw(layouts())
    m = data.draw(maps(layout))
    x = torch.randn(*layout.shape, 3)
    assert torch.equal(TokenMap.identity(layout).apply(x), x)
    for composed in (TokenMap.identity(layout).then(m), m.then(TokenMap.identity(m.target))):
        assert torch.equal(composed.apply(x), m.apply(x))
        assert torch.equal(dense(composed), dense(m))


@quick
@given(st.data())
def test_composition_is_associative_and_means_one_after_the_other(data: st.DataObject) -> None:
    a = data.draw(layouts().flatmap(maps))
    b = data.draw(maps(a.target))
    c = data.draw(maps(b.target))
    # Weights are powers of two, so that products and sums are exact whatever their order.
    assert torch.equal(dense(a.then(b).then(c)), dense(a.then(b.then(c))))
    assert torch.equal(dense(a.then(b)), dense(b) @ dense(a))
    assert torch.equal(a.then(b).representative, a.representative.gather(1, b.representative.clamp(min=0)).where(b.representative >= 0, -1))


@quick
@given(st.data())
def test_mass_is_that_of_the_sources(data: st.DataObject) -> None:
    m = data.draw(layouts().flatmap(maps))
    used = torch.zeros(m.source.shape, dtype=torch.bool)
    for b in range(m.source.shape[0]):
        used[b, m.member[b][m.member[b] >= 0]] = True
    assert torch.equal(m.target.size.sum(1), (m.source.size * used).sum(1))


@quick
@given(st.data())
def test_expand_then_apply_gives_back_what_survived(data: st.DataObject) -> None:
    m = data.draw(layouts().flatmap(maps))
    y = torch.randn(*m.target.shape, 2, dtype=torch.float64)
    filled = (m.member >= 0).any(-1)
    torch.testing.assert_close(m.apply(m.expand(y))[filled], y[filled], rtol=0, atol=1e-12)


@quick
@given(st.data())
def test_a_dropped_source_is_owned_by_the_survivor_before_it(data: st.DataObject) -> None:
    m = data.draw(layouts().flatmap(maps))
    for b in range(m.source.shape[0]):
        owner = None
        first = None
        for s in range(m.source.shape[1]):
            mine = [t for t in range(m.target.shape[1]) if s in m.sources(b, t)]
            if mine:
                owner = mine[0]
                first = owner if first is None else first
            expected = owner if owner is not None else 0
            assert int(m.owner[b, s]) == expected


@quick
@given(st.data())
def test_text_survives_in_order_and_rows_keep_their_budget(data: st.DataObject) -> None:
    layout = data.draw(layouts())
    m = data.draw(maps(layout))
    for b in range(layout.shape[0]):
        text = [i for i in range(layout.shape[1]) if layout.valid[b, i] and layout.kind[b, i] == Kind.TEXT]
        kept = [int(r) for r, k, v in zip(m.representative[b], m.target.kind[b], m.target.valid[b], strict=True) if v and k == Kind.TEXT]
        assert kept == text
        survivors = [int(r) for r in m.representative[b] if r >= 0]
        assert survivors == sorted(survivors)


def test_layouts_that_do_not_meet_are_refused() -> None:
    layout = Layout.sequence(torch.tensor([[False, True, True, True, True]]))
    pooled = TokenMap.pool(layout, 2)
    with pytest.raises(FoveateError, match="cannot compose"):
        pooled.then(TokenMap.identity(layout))


def test_merge_takes_any_weights_and_shared_sources() -> None:
    layout = Layout.sequence(torch.tensor([[True, True, True]]))
    member = torch.tensor([[[0, 1], [1, 2], [-1, -1]]])
    weight = torch.tensor([[[1.0, 1.0], [0.5, 0.25], [9.0, 9.0]]])
    m = TokenMap.merge(layout, member, weight, torch.tensor([[0, 1, -1]]))
    x = torch.tensor([[[1.0], [2.0], [4.0]]])
    assert m.apply(x).flatten().tolist() == [3.0, 2.0, 0.0]  # weights that sum to 2, a source in two targets, an empty target
    assert m.target.size.tolist() == [[2.0, 2.0, 0.0]]
    assert m.target.valid.tolist() == [[True, True, False]]
    assert m.owner.tolist() == [[0, 0, 1]]


def test_newlines_between_patches_neither_count_nor_pool() -> None:
    layout = Layout.sequence(torch.tensor([[True, True, False, True, True, False]]), [4])
    m = TokenMap.pool(layout, 4)
    assert [m.sources(0, t) for t in range(m.target.shape[1])] == [[0, 1, 3, 4], [2], [5]]
    assert layout.rank_in_image.tolist() == [[0, 1, 0, 2, 3, 0]]


def test_rows_and_columns_of_a_raster() -> None:
    layout = Layout.sequence(torch.tensor([[False, *[True] * 6]]), [6], grids=[(2, 3)])
    assert layout.place[0, 1:, 3].tolist() == [0, 0, 0, 1, 1, 1]
    assert layout.place[0, 1:, 4].tolist() == [0, 1, 2, 0, 1, 2]


def test_lengths_must_add_up() -> None:
    with pytest.raises(FoveateError, match="have 3 visual placeholders, but the 2 images make 4"):
        Layout.sequence(torch.tensor([[True, True, True]]), [2, 2])


@pytest.mark.parametrize(
    ("keep", "tokens", "kept"),
    [
        (0.05, 576, 29),
        (0.1, 576, 58),
        (0.25, 576, 144),
        (0.098, 576, 56),
        (0.5, 576, 288),
        (0.5, 5, 3),
        (0.001, 10, 1),
        (64, 576, 64),
        (64, 10, 10),
    ],
)
def test_budget(keep: float, tokens: int, kept: int) -> None:
    assert budget(keep, tokens) == kept


@pytest.mark.parametrize("keep", [0, 0.0, -1, 1.5, True, "half", None])
def test_impossible_budgets(keep: Any) -> None:
    with pytest.raises(FoveateError, match="keep="):
        budget(keep, 10)


def test_top_breaks_ties_by_raster_order() -> None:
    # Two heads over four patches, mean [.25, .3, .2, .25]: FasterVLM's hand example.
    layout = Layout.sequence(torch.ones(1, 4, dtype=torch.bool))
    score = torch.tensor([[0.25, 0.3, 0.2, 0.25]])
    assert top(layout, score, 1).tolist() == [[False, True, False, False]]
    assert top(layout, score, 2).tolist() == [[True, True, False, False]]
    assert top(layout, score, 4).all()


@quick
@given(layouts(), st.sampled_from([0.1, 0.5, 1.0, 3]))
def test_top_keeps_the_budget_of_every_image(layout: Layout, keep: float) -> None:
    kept = top(layout, torch.rand(layout.shape), keep)
    assert not (kept & ~layout.visual).any()
    for image in range(int(layout.image.max()) + 1):
        mine = layout.visual & (layout.image == image)
        assert int((kept & mine).sum()) == budget(keep, int(mine.sum()))
