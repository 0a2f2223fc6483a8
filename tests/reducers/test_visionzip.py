"""VisionZip against its steps in plain loops: which patches merge into which, with which weights, and where they stand."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from foveate import FoveateError
from foveate.contract import ClsAttention, TowerKeys, View
from foveate.reducers.fastervlm import FasterVLM
from foveate.reducers.visionzip import VisionZip
from foveate.tokens import Layout, TokenMap, budget
from tests.reducers.ragged import counted
from tests.reducers.test_fastervlm import IMAGES, batch, batches, best, check_alone, check_sane, members, mosaic, quick, scores, view_of

CLS, KEYS = ClsAttention(-2), TowerKeys(-2)


def few_keys(seed: int, layout: Layout) -> Tensor:
    """Small integers, so that many similarities tie exactly."""
    return torch.randint(-2, 3, (*layout.shape, 3), generator=torch.Generator().manual_seed(seed)).float()


def view_with(layout: Layout, seed: int) -> View:
    return view_of(layout, {CLS: scores(seed, layout), KEYS: few_keys(seed, layout)}, seed)


def on(score: Tensor, keys: Tensor, **options: object) -> TokenMap:
    """The map of one image of plain tokens."""
    view = View.of(torch.randn(1, len(score), 3), signals={CLS: score[None], KEYS: keys[None]})
    return VisionZip(**options).reduce(view).map  # type: ignore[arg-type]


def groups_of(group: list[tuple[int, int]], view: View, dominant: float, contextual: float) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """What each survivor of one tile is made of: itself, and for a target those that chose it."""
    N = len(group)
    D = budget(dominant, N)
    C = budget(contextual, N) if contextual else 0
    first = best(group, view.signals[CLS], D)
    rest = [at for at in group if at not in first]
    made = {at: [at] for at in first}
    if D + C >= N:
        return {at: [at] for at in group}
    if C == 0:
        return made
    targets = rest[:: len(rest) // C][:C]
    made |= {at: [at] for at in targets}

    def cosine(a: tuple[int, int], b: tuple[int, int]) -> float:
        x, y = (view.signals[KEYS][at].double().numpy() for at in (a, b))
        return round(float(x @ y) / max(1e-12, math.sqrt(float(x @ x))) / max(1e-12, math.sqrt(float(y @ y))), 9)

    for at in rest:
        if at not in targets:
            made[max(targets, key=lambda t: (cosine(at, t), -t[1]))].append(at)
    return made


COUNTS = st.sampled_from([1, 2, 4, 100, 0.1, 0.3, 0.6, 1.0])


@quick
@given(
    batches(),
    COUNTS,
    st.one_of(COUNTS, st.just(0)),
    st.integers(0, 99),
    st.sampled_from(["mean", "sum"]),
    st.sampled_from(["raster", "appended"]),
)
def test_the_steps(layout: Layout, dominant: float, contextual: float, seed: int, merge: str, order: str) -> None:
    reducer, view = VisionZip(dominant, contextual, merge=merge, order=order), view_with(layout, seed)
    assert view.tokens is not None
    m = reducer.reduce(view).map
    y = m.apply(view.tokens)
    made: dict[tuple[int, int], Any] = {}
    for group in members(layout):
        made |= groups_of(group, view, dominant, contextual)
        assert sum(at in made for at in group) == counted(reducer, len(group), len(group))
    merged_tiles = [layout.place[at][:2].tolist() for at, group in made.items() if len(group) > 1]
    for b in range(layout.shape[0]):
        keys: dict[int, tuple[int, int, int]] = {}
        image_slots = [n for n in range(layout.shape[1]) if layout.visual[b, n]]
        for n in range(layout.shape[1]):
            if not layout.valid[b, n] or (layout.visual[b, n] and (b, n) not in made):
                continue
            keys[n] = (n, 0, n)
            contextual_here = layout.visual[b, n] and layout.place[b, n, :2].tolist() in merged_tiles
            N = sum(layout.place[b, s, :2].tolist() == layout.place[b, n, :2].tolist() for s in image_slots)
            if contextual_here and order == "appended":
                tile = next(g for g in members(layout) if (b, n) in g)
                if (b, n) not in best(tile, view.signals[CLS], budget(dominant, N)):
                    keys[n] = (max(s for s in image_slots if layout.image[b, s] == layout.image[b, n]), 1, n)
        expected = sorted(keys, key=lambda n: keys[n])
        there = m.representative[b] >= 0
        assert m.representative[b, there].tolist() == expected if not m.is_identity else len(expected) == int(layout.valid[b].sum())
        for t in range(m.representative.shape[1]):
            at = (b, int(m.representative[b, t]))
            if at[1] < 0 or not layout.visual[at]:
                continue
            group = made[at]
            assert m.sources(b, t) == sorted(n for _, n in group)
            own, others = view.tokens[at].double().numpy(), [view.tokens[o].double().numpy() for o in group if o != at]
            vector = np.mean([own, *others], 0) if merge == "mean" else own + sum(others) / max(1, len(others))
            np.testing.assert_allclose(y[b, t].numpy(), vector, atol=1e-5)
            assert m.target.size[b, t] == len(group)
            if not others:
                assert torch.equal(y[b, t], view.tokens[at])
    if order == "raster":
        check_sane(view, m)
    check_alone(view, m, reducer.reduce)
    if contextual:
        assert float(m.target.size.sum()) == float(layout.size.sum())


def test_targets_of_ten_patches_and_three_contextual_tokens() -> None:
    """Ten remain: step 3, targets at 0, 3 and 6 of the remaining; 9 is cut and merges like any other."""
    score = torch.cat([torch.tensor([5.0]), torch.ones(10)])
    keys = torch.eye(3)[[0, 0, 1, 1, 1, 1, 1, 2, 0, 1, 2]]  # of the remaining (slots 1 to 10): targets 1, 4, 7
    m = on(score, keys, dominant=1, contextual=3)
    assert m.representative.tolist() == [[0, 1, 4, 7]]
    assert [m.sources(0, t) for t in range(4)] == [[0], [1, 8], [2, 3, 4, 5, 6, 9], [7, 10]]
    assert on(score, keys, dominant=1, contextual=3, order="appended").representative.tolist() == [[0, 1, 4, 7]]
    late = torch.cat([torch.ones(10), torch.tensor([5.0])])
    assert on(late, keys, dominant=1, contextual=3).representative.tolist() == [[0, 3, 6, 10]]
    assert on(late, keys, dominant=1, contextual=3, order="appended").representative.tolist() == [[10, 0, 3, 6]]


def test_two_equal_tokens_and_one_target() -> None:
    x = torch.randn(1, 1, 3)
    view = View.of(torch.cat([torch.zeros(1, 1, 3), x, x], 1), signals={CLS: torch.tensor([[2.0, 1, 1]]), KEYS: torch.ones(1, 3, 2)})
    for merge, factor in (("sum", 2.0), ("mean", 1.0)):
        y = VisionZip(1, 1, merge=merge).reduce(view).map.apply(view.tokens)  # type: ignore[arg-type]
        torch.testing.assert_close(y[0, 1], factor * x[0, 0])


def test_an_empty_assignment_is_the_target_itself() -> None:
    score, keys = torch.tensor([9.0, 1, 1, 1, 1]), torch.tensor([[0.0, 1], [1, 0], [1, 0], [0, 1], [1, 0]])
    for merge in ("mean", "sum"):
        m = on(score, keys, dominant=1, contextual=2, merge=merge)  # targets 1 and 3; 2 and 4 go to 1
        x = torch.randn(1, 5, 3)
        assert [m.sources(0, t) for t in range(3)] == [[0], [1, 2, 4], [3]]
        assert torch.equal(m.apply(x)[:, 2], x[:, 3])


@quick
@given(batches(), COUNTS, st.integers(0, 99))
def test_without_contextual_tokens_it_is_fastervlm(layout: Layout, dominant: float, seed: int) -> None:
    view = view_with(layout, seed)
    m, other = VisionZip(dominant, 0).reduce(view).map, FasterVLM(dominant).reduce(view).map
    assert torch.equal(m.member, other.member)
    assert m.weight is None
    assert torch.equal(m.target.position, other.target.position)


def test_the_settings_of_the_paper() -> None:
    assert counted(VisionZip(), 576, 576) == 221
    assert counted(VisionZip(54, 10), 576, 576) == 64
    assert counted(VisionZip(0.65, 0.05), 1000, 1000) == 700
    assert counted(VisionZip(54, 10), 60, 60) == 60  # fewer than C remain
    assert counted(VisionZip(54, 10), 20, 20) == 20
    assert len(on(torch.rand(60), torch.randn(60, 4), dominant=54, contextual=10).representative[0]) == 60


def test_only_directions_of_keys_and_ranks_of_scores_count() -> None:
    g = torch.Generator().manual_seed(0)
    score, keys = torch.rand(30, generator=g), torch.randn(30, 4, generator=g)
    lengths = torch.tensor([0.5, 2.0, 8.0]).repeat(10)[:, None]
    m = on(score, keys, dominant=5, contextual=4)
    assert torch.equal(on(4 * score, keys * lengths, dominant=5, contextual=4).member, m.member)
    assert not torch.equal(on(score, keys.roll(1, 0), dominant=5, contextual=4).member, m.member)


def test_tokens_merged_before_count_with_their_size() -> None:
    layout = batch([[mosaic((1, 3))]])
    layout.size[0, 2] = 3.0
    view = view_of(layout, {CLS: torch.tensor([[2.0, 1, 1]]), KEYS: torch.ones(1, 3, 2)})
    x = torch.tensor([[[0.0], [1.0], [5.0]]])
    m = VisionZip(1, 1).reduce(view).map
    assert m.apply(x).flatten().tolist() == [0.0, 4.0]
    assert m.target.size.tolist() == [[1.0, 4.0]]


def test_tiles_are_merged_apart_and_an_image_together() -> None:
    layout = batch([[1, mosaic((2, 2), (1, 2), (2, 2)), 1]])
    view = view_with(layout, 0)
    m = VisionZip(1, 1).reduce(view).map
    crops = [{int(layout.place[0, s, 1]) for s in m.sources(0, t)} for t in range(m.representative.shape[1])]
    assert all(len(c) == 1 for c in crops)
    assert m.target.visual.sum() == 6
    together = VisionZip(1, 1, scope="image").reduce(view).map
    assert together.target.visual.sum() == 2
    assert sorted(together.target.size[together.target.visual].tolist()) == [1.0, 11.0]


def test_gradients_reach_every_patch() -> None:
    layout = batch([[1, IMAGES[4], 1]])
    view = view_with(layout, 0)
    x = torch.randn(*layout.shape, 3, requires_grad=True)
    VisionZip(0.2, 0.2).reduce(view).map.apply(x).sum().backward()
    assert x.grad is not None
    assert bool((x.grad > 0).all())


@pytest.mark.parametrize("order", ["raster", "appended"])
@pytest.mark.parametrize(("dominant", "contextual"), [(1.0, 0), (1.0, 0.1), (1000, 30), (0.5, 1.0)])
def test_keeping_everything_is_the_identity(dominant: float, contextual: float, order: str) -> None:
    layout = batch([[2, IMAGES[3], 1], [1, IMAGES[0], 1, IMAGES[4], 1], [3]], left=True)
    view = view_with(layout, 0)
    assert VisionZip(dominant, contextual, order=order).reduce(view).map.is_identity
    assert not VisionZip(0.5, 1, order=order).reduce(view).map.is_identity
    text = batch([[2], [3]])
    assert VisionZip(1, 1, order=order).reduce(view_with(text, 0)).map.is_identity


def test_it_asks_for_attention_and_keys_of_one_block_and_renumbers() -> None:
    (site,) = VisionZip(layer=-3).sites(4)
    assert (site.layer, site.needs) == (0, (ClsAttention(-3), TowerKeys(-3)))
    assert VisionZip().positions == "renumber"


@pytest.mark.parametrize(
    "options",
    [
        {"dominant": 0},
        {"dominant": 0.0},
        {"dominant": 1.5},
        {"dominant": True},
        {"contextual": -1},
        {"contextual": "few"},
        {"layer": None},
        {"scope": "sample"},
        {"merge": "max"},
        {"order": "score"},
        {"positions": "x"},
    ],
)
def test_bad_options(options: dict[str, object]) -> None:
    with pytest.raises(FoveateError, match=next(iter(options))):
        VisionZip(**options)  # type: ignore[arg-type]
