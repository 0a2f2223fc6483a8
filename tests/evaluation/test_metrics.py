"""Scoring rules against hand examples, a brute-force oracle for boxes and the POPE example of the reference."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foveate.errors import FoveateError
from foveate.evaluation.metrics.common import normalise, wilson
from foveate.evaluation.metrics.exact import exact_match
from foveate.evaluation.metrics.iou import iou
from foveate.evaluation.metrics.scenes import FAMILY_RULES, box_match, check_truth, majority, score_family
from foveate.evaluation.metrics.yes_no import pope, yes_no
from foveate.world.questions import RULER, box_cells


@pytest.mark.parametrize(
    ("text", "plain"),
    [("Red", "red"), ("  two\nred  squares ", "two red squares"), ("Yes.", "yes"), ("3.5", "3.5"), ("end .", "end"), ("", "")],
)
def test_normalise(text: str, plain: str) -> None:
    assert normalise(text) == plain


@given(st.lists(st.sampled_from(["red", "Square", "7", "3.5", "<loc3>"]), min_size=1), st.sampled_from([" ", "  ", "\n", " \t"]))
def test_normalise_ignores_case_spacing_and_the_final_full_stop(words: list[str], gap: str) -> None:
    plain = " ".join(words).lower()
    assert normalise(gap + gap.join(words).upper() + "." + gap) == plain
    assert normalise(plain) == plain


def test_exact_match_is_plain() -> None:
    assert exact_match("Red.", "red")
    assert not exact_match("a red", "red")
    assert not exact_match("two", "2")


@pytest.mark.parametrize(
    ("text", "said"), [("yes", "yes"), ("No.", "no"), (" YES ", "yes"), ("yes it is", None), ("", None), ("yess", None)]
)
def test_yes_no_is_strict(text: str, said: str | None) -> None:
    assert yes_no(text) == said


def test_pope_example_of_the_reference() -> None:
    """TP 4, FN 1, FP 2, TN 3 -> accuracy .7, precision .667, recall .8, F1 .727, yes ratio .6."""
    answers = ["yes"] * 5 + ["no"] * 5
    predictions = ["yes"] * 4 + ["no"] + ["yes"] * 2 + ["no"] * 3
    figures = pope(predictions, answers)
    assert figures.accuracy == pytest.approx(0.7)
    assert figures.precision == pytest.approx(2 / 3)
    assert figures.recall == pytest.approx(0.8)
    assert figures.f1 == pytest.approx(8 / 11)
    assert figures.yes_ratio == pytest.approx(0.6)
    assert figures.unparsed == 0


def test_pope_counts_what_is_neither_yes_nor_no_as_wrong() -> None:
    figures = pope(["yes", "maybe", "no", "maybe"], ["yes", "yes", "no", "no"])
    assert (figures.accuracy, figures.precision, figures.recall, figures.yes_ratio, figures.unparsed) == (0.5, 1.0, 0.5, 0.25, 2)


def test_pope_without_any_yes() -> None:
    figures = pope(["no", "no"], ["yes", "no"])
    assert (figures.precision, figures.recall, figures.f1) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("<loc3><loc4><loc3><loc4>", (3, 4, 4, 5)),
        ("<loc0><loc0><loc15><loc15>", (0, 0, 16, 16)),
        (" <loc1> <loc2> <loc3> <loc4> ", (1, 2, 4, 5)),
        ("<loc0><loc0><loc16><loc15>", None),
        ("<loc5><loc0><loc4><loc15>", None),
        ("<loc0><loc9><loc4><loc8>", None),
        ("<loc0><loc0><loc4>", None),
        ("<loc0><loc0><loc4><loc4><loc4>", None),
        ("<loc00><loc0><loc4><loc4>", None),
        ("at <loc0><loc0><loc4><loc4>", None),
        ("0 0 4 4", None),
    ],
)
def test_parse_box(text: str, box: tuple[int, int, int, int] | None) -> None:
    assert box_cells(text) == box


def cells(box: tuple[int, int, int, int]) -> set[tuple[int, int]]:
    return {(row, column) for row in range(box[0], box[2]) for column in range(box[1], box[3])}


@st.composite
def boxes(draw: st.DrawFn) -> tuple[int, int, int, int]:
    row0, row1 = sorted(draw(st.tuples(st.integers(0, RULER - 1), st.integers(0, RULER - 1))))
    column0, column1 = sorted(draw(st.tuples(st.integers(0, RULER - 1), st.integers(0, RULER - 1))))
    return row0, column0, row1 + 1, column1 + 1


def spell(box: tuple[int, int, int, int]) -> str:
    return f"<loc{box[0]}><loc{box[1]}><loc{box[2] - 1}><loc{box[3] - 1}>"


@given(boxes(), boxes())
def test_iou_counts_cells(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> None:
    common, union = len(cells(a) & cells(b)), len(cells(a) | cells(b))
    assert iou(a, b) == pytest.approx(common / union)
    assert iou(a, b) == iou(b, a)
    assert box_match(spell(a), spell(b)) == (2 * common >= union)


@given(boxes())
def test_box_survives_its_spelling(box: tuple[int, int, int, int]) -> None:
    assert box_cells(spell(box)) == box
    assert iou(box, box) == 1.0


def test_iou_of_exactly_one_half_is_right() -> None:
    assert box_match("<loc0><loc0><loc0><loc1>", "<loc0><loc0><loc0><loc0>")
    assert not box_match("<loc0><loc0><loc0><loc2>", "<loc0><loc0><loc0><loc0>")


def test_wilson_textbook_value() -> None:
    """8 of 10 at 95 %: 0.490 to 0.943 (Brown, Cai, DasGupta 2001 give the same formula)."""
    low, high = wilson(8, 10)
    assert low == pytest.approx(0.4902, abs=1e-4)
    assert high == pytest.approx(0.9433, abs=1e-4)


@given(st.integers(1, 500), st.data())
def test_wilson_holds_the_share(n: int, data: st.DataObject) -> None:
    correct = data.draw(st.integers(0, n))
    low, high = wilson(correct, n)
    assert 0.0 <= low <= correct / n + 1e-12
    assert correct / n - 1e-12 <= high <= 1.0
    mirrored = wilson(n - correct, n)
    assert (1 - mirrored[1], 1 - mirrored[0]) == pytest.approx((low, high))


def test_wilson_refuses_nothing() -> None:
    with pytest.raises(FoveateError, match="n=0"):
        wilson(0, 0)


def test_majority_answer_and_tie() -> None:
    assert majority("count", ["2", "3", "3", "1"]) == ("3", 0.5)
    assert majority("attribute", ["red", "Blue", "blue.", "red"]) == ("blue", 0.5)


def test_majority_box_is_the_best_constant_not_the_most_frequent() -> None:
    corner = "<loc12><loc12><loc12><loc12>"
    middle = ["<loc0><loc0><loc7><loc7>", "<loc0><loc0><loc6><loc7>", "<loc0><loc0><loc7><loc6>"]
    answer, accuracy = majority("locating", [corner, corner, *middle])
    assert answer in middle
    assert accuracy == pytest.approx(3 / 5)


@given(st.lists(boxes(), min_size=1, max_size=8))
def test_majority_box_beats_every_other_answer(truths: list[tuple[int, int, int, int]]) -> None:
    answers = [spell(box) for box in truths]
    answer, accuracy = majority("locating", answers)
    assert accuracy == pytest.approx(max(sum(box_match(one, other) for other in answers) / len(answers) for one in answers))
    assert sum(box_match(answer, other) for other in answers) / len(answers) == pytest.approx(accuracy)


def test_score_of_presence_has_pope_figures() -> None:
    score = score_family("presence", ["yes", "no", "yes", "no"], ["yes", "yes", "no", "no"])
    assert (score.n, score.correct, score.accuracy, score.majority_accuracy) == (4, 2, 0.5, 0.5)
    assert score.details["yes_ratio"] == 0.5


def test_score_of_locating_has_mean_iou() -> None:
    truth = "<loc0><loc0><loc1><loc1>"
    score = score_family("locating", [truth, "<loc0><loc0><loc0><loc1>", "nonsense"], [truth] * 3)
    assert score.correct == 2
    assert score.details == {"mean_iou": pytest.approx(0.5), "unparsed": 1}


def test_truth_that_cannot_be_scored_is_refused() -> None:
    with pytest.raises(FoveateError, match="question 7: unknown family 'colour'; known: presence, count"):
        check_truth("colour", "red", "question 7")
    with pytest.raises(FoveateError, match="'maybe' of family presence is not yes or no"):
        check_truth("presence", "maybe", "question 7")
    with pytest.raises(FoveateError, match="is not a box"):
        check_truth("locating", "left", "question 7")
    with pytest.raises(FoveateError, match="is empty"):
        check_truth("reading", " . ", "question 7")
    for family, answer in [("presence", "yes"), ("count", "3"), ("locating", "<loc0><loc0><loc7><loc7>")]:
        check_truth(family, answer, "question 7")


def test_families_of_the_world() -> None:
    assert list(FAMILY_RULES) == ["presence", "count", "attribute", "relation", "reading", "locating"]
