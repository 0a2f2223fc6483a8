"""Paired tests: numbers worked out by hand, and what must hold for any answers."""

from __future__ import annotations

from math import sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.errors import FoveateError
from foveate.evaluation.cells import Answer, Cell
from foveate.evaluation.paired import RESAMPLES, bootstrap, compare, mcnemar

SMALLEST = 2 / (RESAMPLES + 1)


def cell(scores: list[float], images: list[str] | None = None, said: list[str] | None = None, seed: int | None = None) -> Cell:
    images = images or [str(number) for number in range(len(scores))]
    said = said or ["same"] * len(scores)
    answers = [Answer(str(i), image, "", text, score) for i, (image, text, score) in enumerate(zip(images, said, scores, strict=True))]
    return Cell("task", "method", 0.5, seed, "method", answers, [1.0], summary={"accuracy": 100 * sum(scores) / len(scores)})


@pytest.mark.parametrize(
    ("lost", "gained", "p"),
    [
        (0, 0, 1),
        (1, 1, 1),
        (5, 0, 2 / 2**5),
        (10, 2, 2 * (1 + 12 + 66) / 2**12),
        (2, 10, 2 * (1 + 12 + 66) / 2**12),
        (8, 1, 2 * (1 + 9) / 2**9),
    ],
)
def test_mcnemar_by_hand(lost: int, gained: int, p: float) -> None:
    assert mcnemar(lost, gained) == pytest.approx(p, rel=1e-12)


def test_only_questions_that_one_of_both_gets_right_count() -> None:
    bare, method = cell([1.0] * 5 + [1.0] * 7 + [0.0] * 8), cell([0.0] * 5 + [1.0] * 7 + [0.0] * 8)
    found = compare(bare, [method])
    assert (found.lost, found.gained, found.test) == (5, 0, "mcnemar")
    assert found.p == pytest.approx(1 / 16)
    assert found.difference == pytest.approx(-5 / 20)
    assert found.low < found.difference < found.high < 0


def test_loyalty_looks_at_answers_not_at_their_scores() -> None:
    bare = cell([1, 0, 0, 1], said=["Yes.", "two", "red", "map"])
    method = cell([1, 0, 0, 0], said=["yes", "three", " RED ", "mop"])
    assert compare(bare, [method]).loyalty == 0.5


def test_seeds_are_taken_together() -> None:
    bare = cell([1, 1, 0, 0], said=["a", "b", "c", "d"])
    seeds = [cell([1, 0, 0, 1], said=["a", "x", "c", "x"], seed=0), cell([1, 0, 0, 0], said=["a", "b", "x", "d"], seed=1)]
    found = compare(bare, seeds)
    assert found.test == "bootstrap"
    assert found.difference == pytest.approx((0 - 1 + 0 + 0.5) / 4)
    assert (found.lost, found.gained) == (1, 1)
    assert found.loyalty == 5 / 8


def test_one_picture_says_nothing_of_others() -> None:
    """All resamples are the same, so the interval is a point."""
    low, high, p = bootstrap(np.array([1.0, 0.0, 1.0, 0.0]), ["one"] * 4)
    assert (low, high) == (0.5, 0.5)
    assert p == pytest.approx(SMALLEST)


def test_two_pictures_by_hand() -> None:
    """Drawn twice each with 1/4, both with 1/2: means 1, 0 and 1/2. A quarter of the resamples are not above 0."""
    low, high, p = bootstrap(np.array([1.0, 0.0]), ["one", "two"])
    assert (low, high) == (0, 1)
    assert p == pytest.approx(0.5, abs=0.06)  # three standard errors of 2 * 1/4 from 2,000 draws


def test_the_interval_is_that_of_the_mean() -> None:
    """Of independent questions the standard error is known: 200 gained and 100 lost of 900."""
    difference = np.array([1.0] * 200 + [-1.0] * 100 + [0.0] * 600)
    low, high, p = bootstrap(difference, [str(number) for number in range(900)])
    half = 1.96 * sqrt((300 / 900 - (100 / 900) ** 2) / 900)
    assert low == pytest.approx(1 / 9 - half, abs=half / 8)
    assert high == pytest.approx(1 / 9 + half, abs=half / 8)
    assert p == pytest.approx(SMALLEST)


def test_questions_about_one_picture_are_not_independent() -> None:
    """Ten equal differences a picture tell as much as one."""
    each = np.array([1.0, -1.0, 1.0, 0.0, 0.0, 1.0])
    alone = bootstrap(each, [str(number) for number in range(6)])
    assert bootstrap(each.repeat(10), [str(number // 10) for number in range(60)]) == pytest.approx(alone)
    low, high, _ = bootstrap(each.repeat(10), [str(number) for number in range(60)])
    assert high - low < (alone[1] - alone[0]) / 2


answers = st.lists(st.tuples(st.sampled_from([0, 1]), st.sampled_from([0, 1]), st.integers(0, 5)), min_size=1, max_size=40)
soft = st.lists(
    st.tuples(st.sampled_from([0, 0.3, 0.6, 0.9, 1]), st.sampled_from([0, 0.3, 0.6, 0.9, 1]), st.integers(0, 5)), min_size=1, max_size=40
)


@settings(max_examples=30)
@given(st.one_of(answers, soft))
def test_no_difference_no_effect(rows: list[tuple[float, float, int]]) -> None:
    same = cell([a for a, _, _ in rows], [str(image) for *_, image in rows])
    found = compare(same, [same])
    assert (found.difference, found.low, found.high, found.p, found.loyalty) == (0, 0, 0, 1, 1)


@settings(max_examples=30)
@given(st.one_of(answers, soft))
def test_the_other_way_round(rows: list[tuple[float, float, int]]) -> None:
    images = [str(image) for *_, image in rows]
    one, other = cell([a for a, _, _ in rows], images), cell([b for _, b, _ in rows], images)
    there, back = compare(one, [other]), compare(other, [one])
    assert there.difference == pytest.approx(-back.difference)
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low), abs=1e-9)
    assert there.p == pytest.approx(back.p)
    assert (there.lost, there.gained, there.loyalty) == (back.gained, back.lost, back.loyalty)


@settings(max_examples=30)
@given(st.one_of(answers, soft))
def test_the_interval_holds_the_difference(rows: list[tuple[float, float, int]]) -> None:
    images = [str(image) for *_, image in rows]
    found = compare(cell([a for a, _, _ in rows], images), [cell([b for _, b, _ in rows], images)])
    assert -1 <= found.low <= found.difference <= found.high <= 1
    assert 0 < found.p <= 1
    assert found.difference == pytest.approx(sum(b - a for a, b, _ in rows) / len(rows))


def test_other_questions_cannot_be_compared() -> None:
    with pytest.raises(FoveateError, match="different questions"):
        compare(cell([1, 0]), [cell([1, 0, 1])])
    with pytest.raises(FoveateError, match="no cell"):
        compare(cell([1, 0]), [])
