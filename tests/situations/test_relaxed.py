"""Relaxed accuracy where texts only look like numbers, or numbers like nothing; and the period that two harnesses treat apart."""

from __future__ import annotations

import pytest

from foveate.evaluation.metrics import make
from foveate.evaluation.metrics.relaxed import number, relaxed
from foveate.evaluation.metrics.vqa import evalai, normalise
from foveate.evaluation.samples import Sample

NO_NUMBERS = ["nan", "NaN", "-nan", "inf", "Infinity", "-inf", "1e999", "nan%", "inf%", "1e400%"]


@pytest.mark.parametrize(
    ("text", "value"),
    [("50%", 0.5), ("50%%", 0.5), ("50%%%", 0.5), ("50 %", 0.5), ("-3.5%", -0.035), ("1e2%", 1.0), ("7", 7.0), (".5", 0.5), ("0%", 0.0)],
)
def test_all_trailing_percent_signs_go(text: str, value: float) -> None:
    assert number(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "%", "%%", "1,000", "five", "5%5", "5 apples", "$5", "%5", "1/2", "--5"])
def test_anything_else_is_no_number(text: str) -> None:
    assert number(text) is None


@pytest.mark.parametrize("answer", NO_NUMBERS)
@pytest.mark.parametrize("prediction", [*NO_NUMBERS, "5", "0.0", "a text"])
def test_what_is_no_finite_number_matches_nothing_not_even_itself(answer: str, prediction: str) -> None:
    assert not relaxed(prediction, answer)
    assert not relaxed(answer, prediction)


@pytest.mark.parametrize(
    ("answer", "prediction", "right"),
    [
        ("50%%", "0.5", True),
        ("0.5", "50%%", True),
        ("50%", "50%%", True),
        ("5%%", "5", False),
        ("nancy", "Nancy", True),  # only whole texts read as numbers
        ("in", "in", True),
        ("0", "nan", False),
        ("0", "0%", False),  # a wanted zero is a text
        ("0%", "0%", True),
        ("1e308", "1.04e308", True),
        ("1e-320", "1", False),
        ("%", "%", True),
    ],
)
def test_as_the_harness(answer: str, prediction: str, right: bool) -> None:
    assert relaxed(prediction, answer) is right
    assert make("relaxed", {}).score(f" {prediction}\n", Sample("0", (), "?", (answer,))) == right


@pytest.mark.parametrize(("text", "plain"), [("3.", "3"), ("v2.0.", "v2.0"), ("2.0", "2.0"), ("No. 3.", "no 3"), ("3...", "3")])
def test_a_last_period_goes_behind_digits_too_by_the_official_rule_and_lmms_evals(text: str, plain: str) -> None:
    """VLMEvalKit's keeps "3." and "v2.0.": `variant=both` is not its rule, and does not say so."""
    assert normalise(text) == evalai(text) == plain
