"""Every metric against the worked examples of its benchmark's rules, and what must hold for all of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foveate.errors import FoveateError
from foveate.evaluation.metrics import METRICS, make
from foveate.evaluation.metrics.anls import edit_distance, similarity
from foveate.evaluation.metrics.choice import RULES, options_of
from foveate.evaluation.metrics.iou import four_numbers, iou, to_pixels
from foveate.evaluation.metrics.mmbench import rotations
from foveate.evaluation.metrics.mmstar import multimodal_gain, multimodal_leakage
from foveate.evaluation.metrics.relaxed import relaxed
from foveate.evaluation.metrics.vqa import CONTRACTIONS, evalai, normalise, soft
from foveate.evaluation.metrics.yes_no import PARSERS
from foveate.evaluation.samples import Metric, Sample


def sample(*answers: str, name: str = "0", images: tuple[Any, ...] = (), question: str = "?", group: str = "", **extra: Any) -> Sample:
    return Sample(name, images, question, answers, group, extra)


def summary(metric: Metric, samples: list[Sample], predictions: list[str]) -> dict[str, float]:
    scores = [metric.score(prediction, one) for one, prediction in zip(samples, predictions, strict=True)]
    return metric.summary(samples, predictions, scores)


# ---- VQA -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("matches", "score"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (7, 1), (10, 1)])
def test_vqa_agreement_with_ten_people(matches: int, score: float) -> None:
    assert soft("red", ("red",) * matches + ("blue",) * (10 - matches)) == score


@given(st.integers(0, 10))
def test_vqa_agreement_is_the_mean_over_the_people_left_out(matches: int) -> None:
    answers = ["red"] * matches + ["blue"] * (10 - matches)
    each = [min(1, (answers[:k] + answers[k + 1 :]).count("red") / 3) for k in range(10)]
    assert soft("red", tuple(answers)) == pytest.approx(sum(each) / 10)


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("The two dogs.", "2 dogs"),
        ("3.", "3"),
        ("3.5", "3.5"),
        ("1,000", "1000"),
        ("1,000-2,000", "10002000"),
        ("t-shirt", "t shirt"),
        ("black - white", "black white"),
        ("A.M.", "am"),
        ("Dont know", "don't know"),
        ("none\nof\tthem ", "0 of them"),
        ("an apple, a pear", "apple pear"),
        ("the", ""),
    ],
)
def test_vqa_normalisation(text: str, plain: str) -> None:
    assert normalise(text) == plain


def test_vqa_punctuation_that_touches_a_space_anywhere_is_deleted_everywhere() -> None:
    assert normalise("a-b") == "b"  # "a b", and the article goes
    assert normalise("x-y - z") == "xy z"
    assert normalise("x-y / z") == "x y z"  # another character's space does not matter


def test_vqa_removes_at_most_32_periods() -> None:
    assert normalise("x." * 40) == "x" * 32 + "x." * 8


@pytest.mark.parametrize(
    ("word", "whole"),
    [("dont", "don't"), ("couldnt've", "couldn't've"), ("couldn'tve", "couldn't've"), ("twas", "'twas"), ("oclock", "o'clock")],
)
def test_vqa_contractions(word: str, whole: str) -> None:
    assert CONTRACTIONS[word] == whole


def test_vqa_contractions_are_not_more_than_the_official_ones() -> None:
    assert CONTRACTIONS["somebody'd"] == "somebodyd"  # the table's own mistake
    assert not {"couldntve", "lets", "shes", "well", "ill", "shed", "wed", "its"} & set(CONTRACTIONS)
    assert normalise("well, its a shed") == "well its shed"


def test_vqa_evalai_splits_off_the_possessive() -> None:
    assert evalai("Dog's, really?") == "dog 's really"
    assert normalise("Dog's") == "dog's"
    assert evalai("1,000-2,000") == "1000 2000"  # the comma is gone before the punctuation rules look for it


def test_vqa_official_leaves_ten_equal_answers_as_they_are() -> None:
    same = sample(*["yes"] * 10)
    assert make("vqa", {}).score("Yes.", same) == 0
    assert make("vqa", {}).score("yes", same) == 1
    assert make("vqa", {"variant": "both"}).score("Yes.", same) == 1
    assert make("vqa", {"variant": "evalai"}).score("Yes.", same) == 1
    differing = sample(*["yes"] * 9, "no")
    assert make("vqa", {}).score("Yes.", differing) == 1


def test_vqa_wants_ten_answers() -> None:
    with pytest.raises(FoveateError, match="has 1 answers, and metric vqa needs those of 10 people"):
        make("vqa", {}).complete(sample("yes"))


# ---- whole answers ---------------------------------------------------------------------------------------------------------------------


def test_gqa_ignores_case_and_punctuation() -> None:
    metric = make("gqa", {})
    assert metric.score("Living room.", sample("living room")) == 1
    assert metric.score("t-shirt", sample("tshirt")) == 1
    assert metric.score("the living room", sample("living room")) == 0


def test_exact_takes_any_reference() -> None:
    metric = make("exact", {})
    assert metric.score(" Red. ", sample("crimson", "red")) == 1
    assert metric.score("red!", sample("red")) == 0


@pytest.mark.parametrize(
    ("answer", "prediction", "right"),
    [
        ("50%", "0.5", True),
        ("50%", "50", False),
        ("50%", "50%", True),
        ("0", "0", True),
        ("0", "0.0", False),
        ("100", "105", True),
        ("100", "95", True),
        ("100", "106", False),
        ("-100", "-104", True),
        ("1000", "1,000", False),
        ("1,000", "1,000", True),
        ("1,000", "1000", False),
        ("Blue", "blue", True),
        ("Blue", "blue line", False),
        ("nan", "nan", False),
        ("inf", "5", False),
    ],
)
def test_relaxed_accuracy(answer: str, prediction: str, right: bool) -> None:
    assert relaxed(prediction, answer) is right


@pytest.mark.parametrize(
    ("answer", "prediction", "distance", "score"),
    [
        ("1998", "1989", 2, 0.5),
        ("hello", "helo", 1, 0.8),
        ("$12.50", "12.50", 1, 5 / 6),
        ("abcd", "wxyz", 4, 0),
        ("kitten", "sitting", 3, 4 / 7),
        ("ab", "", 2, 0),
    ],
)
def test_anls(answer: str, prediction: str, distance: int, score: float) -> None:
    assert edit_distance(prediction, answer) == edit_distance(answer, prediction) == distance
    assert similarity(prediction, answer) == pytest.approx(score)


def test_anls_lets_case_and_runs_of_space_be() -> None:
    assert similarity("new  york", "New York") == 1
    assert similarity("x   b", "a b") == pytest.approx(1 - 1 / 5)  # the raw text is 5 long
    assert similarity("x   b", "a b", "collapsed") == pytest.approx(1 - 1 / 3)
    assert make("anls", {}).score("hello", sample("world", "helo")) == pytest.approx(0.8)


@given(st.text("abC ", max_size=6), st.text("abC ", max_size=6), st.text("abC ", max_size=6))
def test_edit_distance_is_a_metric(a: str, b: str, c: str) -> None:
    assert (edit_distance(a, b) == 0) == (a == b)
    assert edit_distance(a, c) <= edit_distance(a, b) + edit_distance(b, c)
    assert abs(len(a) - len(b)) <= edit_distance(a, b) <= max(len(a), len(b))


def test_ocrbench_wants_the_reference_somewhere_in_the_answer() -> None:
    metric = make("ocrbench", {})
    assert metric.score("It reads:\nSTOP sign", sample("reads: stop")) == 1
    assert metric.score("halt", sample("stop", "HALT")) == 1
    assert metric.score("st op", sample("stop")) == 0


def test_ocrbench_formulas_keep_case_and_lose_spaces() -> None:
    group = "Handwritten Mathematical Expression Recognition"
    metric = make("ocrbench", {})
    assert metric.score("the formula is X ^ { 2 }", sample("X^{2}", group=group)) == 1
    assert metric.score("x ^ { 2 }", sample("X^{2}", group=group)) == 0
    assert make("ocrbench", {"formulas": "maths"}).score("x y", sample("xy", group="maths")) == 1


def test_ocrbench_counts_points() -> None:
    metric = make("ocrbench", {})
    samples = [sample("a", group="scene"), sample("b", group="doc"), sample("c", group="doc")]
    assert summary(metric, samples, ["a", "b", "x"]) == pytest.approx(
        {"accuracy": 200 / 3, "points": 2, "accuracy/doc": 50, "accuracy/scene": 100}
    )


# ---- yes and no ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "llava", "strict", "words"),
    [
        ("Yes", "yes", "yes", "yes"),
        ("No", "no", "no", "no"),
        ("No, there is none.", "no", "", "no"),
        ("yes.", "yes", "", "yes"),
        (" NO ", "yes", "no", "no"),
        ("There is not a dog", "no", "", ""),
        ("There is a dog. No cat.", "yes", "", "no"),
        ("A dog", "yes", "", ""),
        ("yes and no", "no", "", ""),
        ("nothing", "yes", "", ""),
    ],
)
def test_pope_answers_are_read_in_three_ways(text: str, llava: str, strict: str, words: str) -> None:
    assert {name: parse(text) for name, parse in PARSERS.items()} == {"llava": llava, "strict": strict, "words": words}


def test_pope_example() -> None:
    """TP 4, FN 1, FP 2, TN 3."""
    samples = [sample("yes")] * 5 + [sample("no")] * 5
    predictions = ["Yes", "A dog", "yes", "Yes, it is"] + ["No"] + ["yes"] * 2 + ["No", "no", "not at all"]
    assert summary(make("pope", {}), samples, predictions) == pytest.approx(
        {"accuracy": 70, "f1": 800 / 11, "precision": 200 / 3, "recall": 80, "yes_ratio": 60, "unparsed": 0}
    )


def test_pope_by_split() -> None:
    samples = [sample("yes", group="random"), sample("no", group="random"), sample("yes", group="popular"), sample("no", group="popular")]
    told = summary(make("pope", {}), samples, ["yes", "no", "yes", "yes"])
    assert told["accuracy"] == 75
    assert (told["accuracy/random"], told["f1/random"], told["yes_ratio/random"]) == (100, 100, 50)
    assert (told["accuracy/popular"], told["yes_ratio/popular"]) == (50, 100)
    assert told["f1/popular"] == pytest.approx(200 / 3)
    assert told["mean f1"] == pytest.approx((100 + 200 / 3) / 2)


def test_pope_counts_what_it_cannot_read() -> None:
    told = summary(make("pope", {"parse": "strict"}), [sample("yes"), sample("no")], ["yes.", "no"])
    assert (told["accuracy"], told["unparsed"], told["yes_ratio"]) == (50, 50, 0)


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [("Yes.", "yes", 1), ("No, it is", "No", 1), ("y.e.s", "yes", 1), ("I say yes", "yes", 0), ("Note", "no", 1), ("", "no", 0)],
)
def test_mme_reads_the_first_four_letters(text: str, answer: str, right: float) -> None:
    assert make("mme", {}).score(text, sample(answer)) == right


def test_mme_example() -> None:
    """Two images, (right, right) and (right, wrong)."""
    samples = [sample("yes", images=("a",)), sample("no", images=("a",)), sample("yes", images=("b",)), sample("no", images=("b",))]
    assert summary(make("mme", {}), samples, ["yes", "no", "yes", "yes"]) == {"accuracy": 75, "accuracy+": 50, "score": 125}


def test_mme_sums_the_scores_of_its_subtasks() -> None:
    samples = [sample(answer, images=("x",), group=group) for group in ("count", "OCR", "code_reasoning") for answer in ("yes", "no")]
    told = summary(make("mme", {}), samples, ["yes", "no", "yes", "yes", "no", "yes"])
    assert (told["score/count"], told["score/OCR"], told["score/code_reasoning"]) == (200, 50, 0)
    assert (told["perception"], told["cognition"], told["score"]) == (250, 0, 250)
    assert (told["accuracy"], told["accuracy+/OCR"]) == (50, 0)
    assert told["accuracy+"] == pytest.approx(100 / 3)


def test_mme_needs_both_questions_of_an_image() -> None:
    with pytest.raises(FoveateError, match="two questions about each image, and 1 about that of sample 7"):
        make("mme", {}).arrange([sample("yes", name="7", images=("a",))])


@pytest.mark.parametrize("metric", ["pope", "mme"])
def test_yes_no_metrics_want_yes_or_no(metric: str) -> None:
    with pytest.raises(FoveateError, match="must be yes or no, found 'maybe'"):
        make(metric, {}).complete(sample("maybe"))


# ---- multiple choice -------------------------------------------------------------------------------------------------------------------

ANIMALS = {"A": "cat", "B": "dog", "C": "horse", "D": "a cat and a dog"}


@pytest.mark.parametrize(
    ("rule", "text", "letter"),
    [
        # the start, the end, a phrase, brackets, period, colon, right bracket, space: in this order, of equals the last
        ("generic", "B", "B"),
        ("generic", "B.", "B"),
        ("generic", "B) because of A", "B"),
        ("generic", "I pick C", "C"),
        ("generic", "not (A) but rather C", "C"),
        ("generic", "The correct answer is (B).", "B"),
        ("generic", "Not (A), the answer is B, I think", "B"),
        ("generic", "both (A) and C: so (D) it must be", "D"),
        ("generic", "it may be C. or so", "C"),
        ("generic", "it is C: clearly", "C"),
        ("generic", "it is C) clearly", "C"),
        ("generic", "maybe C or D or what", "D"),
        ("generic", "CAB", None),
        ("generic", "no idea", None),
        # ScienceQA, AI2D
        ("leading", "B", "B"),
        ("leading", "b", "B"),
        ("leading", "B. dog", "B"),
        ("leading", "Because", None),
        ("leading", "(B)", None),
        ("leading", "E", None),
        # SEED
        ("first", "Banana", "B"),
        ("first", "(B)", None),
        ("first", "b", None),
        # MMStar
        ("mmstar", "b", "B"),
        ("mmstar", "(B) dog", "B"),
        ("mmstar", "Option C", "C"),
        ("mmstar", "The answer is D", "D"),
        ("mmstar", "The correct answer is D", None),
        ("mmstar", "", None),
        # MMBench: a letter among the last four words, the phrase, the text of one option
        ("mmbench", "B", "B"),
        ("mmbench", "(B) dog.", "B"),
        ("mmbench", "It must surely be (B)", "B"),
        ("mmbench", "It is B I am sure", "B"),
        ("mmbench", "It is B I am very sure", None),
        ("mmbench", "the answer is B as anyone can see", "B"),
        ("mmbench", "A or B", None),
        ("mmbench", "I see a horse", "C"),
        ("mmbench", "I see a dog", "B"),
        ("mmbench", "a cat and a dog", None),
        ("mmbench", "a horse of a very dark colour, under a very old tree in the west", None),  # longer than all options twice over
        ("mmbench", "neither", None),
    ],
)
def test_which_letter_an_answer_names(rule: str, text: str, letter: str | None) -> None:
    assert RULES[rule](text, ANIMALS) == letter


def test_options_come_from_columns_or_from_the_lines_of_the_question() -> None:
    assert options_of(sample("A", options=("cat", "dog"))) == {"A": "cat", "B": "dog"}
    listed = sample("A", question="What?\nA. cat\n(B) dog\nC: a horse \nE. not in turn")
    assert options_of(listed) == {"A": "cat", "B": "dog", "C": "a horse"}
    assert options_of(sample("A", question="What? A. B. Cooper")) == {}


@pytest.mark.parametrize("answer", ["B", "(B)", "dog", "Dog."])
def test_a_reference_becomes_a_letter(answer: str) -> None:
    assert make("choice", {}).complete(sample(answer, options=tuple(ANIMALS.values()))).answers == ("B",)


def test_numbers_count_options_from_0() -> None:
    metric, options = make("choice", {}), ("2", "1", "0")
    assert metric.references(1) == ("B",)
    assert metric.complete(sample(*metric.references("2"), options=options)).answers == ("A",)
    index = make("choice", {"answer_is": "index"})
    assert index.complete(sample(*index.references("2"), options=options)).answers == ("C",)


@pytest.mark.parametrize(
    ("answer", "options", "message"),
    [
        ("E", tuple(ANIMALS.values()), "'E' is neither one of the letters nor one of cat, dog"),
        ("cat", (), "options are not known"),
        ("1", ("cat", "dog"), "say answer_is=index"),
        ("cat", ("cat", "Cat"), "is neither"),
    ],
)
def test_a_reference_that_is_no_option(answer: str, options: tuple[str, ...], message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        make("choice", {}).complete(sample(answer, options=options) if options else sample(answer))
    with pytest.raises(FoveateError, match="counts no option"):
        make("choice", {}).references(-1)


def test_choice_is_right_or_wrong() -> None:
    metric = make("choice", {"rule": "first"})
    assert metric.score("Banana", sample("B", options=("cat", "dog"))) == 1
    assert metric.score("C", sample("C")) == 1  # where no options are known, any of A to H
    assert metric.score("C", sample("B", options=("cat", "dog"))) == 0


def test_mmbench_needs_all_rotations_right() -> None:
    metric = make("mmbench", {})
    rows = [
        sample(letter, name=str(index + k * 10**6), group=group, options=("cat", "dog"))
        for index, group, letters in ((3, "l", "AB"), (12, "m", "BA"))
        for k, letter in enumerate(letters)
    ]
    asked = metric.arrange(rows)
    assert [one.extra["question"] for one in asked] == ["3", "3", "12", "12"]
    assert [one.id for one in asked] == ["3", "1000003", "12", "1000012"]
    assert summary(metric, asked, ["A", "B", "B", "B"]) == {"accuracy": 50, "accuracy of rows": 75, "accuracy/l": 100, "accuracy/m": 0}


def test_mmbench_makes_rotations_where_there_are_none() -> None:
    one = sample("B", name="7", options=("cat", "dog", "horse"))
    made = rotations(one)
    assert [(row.id, row.extra["options"], row.answers[0]) for row in made] == [
        ("7#0", ("cat", "dog", "horse"), "B"),
        ("7#1", ("dog", "horse", "cat"), "A"),
        ("7#2", ("horse", "cat", "dog"), "C"),
    ]
    metric = make("mmbench", {})
    assert metric.arrange([one]) == made
    assert summary(metric, made, ["B", "A", "C"])["accuracy"] == 100
    assert summary(metric, made, ["B", "B", "B"]) == pytest.approx({"accuracy": 0, "accuracy of rows": 100 / 3})


def test_mmbench_names_what_is_missing() -> None:
    with pytest.raises(FoveateError, match="question 3 has 3 options but 1 rows"):
        make("mmbench", {}).arrange([sample("A", name="1000003", options=("cat", "dog", "horse"))])
    with pytest.raises(FoveateError, match="sample 3 has no options to rotate"):
        make("mmbench", {}).arrange([sample("A", name="3")])
    with pytest.raises(FoveateError, match="the id 'x' is no number"):
        make("mmbench", {}).arrange([sample("A", name="1000003"), sample("A", name="x")])


def test_mmstar_counts_questions_and_axes() -> None:
    samples = [sample("A", group="math")] * 3 + [sample("B", group="logic")]
    told = summary(make("mmstar", {}), samples, ["A", "a", "(A)", "A"])
    assert told == {"accuracy": 75, "mean of groups": 50, "accuracy/logic": 0, "accuracy/math": 100}


def test_mmstar_gain_and_leakage() -> None:
    """LLaVA-NeXT-34B as its paper prints it: 52.1 with images, 22.7 without, 20.3 for the language model alone."""
    assert multimodal_gain(52.1, 22.7) == pytest.approx(29.4)
    assert multimodal_leakage(22.7, 20.3) == pytest.approx(2.4)
    assert multimodal_leakage(20.3, 22.7) == 0


# ---- boxes -----------------------------------------------------------------------------------------------------------------------------


def test_iou_examples() -> None:
    assert iou((0, 0, 10, 10), (5, 0, 15, 10)) == pytest.approx(1 / 3)
    assert iou((0, 0, 10, 10), (0, 0, 10, 5)) == 0.5
    assert iou((0.1, 0.2, 0.5, 0.6), (0.2, 0.2, 0.6, 0.6)) == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("[0.1, 0.2, 0.5, 0.6]", (0.1, 0.2, 0.5, 0.6)),
        ("The 2 dogs: [1, 2, 3, 4] and [5, 6, 7, 8]", (1, 2, 3, 4)),
        ("{<12><30><55><80>}", (12, 30, 55, 80)),
        ("(1,2),(3,4)", (1, 2, 3, 4)),
        ("<box>(1,2),(3,4)</box>", (1, 2, 3, 4)),
        ("1 2 3 4 5", (1, 2, 3, 4)),
        ("[.5 .25 1. -0.5]", (0.5, 0.25, 1, -0.5)),
        ("[1, 2, 3]", None),
        ("left", None),
    ],
)
def test_four_numbers(text: str, numbers: tuple[float, ...] | None) -> None:
    assert four_numbers(text) == numbers


@pytest.mark.parametrize(
    ("form", "numbers"),
    [
        ("fractions", (0.1, 0.2, 0.5, 0.6)),
        ("thousandths", (100, 200, 500, 600)),
        ("hundredths", (10, 20, 50, 60)),
        ("pixels", (20, 20, 100, 60)),
        ("padded", (0.1, 0.35, 0.5, 0.55)),  # 50 px are put above and below the image of 200 x 100
        ("guess", (0.1, 0.2, 0.5, 0.6)),
        ("guess", (100, 200, 500, 600)),
    ],
)
def test_every_format_means_the_same_box(form: str, numbers: tuple[float, float, float, float]) -> None:
    assert to_pixels(numbers, form, (200, 100)) == pytest.approx((20, 20, 100, 60))


def test_pixels_of_a_large_image_are_guessed_and_those_of_a_small_one_misread() -> None:
    assert to_pixels((100, 100, 1200, 800), "guess", (2000, 1000)) == (100, 100, 1200, 800)
    assert to_pixels((20, 20, 100, 60), "guess", (200, 100)) != (20, 20, 100, 60)


def test_corners_are_put_in_order_and_cut_off_at_the_edges() -> None:
    assert to_pixels((150, -5, 20, 60), "pixels", (100, 100)) == (20, 0, 100, 60)


def test_iou_of_one_half_is_a_hit() -> None:
    metric = make("iou", {"format": "fractions"})
    truth = sample("[0, 0, 0.7, 0.6]", size=(333, 777))
    assert metric.score("[0, 0, 0.7, 0.3]", truth) == 1
    assert metric.score("[0, 0, 0.7, 0.29]", truth) == 0
    assert metric.score("no box", truth) == 0


def test_iou_of_a_prediction_and_a_reference_in_other_formats() -> None:
    metric = make("iou", {"format": "thousandths", "truth": "pixels", "corners": "xywh"})
    truth = metric.complete(sample(*metric.references([20, 20, 80, 40]), size=(200, 100)))
    told = summary(metric, [truth, truth, truth], ["[100, 200, 500, 600]", "[100, 200, 500, 300]", "?"])
    assert told == pytest.approx({"accuracy": 100 / 3, "mean_iou": 125 / 3, "unparsed": 100 / 3})


def test_iou_never_guesses_unasked() -> None:
    with pytest.raises(FoveateError, match="say in which numbers the model writes its boxes: format= one of fractions, padded"):
        make("iou", {})
    with pytest.raises(FoveateError, match=r"format=pixel .did you mean 'pixels'"):
        make("iou", {"format": "pixel"})
    metric = make("iou", {"format": "fractions"})
    with pytest.raises(FoveateError, match=r"'\[2, 2, 3, 3\]' is no box within the image, read as fractions"):
        metric.complete(sample("[2, 2, 3, 3]", size=(10, 10)))
    with pytest.raises(FoveateError, match="has no image"):
        metric.complete(sample("[0, 0, 1, 1]"))


# ---- scenes ----------------------------------------------------------------------------------------------------------------------------


def test_scenes_are_scored_by_family_and_each_family_counts_the_same() -> None:
    samples = [sample("yes", group="presence")] * 3 + [sample("<loc0><loc0><loc7><loc7>", group="locating")]
    told = summary(make("scenes", {}), samples, ["Yes.", "yes", "yes, it is", "<loc0><loc0><loc7><loc3>"])
    assert told == pytest.approx({"mean accuracy": 500 / 6, "accuracy/presence": 200 / 3, "accuracy/locating": 100})


def test_scenes_refuse_a_family_that_they_do_not_know() -> None:
    with pytest.raises(FoveateError, match="unknown family 'colour'"):
        make("scenes", {}).complete(sample("red", group="colour"))


# ---- all -------------------------------------------------------------------------------------------------------------------------------

OPTIONS: dict[str, dict[str, str]] = {"iou": {"format": "pixels"}}
TRUTHS: dict[str, list[tuple[str, ...]]] = {
    "vqa": [("two",) * 10, ("red",) * 9 + ("blue",)],
    "pope": [("yes",), ("no",)],
    "mme": [("yes",), ("no",)],
    "choice": [("A",), ("B",)],
    "mmbench": [("A",), ("B",)],
    "mmstar": [("A",), ("B",)],
    "relaxed": [("12.5%",), ("Blue",)],
    "iou": [("[1, 2, 30, 40]",), ("[0, 0, 50, 50]",)],
    "scenes": [("yes",), ("3",)],
}
ANYTHING = st.one_of(st.text(max_size=30), st.sampled_from(["yes", "No.", "(A)", "B", "[1, 2, 30, 40]", "two", "red", "12%", "3", "inf"]))


def asked(name: str) -> list[Sample]:
    """Four samples about two images, in two groups, with what the metric needs."""
    truths = TRUTHS.get(name, [("two words", "word"), ("3",)])
    groups = ("presence", "count") if name == "scenes" else ("one", "two")
    together = name in ("mme", "mmbench")  # what belongs together is of one group there
    made = [sample(*truths[i % 2], name=str(i), images=(f"{i // 2}.png",), group=groups[i // 2 if together else i % 2]) for i in range(4)]
    return [replace(one, extra={"options": ("cat", "dog"), "size": (50, 50), "question": one.images[0]}) for one in made]


@pytest.mark.parametrize("name", METRICS)
def test_a_perfect_answer_scores_1(name: str) -> None:
    metric = make(name, OPTIONS.get(name, {}))
    samples = [metric.complete(one) for one in asked(name)]
    predictions = [one.answers[0] for one in samples]
    assert [metric.score(prediction, one) for one, prediction in zip(samples, predictions, strict=True)] == [1] * 4
    assert next(iter(summary(metric, samples, predictions).values())) == 100


@pytest.mark.parametrize("name", METRICS)
@given(predictions=st.lists(ANYTHING, min_size=4, max_size=4), order=st.permutations(range(4)))
def test_scores_are_shares_and_a_summary_does_not_depend_on_the_order(name: str, predictions: list[str], order: list[int]) -> None:
    metric = make(name, OPTIONS.get(name, {}))
    samples = asked(name)
    scores = [metric.score(prediction, one) for one, prediction in zip(samples, predictions, strict=True)]
    assert all(0 <= score <= 1 for score in scores)
    told = metric.summary(samples, predictions, scores)
    assert 0 <= next(iter(told.values())) <= 100
    again = metric.summary([samples[i] for i in order], [predictions[i] for i in order], [scores[i] for i in order])
    assert told == again
    assert list(told) == list(again)


def test_a_summary_of_tenths_does_not_depend_on_their_order() -> None:
    """0.1 + 0.2 + 0.3 is not 0.3 + 0.2 + 0.1 in plain floats."""
    metric, samples, scores = make("vqa", {}), [sample(*["x"] * 10)] * 3, [0.1, 0.2, 0.3]
    assert metric.summary(samples, [""] * 3, scores) == metric.summary(samples, [""] * 3, scores[::-1])


def test_names_and_options_are_checked() -> None:
    with pytest.raises(FoveateError, match=r"unknown metric 'popes' .did you mean 'pope'"):
        make("popes", {})
    with pytest.raises(FoveateError, match=r"metric pope has no option 'pars' .did you mean 'parse'"):
        make("pope", {"pars": "llava"})
    with pytest.raises(FoveateError, match="metric gqa has no option 'parse'; it has none"):
        make("gqa", {"parse": "llava"})
    with pytest.raises(FoveateError, match=r"metric vqa: variant=oficial .did you mean 'official'"):
        make("vqa", {"variant": "oficial"})
    assert all(metric.name == name for name, metric in METRICS.items())


def test_references_of_many_kinds() -> None:
    metric = make("exact", {})
    assert metric.references("a") == ("a",)
    assert metric.references(3) == ("3",)
    assert metric.references(["a", 2]) == ("a", "2")
    assert metric.references([{"answer": "a", "answer_id": 1}, {"answer": "b"}]) == ("a", "b")
    with pytest.raises(FoveateError, match="must be texts or numbers"):
        metric.references({"text": "a"})
