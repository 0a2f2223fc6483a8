"""FoPru as far as its rules are known (they are unverified; see the module)."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveate import FoveateError
from foveate.contract import ReceivedAttention, View
from foveate.reducers.fopru import FoPru
from foveate.tokens import Layout, budget
from tests.reducers.ragged import counted
from tests.reducers.test_fastervlm import (
    IMAGES,
    batch,
    batches,
    best,
    check_alone,
    check_sane,
    keeps,
    kept_of,
    members,
    quick,
    scores,
    view_of,
)

RECEIVED = ReceivedAttention(-2)


def kept(score: list[float], grid: tuple[int, int] | None, keep: float, strategy: str) -> list[int]:
    view = View.of(torch.randn(1, len(score), 3), grid=grid, signals={RECEIVED: torch.tensor([score])})
    return FoPru(keep, strategy).reduce(view).map.representative[0].tolist()


@quick
@given(batches(), keeps, st.integers(0, 99))
def test_rank_keeps_the_best_of_each_image(layout: Layout, keep: float, seed: int) -> None:
    reducer, score = FoPru(keep), scores(seed, layout)
    view = view_of(layout, {RECEIVED: score})
    m = reducer.reduce(view).map
    expected = set().union(*(best(g, score, counted(reducer, len(g), len(g))) for g in members(layout, (0,))))
    assert set(map(tuple, kept_of(view, m).nonzero().tolist())) == expected
    check_sane(view, m)
    check_alone(view, m, reducer.reduce)


@quick
@given(batches(), keeps, st.integers(0, 99))
def test_row_keeps_the_best_whole_rows_of_each_image(layout: Layout, keep: float, seed: int) -> None:
    reducer, score = FoPru(keep, "row"), scores(seed, layout)
    view = view_of(layout, {RECEIVED: score})
    m = reducer.reduce(view).map
    expected: set[tuple[int, int]] = set()
    for image in members(layout, (0,)):
        rows: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for at in image:
            rows.setdefault((int(layout.place[at][1]), int(layout.place[at][3])), []).append(at)
        # Scores are eighths: their sums are exact, and so are ties between rows of one length.
        order = sorted(rows.values(), key=lambda row: (-sum(float(score[at]) for at in row) / len(row), row[0]))
        taken = set(order[0])
        for row in order[1:]:
            if len(taken) + len(row) > budget(keep, len(image)):
                break
            taken |= set(row)
        expected |= taken
    assert set(map(tuple, kept_of(view, m).nonzero().tolist())) == expected
    check_sane(view, m)
    check_alone(view, m, reducer.reduce)


def test_two_by_two() -> None:
    score = [0.1, 0.2, 0.15, 0.3]
    assert kept(score, (2, 2), 2, "row") == [2, 3]
    assert kept(score, (2, 2), 2, "rank") == [1, 3]


@pytest.mark.parametrize("keep", [3, 6, 9])
def test_equal_scores_inside_rows_make_both_strategies_alike(keep: int) -> None:
    score = [x for x in (0.2, 0.4, 0.1, 0.3) for _ in range(3)]
    assert kept(score, (4, 3), keep, "rank") == kept(score, (4, 3), keep, "row")
    assert len(kept(score, (4, 3), keep, "row")) == keep


def test_rows_that_tie_go_by_their_order() -> None:
    assert kept([0.1, 0.3, 0.3, 0.1, 0.2, 0.2], (3, 2), 2, "row") == [0, 1]
    assert kept([0.1] * 6, None, 2, "rank") == [0, 1]


def test_a_budget_between_rows_is_rounded_down_and_one_row_always_stays() -> None:
    score = [0.1, 0.1, 0.1, 0.5, 0.1, 0.1, 0.3, 0.3, 0.3]
    assert kept(score, (3, 3), 5, "row") == [6, 7, 8]
    assert kept(score, (3, 3), 1, "row") == [6, 7, 8]
    assert kept(score, (3, 3), 1, "rank") == [3]
    assert kept(score, (3, 3), 6, "row") == [3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("side", [1, 2, 4, 5])
@pytest.mark.parametrize("keep", [1, 3, 7, 0.1, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("strategy", ["rank", "row"])
def test_counts_of_square_grids(side: int, keep: float, strategy: str) -> None:
    n = side * side
    assert len(kept(torch.rand(n).tolist(), (side, side), keep, strategy)) == counted(FoPru(keep, strategy), n, n)


def test_a_count_without_a_known_grid_is_the_budget() -> None:
    assert counted(FoPru(0.5, "row"), 576, 576) == 288
    assert counted(FoPru(100, "row"), 576, 576) == 96
    assert counted(FoPru(100, "row"), 500, 576) == 100
    assert counted(FoPru(0.25, "row"), 0, 0) == counted(FoPru(0.25), 0, 0) == 0


def test_scale_does_not_matter() -> None:
    score = torch.rand(24, generator=torch.Generator().manual_seed(1))
    for strategy in ("rank", "row"):
        assert kept(score.tolist(), (4, 6), 12, strategy) == kept((4 * score).tolist(), (4, 6), 12, strategy)
        assert kept(score.tolist(), (4, 6), 12, strategy) != kept((-score).tolist(), (4, 6), 12, strategy)


@pytest.mark.parametrize("strategy", ["rank", "row"])
@pytest.mark.parametrize("keep", [1.0, 100])
def test_keeping_everything_is_the_identity(keep: float, strategy: str) -> None:
    layout = batch([[2, IMAGES[4], 1], [1, IMAGES[0], 1], [3]], left=True)
    view = view_of(layout, {RECEIVED: scores(0, layout)})
    assert FoPru(keep, strategy).reduce(view).map.is_identity
    assert not FoPru(0.5, strategy).reduce(view).map.is_identity
    text = batch([[2], [3]])
    assert FoPru(1, strategy).reduce(view_of(text, {RECEIVED: scores(0, text)})).map.is_identity


def test_rows_need_a_grid() -> None:
    with pytest.raises(FoveateError, match='strategy="rank"'):
        kept([0.1, 0.2, 0.3, 0.4], None, 2, "row")


def test_it_asks_for_received_attention_and_renumbers() -> None:
    (site,) = FoPru(layer=-3).sites(4)
    assert (site.layer, site.needs) == (0, (ReceivedAttention(-3),))
    assert FoPru().positions == "renumber"


@pytest.mark.parametrize("options", [{"keep": 0}, {"keep": -0.5}, {"strategy": "column"}, {"layer": "x"}, {"positions": "x"}])
def test_bad_options(options: dict[str, object]) -> None:
    with pytest.raises(FoveateError, match=next(iter(options))):
        FoPru(**options)  # type: ignore[arg-type]
