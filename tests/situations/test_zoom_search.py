"""Searches of a picture: by a model whose confidences are made up, so that the way can be worked out by hand, and by models as they are."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

import foveate
from foveate.accounting import Ledger, predict
from foveate.errors import FoveateError
from foveate.evaluation.evaluate import evaluate
from foveate.inference import load_model
from foveate.inference.contrast import Contrast
from foveate.inference.strategies import STRATEGIES, VCD, Found, Pass, Strategy, Words, opened, parse
from foveate.inference.strategies.boxes import beside, grid, grown, joined, squared, union
from foveate.inference.strategies.dc2 import DC2, clusters, mean, things
from foveate.inference.strategies.lrs import LRS, placed
from foveate.inference.strategies.zoomeye import ZoomEye
from foveate.inspect.look import look_for, open_image
from tests.command import refused
from tests.conformance.family import families
from tests.conformance.family import picture as noise

ASK = Words(
    "test", "", "{cue}", "there: {cue}", "", "now: {question}", "describe", "{parts}: describe", "about: {question}", "{said} {question}"
)
PRICE = 100  # FLOPs of a pass of the made-up model, 10 for each token of an answer


class Oracle:
    """A model that knows the picture by its pixels: each part is told by its red and green, which `coordinates` makes the place of."""

    layers = 6

    def __init__(self, side: int, knows: Callable[[str, tuple[int, int, int, int]], Any], tokens: int = 1) -> None:
        self.side, self.knows, self.tokens = side, knows, tokens
        self.asked: list[tuple[str, tuple[tuple[int, int, int, int], ...]]] = []

    def write(self, views: Sequence[Image.Image], text: str) -> tuple[list[Image.Image], str]:
        return list(views), text

    def price(self, inputs: Any, new: int, layer: int | None = None) -> int:
        return PRICE * len(inputs[0]) + 10 * new

    def confidence(self, inputs: Any) -> tuple[float, Pass]:
        return self._told(inputs, 1)

    def say(self, inputs: Any, new: int) -> tuple[str, Pass]:
        said, seen = self._told(inputs, min(new, self.tokens))
        return str(said), seen

    def contrasted(self, inputs: Any, new: int, contrast: Contrast) -> tuple[str, list[Pass]]:
        said, first = self.say(inputs, new)
        return said, [replace(first, what="contrast", beside=True), first]

    def price_contrasted(self, inputs: Any, new: int, contrast: Contrast) -> int:
        return 2 * self.price(inputs, new)

    def attended(self, inputs: Any, layer: int) -> tuple[list[np.ndarray], Pass]:
        maps = [self.knows(f"layer {layer}", place(view)) for view in inputs[0]]
        return maps, self._pass("", len(maps), 1)

    def feature(self, inputs: Any) -> tuple[np.ndarray, Pass]:
        return self.knows("feature", place(inputs[0][0])), self._pass("", 1, 0)

    def _told(self, inputs: Any, new: int) -> tuple[Any, Pass]:
        views, text = inputs
        places = tuple(map(place, views))
        self.asked.append((text, places))
        said = self.knows(text, places[-1])
        return said, self._pass(said, len(views), new)

    def _pass(self, said: Any, views: int, new: int) -> Pass:
        flops = {"tower": PRICE * views, "lm": 10 * new}
        return Pass(
            "", said, 4 * views + 2, 4 * views, new, Ledger("answer", (4 * views,), (4 * views + 2 + new,), (8 * views,), (0,), (1,), flops)
        )


def coordinates(wide: int, high: int) -> Image.Image:
    """A picture of at most 254 x 254 pixels, each of which says where it is: column in red, row in green, both counted from 1."""
    rows, columns = np.mgrid[1 : high + 1, 1 : wide + 1]
    return Image.fromarray(np.stack([columns, rows, np.full_like(rows, 255)], -1).astype(np.uint8))


def place(view: Image.Image) -> tuple[int, int, int, int]:
    """The box of a view of `coordinates`, whatever grey is beside it."""
    pixels = np.asarray(view)
    own = pixels[..., 2] == 255
    columns, rows = pixels[..., 0][own], pixels[..., 1][own]
    return int(columns.min()) - 1, int(rows.min()) - 1, int(columns.max()), int(rows.max())


def run(strategy: Strategy, eyes: Any, picture: Image.Image, question: str = "what?", **how: Any) -> Found:
    return strategy.run(eyes, [picture], question, **how)


# ---- ZoomEye


@pytest.mark.parametrize(
    ("size", "nodes", "deepest"), [((1000, 500), 21, 2), ((300, 200), 1, 0), ((4000, 1), 21, 2), ((1, 1), 1, 0), ((3, 3), 1, 0)]
)
def test_zoomeyes_trees(size: tuple[int, int], nodes: int, deepest: int) -> None:
    tree, whole = ZoomEye(), (0, 0, *size)

    def count(box: tuple[int, int, int, int], depth: int) -> int:
        return 1 + sum(count(part, depth + 1) for part in tree.parts(box, depth, 336))

    assert (count(whole, 0), tree.deepest(whole, 336)) == (nodes, deepest)


def test_a_picture_hardly_less_than_twice_as_wide_is_quartered() -> None:
    assert ZoomEye().parts((0, 0, 1000, 501), 0, 336) == [(0, 0, 500, 250), (500, 0, 1000, 250), (0, 250, 500, 501), (500, 250, 1000, 501)]
    assert ZoomEye().parts((0, 0, 1000, 500), 0, 336) == [(250 * i, 0, 250 * i + 250, 500) for i in range(4)]


@pytest.mark.parametrize(("deepest", "weights"), [(2, [0.2, 0.4, 1.0]), (3, [0.2, 0.2889, 0.5556, 1.0])])
def test_zoomeyes_weights(deepest: int, weights: list[float]) -> None:
    assert [round(ZoomEye().weight(depth, deepest), 4) for depth in range(deepest + 1)] == weights


QUARTERS = {(0, 0): 0.1, (50, 0): 0.5, (0, 50): 0.5, (50, 50): 0.2}


def quarters(answerable: dict[tuple[int, int, int, int], float]) -> Callable[[str, Any], Any]:
    """Of a picture of 100 x 100: how sure of existence in quarters (their quarters the same), and of being able to answer."""

    def knows(text: str, box: tuple[int, int, int, int]) -> Any:
        if text.startswith("there"):
            return QUARTERS[box[0] // 50 * 50, box[1] // 50 * 50]
        return answerable.get(box, -0.5) if text.startswith("now") else "7"

    return knows


def test_zoomeye_goes_where_it_is_surest_and_of_equals_to_the_first() -> None:
    eyes = Oracle(40, quarters({(50, 0, 75, 25): 0.9}))  # the first quarter of the second quarter
    found = run(ZoomEye(words=ASK), eyes, coordinates(100, 100))
    asked = [box for text, (box,) in eyes.asked if text.startswith("now")]
    # After the second quarter its four parts are as sure as the third quarter, which stands before them in the queue.
    assert asked == [(0, 0, 100, 100), (50, 0, 100, 50), (0, 50, 50, 100), (50, 0, 75, 25)]
    assert (found.answer, found.boxes, found.ended) == ("7", ((50, 0, 75, 25),), "found")
    assert [seen.box for seen in found.seen][:5] == [(0, 0, 100, 100), *grid((0, 0, 100, 100), 2, 2)]
    assert len(found.seen) == 1 + 4 + 4 + 4
    # Answered by a view of at least 40 x 40 about it, moved into the picture.
    assert eyes.asked[-1] == ("what?", ((43, 0, 83, 40),))
    assert len(found.passes) == 12 + 4 + 1


def test_zoomeye_lowers_its_threshold_and_takes_the_best_or_gives_up() -> None:
    # D = 2: after six visits 0.6 falls to 0.5, after eight to 0.4, then to 0.2 and to 0.0; the best is 0.3.
    answers = {(0, 50, 50, 100): 0.3}
    found = run(ZoomEye(words=ASK), Oracle(40, quarters(answers)), coordinates(100, 100))
    visited = [one for one in found.passes if one.what == "answerable"]
    assert (len(visited), found.boxes, found.ended) == (10, ((0, 50, 50, 100),), "found")
    hopeless = run(ZoomEye(words=ASK, low=0.45), Oracle(40, quarters(answers)), coordinates(100, 100))
    assert (sum(one.what == "answerable" for one in hopeless.passes), hopeless.boxes, hopeless.ended) == (8, (), "given up")


def test_zoomeye_takes_what_is_best_of_a_tree_that_is_used_up() -> None:
    small = run(ZoomEye(words=ASK, depth=0), Oracle(40, quarters({(0, 0, 100, 100): 0.1})), coordinates(100, 100))
    assert (small.boxes, small.ended, len(small.passes)) == (((0, 0, 100, 100),), "found", 2)
    none = run(ZoomEye(words=ASK, depth=0), Oracle(40, quarters({})), coordinates(100, 100))
    assert (none.boxes, none.ended) == ((), "searched")


def test_zoomeye_asks_what_a_closer_look_would_show() -> None:
    """Existence counts 0.4 of a part of depth 1 of 2, the rest is what is hidden there."""
    words = Words("test", "", "{cue}", "there: {cue}", "hidden: {cue}", "now: {question}", "", "", "", "{said} {question}")
    surest: dict[str, Any] = {"there": (50, 50, 100, 100), "hidden": (0, 50, 50, 100)}

    def knows(text: str, box: Any) -> Any:
        kind = text.partition(":")[0]
        return "7" if text == "what?" else (0.5 if surest.get(kind) == box else 0.0) if kind != "now" else (0.9 if box[1] == 50 else -1)

    found = run(ZoomEye(words=words, depth=1), Oracle(40, knows), coordinates(100, 100))
    assert found.boxes == ((50, 50, 100, 100),)  # depth 1 of 1: existence alone
    deeper = run(ZoomEye(words=words, depth=2), Oracle(20, knows), coordinates(100, 100))
    assert deeper.boxes == ((0, 50, 50, 100),)


def cued(named: str) -> Words:
    return (
        Words("cued", "name: {question}", "where is {cue}", "there: {cue}", "", "now: {question}", "", "", "", "{said} {question}")
        if named
        else ASK
    )


def test_zoomeye_searches_for_every_cue_and_joins_the_places() -> None:
    homes = {"cup": (0, 0, 50, 50), "lamp": (50, 0, 100, 50)}

    def knows(text: str, box: Any) -> Any:
        if text.startswith("name"):
            return "The cup, it, lamp; cup"
        name = next((name for name in homes if name in text), "")
        return 0.9 if homes.get(name) == box else -0.5 if name else "left"

    eyes = Oracle(60, knows)
    found = run(ZoomEye(words=cued("x")), eyes, coordinates(100, 100))
    assert found.boxes == (homes["cup"], homes["lamp"])
    assert [text for text, _ in eyes.asked].count("now: where is cup") == 2
    assert eyes.asked[-1] == ("what?", ((0, 0, 100, 60),))  # both grown to a look of 60 x 60
    assert len(found.seen) == 5  # parts of one picture, however often they are asked about
    both = Oracle(60, knows)
    run(ZoomEye(words=cued("x"), view="both"), both, coordinates(100, 100))
    assert len(both.asked[-1][1]) == 2  # the whole picture, and one part, since the two touch


def test_zoomeye_collects_all_of_a_kind() -> None:
    sure = {(0, 0, 50, 50): 0.7, (0, 50, 50, 100): 0.5, (0, 50, 25, 75): 0.8, (50, 50, 100, 100): 0.65, (75, 75, 100, 100): 0.6}

    def knows(text: str, box: Any) -> Any:
        return "all dogs" if text.startswith("name") else sure.get(box, -0.5) if text.startswith("there") else "3"

    found = run(ZoomEye(words=cued("x")), Oracle(20, knows), coordinates(100, 100))
    # Of the last quarter a part has 0.6, which is enough, and the quarter itself is surer still.
    assert found.boxes == ((0, 0, 50, 50), (0, 50, 25, 75), (75, 75, 100, 100), (50, 50, 100, 100))
    assert len(found.seen) == 1 + 4 + 16


# ---- DC²


@pytest.mark.parametrize(("size", "nodes"), [((1000, 500), 5), ((3840, 2160), 85), ((7680, 4320), 341), ((1, 4000), 1), ((3, 3), 1)])
def test_dc2s_trees(size: tuple[int, int], nodes: int) -> None:
    def count(box: tuple[int, int, int, int], depth: int) -> int:
        return 1 + sum(count(part, depth + 1) for part in DC2().parts(box, depth, 336))

    assert count((0, 0, *size), 0) == nodes


def test_dc2_remembers_what_parts_have_told_and_looks_at_what_is_asked_about() -> None:
    told = {(0, 0, 50, 50): "a red cup, a dog", (50, 0, 100, 50): "dog.", (0, 50, 50, 100): "", (50, 50, 100, 100): "The lamp; dog"}

    def knows(text: str, box: Any) -> Any:
        if text == "describe":
            return told[box]
        if text.endswith(": describe"):
            assert text == "red cup, dog; dog; lamp, dog: describe"
            return "dog, red cup, unicorn"
        return f"a cup at {box[0]}" if text.startswith("about") else "blue"

    eyes = Oracle(60, knows)
    found = run(DC2(words=ASK, merge=0.0), eyes, coordinates(100, 100), "what is in the cup?")
    assert [seen.box for seen in found.seen] == [*grid((0, 0, 100, 100), 2, 2), (0, 0, 100, 100)]  # the parts before the whole
    assert found.boxes == ((0, 0, 50, 50),)
    assert eyes.asked[-1] == ("a cup at 0 what is in the cup?", ((0, 0, 100, 100),))
    where = run(DC2(words=ASK, merge=0.0), Oracle(60, knows), coordinates(100, 100), "how many dogs?")
    assert where.boxes == ((0, 0, 100, 100),)  # told by several parts, so of the whole; its own parts lie inside of that
    none = run(DC2(words=ASK, merge=0.0), Oracle(60, knows), coordinates(100, 100), "a unicorn?")
    assert (none.boxes, none.ended) == ((), "searched")  # told by no part


def test_dc2_merges_parts_that_look_alike() -> None:
    features = {(0, 0): [1.0, 0.0], (50, 0): [0.0, 1.0], (0, 50): [1.0, 0.1], (50, 50): [1.0, 0.0]}

    def knows(text: str, box: Any) -> Any:
        return np.array(features[box[0], box[1]]) if text == "feature" else "x"

    eyes = Oracle(60, knows)
    found = run(DC2(words=ASK), eyes, coordinates(100, 100))
    assert [seen.box for seen in found.seen] == [(0, 0, 50, 50), (50, 0, 100, 50), (0, 0, 100, 100)]
    assert [one.what for one in found.passes] == ["features"] * 4 + ["describe"] * 3 + ["answer"]
    assert clusters(np.array([[1, 0], [0, 1], [1, 1.0]]), 0.29) == [[0], [1], [2]]  # cosines of 0.707
    assert clusters(np.array([[1, 0], [0, 1], [1, 1.0]]), 0.3) == [[0, 2], [1]]  # then a mean distance of (1 + 0.293) / 2
    assert np.asarray(mean([Image.new("RGB", (2, 1), (0, 0, 0)), Image.new("RGB", (3, 1), (100, 50, 1))]))[0, 0].tolist() == [50, 25, 0]
    assert things("a red cup<loc3><loc4>, the dog;\n- Dog, , An axe.") == ["red cup", "dog", "axe"]


# ---- LRS


def test_lrs_descends_to_the_tiles_of_the_best_tokens() -> None:
    """240 x 180: three by three tiles of 80, then (at 1/1) 6 x 5 of 40, of which the fifth row is half empty."""
    pyramid = LRS().pyramid(240, 180, 40)
    assert [len(tiles) for tiles in pyramid] == [9 - 0, 30]
    assert pyramid[0][-1] == (160, 160, 240, 180)

    def knows(text: str, box: Any) -> Any:
        if text == "layer 4":
            scores = np.zeros((4, 4), np.float32)
            if box == (80, 0, 160, 80):
                scores[0, 3], scores[3, 0] = 0.9, 0.8  # at (150, 10) and (90, 70)
            return scores
        return "7"

    eyes = Oracle(40, knows)
    found = run(LRS(keep=2 / 112), eyes, coordinates(240, 180))  # of the tokens outside of the grey: 6 * 16 + 3 * 4 = 108, and 2 of them
    assert found.boxes == ((120, 0, 160, 40), (80, 40, 120, 80))
    assert [one.what for one in found.passes] == ["attention", "answer"]
    assert eyes.asked[-1][1] == ((0, 0, 240, 180), *found.boxes)
    assert len(found.seen) == 1 + 9 + 2


def test_a_token_of_a_tile_that_is_no_square_lies_where_it_shows() -> None:
    found = placed((160, 160, 240, 180), np.arange(16, dtype=np.float32).reshape(4, 4))
    assert found == [] or {y for _, _, y in found} <= {160.0, 170.0, 180.0}
    rows = placed((0, 0, 40, 20), np.arange(16, dtype=np.float32).reshape(4, 4))
    assert rows == [(4 + c, 5.0 + 10 * c, 5.0) for c in range(4)] + [(8 + c, 5.0 + 10 * c, 15.0) for c in range(4)]


def test_lrs_shows_the_best_tiles_first_where_there_are_not_enough() -> None:
    def knows(text: str, box: Any) -> Any:
        return np.full((2, 2), float(box == (160, 80, 240, 160)), np.float32) if text.startswith("layer") else "7"

    found = run(LRS(keep=1.0, nodes=11), Oracle(40, knows), coordinates(240, 180))
    assert (found.ended, len(found.seen), found.boxes) == ("nodes", 11, ((160, 80, 200, 120),))
    assert run(LRS(), Oracle(300, knows), coordinates(240, 180)).ended == "searched"  # one tile would be the whole picture again
    with pytest.raises(FoveateError, match="layer=5 is not possible; the attention of layers 0 to 4"):
        run(LRS(layer=5), Oracle(40, knows), coordinates(240, 180))


# ---- budgets and cost


def everything(text: str, box: Any) -> Any:
    """Sure of nothing, so that a search goes on to the end of its budget; no two parts look alike."""
    if text.startswith("layer"):
        return np.ones((2, 2), np.float32)
    return np.random.default_rng(box).normal(size=16) if text == "feature" else -0.9 if text[:5] in ("there", "now: ") else "cup, dog"


ANY = [ZoomEye(words=ASK), DC2(words=ASK), LRS(words=ASK)]


@pytest.mark.parametrize("strategy", ANY, ids=str)
@pytest.mark.parametrize("budget", [1, 2, 3, 7, 12])
def test_nodes_are_not_exceeded_and_used_up(strategy: Strategy, budget: int) -> None:
    free = run(strategy, Oracle(20, everything), coordinates(200, 150))
    found = run(replace(strategy, nodes=budget), Oracle(20, everything), coordinates(200, 150))
    assert len(free.seen) > budget == len(found.seen)
    assert found.ended == "nodes"
    assert [one.box for one in found.seen] == [one.box for one in free.seen][:budget]
    assert found.passes[-1].what == "answer"


@pytest.mark.parametrize("strategy", ANY, ids=str)
def test_flops_are_not_exceeded_and_an_answer_is_always_left(strategy: Strategy) -> None:
    least = PRICE + 10 * 5  # one answer of five tokens
    with pytest.raises(FoveateError, match="flops=149 is not possible: one answer about this picture takes up to 150"):
        run(replace(strategy, flops=least - 1), Oracle(20, everything), coordinates(200, 150), new_tokens=5)
    for flops in (least, least + 99, least + 110, least + 500, least + 1100, 10**9):
        found = run(replace(strategy, flops=flops), Oracle(20, everything, tokens=5), coordinates(200, 150), new_tokens=5)
        assert found.ledger is not None
        assert found.ledger.total_flops <= flops
        assert found.ledger.total_flops == sum(one.ledger.total_flops for one in found.passes if one.ledger)
        assert (found.ended == "flops") == (flops < 10**9)
        assert found.answer == "cup, dog"


def test_views_that_go_over_the_budget_are_left_out_of_the_answer() -> None:
    def knows(text: str, box: Any) -> Any:
        return "7" if text == "what?" else 0.9 if box == (0, 0, 50, 50) else -0.5

    whole = run(ZoomEye(words=ASK, view="both", flops=3000), Oracle(60, knows), coordinates(100, 100))
    assert (whole.boxes, whole.passes[-1].visual) == (((0, 0, 50, 50),), 8)
    spent = sum(one.ledger.total_flops for one in whole.passes[:-1] if one.ledger)
    tight = spent + 1 * PRICE + 10 * 32  # what an answer about the picture alone takes
    eyes = Oracle(60, knows)
    found = run(ZoomEye(words=ASK, view="both", flops=tight), eyes, coordinates(100, 100))
    assert (found.boxes, found.ended, eyes.asked[-1]) == ((), "found", ("what?", ((0, 0, 100, 100),)))


def test_a_contrasted_answer_is_charged_with_both_passes_at_one_time() -> None:
    least = 2 * (PRICE + 10 * 3)
    found = run(VCD(words=ASK, flops=least), Oracle(20, everything, tokens=3), coordinates(60, 60), new_tokens=3)
    assert [one.what for one in found.passes] == ["contrast", "answer"]
    assert found.ledger is not None
    assert (found.ledger.total_flops, found.ledger.kv_bytes, found.tokens) == (least, (8 + 8,), 2 * (6 + 3))
    twice = run(ZoomEye(words=ASK, depth=0), Oracle(20, everything, tokens=3), coordinates(60, 60), new_tokens=3)
    assert twice.ledger is not None
    assert (len(twice.passes), twice.ledger.kv_bytes) == (2, (8,))
    with pytest.raises(FoveateError, match=f"one answer about this picture takes up to {least}"):
        run(VCD(words=ASK, flops=least - 1), Oracle(20, everything), coordinates(60, 60), new_tokens=3)


class Clocked(Oracle):
    """Its clock goes on by a second with every look at it."""

    now = -1.0

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.began: list[float] = []

    def clock(self) -> float:
        self.now += 1
        return self.now

    def confidence(self, inputs: Any) -> tuple[float, Pass]:
        self.began.append(self.now)
        return super().confidence(inputs)


@pytest.mark.parametrize(("seconds", "passes"), [(0.5, 0), (1.5, 1), (3, 1), (4.5, 2), (10.5, 4)])
def test_no_pass_begins_after_the_seconds_are_over_but_the_answer(seconds: float, passes: int) -> None:
    """The session begins at 1; a pass looks at the clock to see whether it may begin, when it begins and when it ends."""
    eyes = Clocked(20, everything)
    found = run(ZoomEye(words=ASK, seconds=seconds), eyes, coordinates(200, 150), clock=eyes.clock)
    assert (found.ended, [one.what for one in found.passes[passes:]]) == ("seconds", ["answer"])
    assert eyes.began == [3.0 + 3 * number for number in range(passes)]


@pytest.mark.parametrize("size", [(1, 1), (3, 3), (1, 254), (254, 1), (2, 3), (97, 101), (128, 128)])
@pytest.mark.parametrize(
    "strategy", [*ANY, ZoomEye(words=ASK, view="both"), ZoomEye(words=ASK, side=1, depth=2), DC2(words=ASK, side=1, depth=2)], ids=str
)
def test_every_view_is_a_part_of_the_picture_whatever_its_shape(strategy: Strategy, size: tuple[int, int]) -> None:
    eyes = Oracle(33, everything)
    found = run(strategy, eyes, coordinates(*size))
    assert found.seen[0].box == (0, 0, *size) or strategy.name == "dc2"
    for seen in found.seen:
        left, top, right, bottom = seen.box
        assert 0 <= left < right <= size[0]
        assert 0 <= top < bottom <= size[1]
    assert len({seen.box for seen in found.seen}) == len(found.seen)
    assert found.answer == "cup, dog"


@pytest.mark.parametrize("strategy", ANY, ids=str)
def test_a_question_without_one_image_is_refused(strategy: Strategy) -> None:
    eyes = Oracle(20, everything)
    with pytest.raises(FoveateError, match=f"{strategy.name} searches one image: this question has none, so there is nothing to look at"):
        strategy.run(eyes, [], "what?")
    with pytest.raises(FoveateError, match="searches one image: this question is about 2"):
        strategy.run(eyes, [coordinates(9, 9)] * 2, "what?")
    with pytest.raises(FoveateError, match="the question is empty"):
        strategy.run(eyes, [coordinates(9, 9)], " ")
    assert eyes.asked == []


@pytest.mark.parametrize(
    ("spelled", "said"),
    [
        ("zomeye", "unknown strategy 'zomeye' \\(did you mean 'zoomeye'\\?\\)"),
        ("zoomeye:node=3", "zoomeye has no option 'node' \\(did you mean 'nodes'\\?\\)"),
        ("zoomeye:nodes=0", "nodes=0 is not possible; give a whole number of at least 1"),
        ("dc2:flops=0", "flops=0 is not possible; give a number above 0"),
        ("lrs:seconds=-1", "seconds=-1 is not possible; give a number above 0"),
        ("zoomeye:view=far", 'view=\'far\' is not possible; choose "local" or "both"'),
        ("zoomeye:high=2", "high=2 is not possible; give a number between -1 and 1"),
        ("zoomeye:steps=0.1/0", "steps='0.1/0' is not possible"),
        ("zoomeye:words=plian", "words='plian' is no set of prompts \\(did you mean 'plain'\\?\\)"),
        ("dc2:merge=3", "merge=3 is not possible"),
        ("lrs:keep=0", "keep=0 is not possible; give a share of the tokens"),
    ],
)
def test_what_cannot_be_is_said(spelled: str, said: str) -> None:
    with pytest.raises(FoveateError, match=said):
        parse(spelled)


def test_spellings_are_read_back() -> None:
    for spelled in (*STRATEGIES, "zoomeye:view=both,low=-0.2,nodes=20", "dc2:merge=0.0,flops=1e12", "lrs:levels=1,layer=4,side=64"):
        assert parse(str(parse(spelled))) == parse(spelled)


def test_boxes() -> None:
    assert grid((0, 0, 7, 3), 2, 2) == [(0, 0, 3, 1), (3, 0, 7, 1), (0, 1, 3, 3), (3, 1, 7, 3)]
    assert grid((0, 0, 3, 1), 2, 2) == []
    assert grown((90, 40, 100, 50), 40, 20, (0, 0, 100, 100)) == (60, 35, 100, 55)
    assert grown((0, 0, 10, 10), 400, 5, (0, 0, 100, 50)) == (0, 0, 100, 10)
    assert union([(1, 2, 3, 4), (0, 3, 2, 9)]) == (0, 2, 3, 9)
    boxes = [(0, 0, 10, 10), (60, 0, 70, 10), (200, 0, 210, 10)]
    assert joined(boxes, 50) == [(0, 0, 70, 10), (200, 0, 210, 10)]
    assert joined(boxes, 49) == boxes
    assert joined([*boxes, (120, 0, 150, 10)], 50) == [(0, 0, 210, 10)]
    assert squared(coordinates(3, 9)).size == (9, 9)
    assert beside([coordinates(3, 9), coordinates(4, 2)]).size == (7, 9)


# ---- on models


@pytest.fixture(scope="module")
def vlm() -> tuple[Any, Any]:
    return load_model("asset:vlm", "cpu")


def picture() -> Image.Image:
    found = Image.new("RGB", (192, 128), (200, 200, 200))
    found.paste(open_image("scene:13"), (64, 0))
    return found


SPELLED = ["zoomeye:words=world,nodes=4", "dc2:words=world,depth=1", "lrs:keep=0.02,levels=1,side=32"]


@pytest.mark.parametrize("spelled", SPELLED)
@pytest.mark.parametrize("reducer", [None, "fastv:keep=0.25"])
def test_the_ledger_of_a_search_is_the_sum_of_its_passes(vlm: tuple[Any, Any], spelled: str, reducer: str | None) -> None:
    model, processor = vlm
    with opened(model, processor, reducer) as eyes:
        found = parse(spelled).run(eyes, [picture()], "what digit is handwritten?", new_tokens=4)
        bound = eyes.price(eyes.write([picture()], "what digit is handwritten?"), 4)
    ledgers = [one.ledger for one in found.passes if one.ledger is not None]
    assert len(ledgers) == len(found.passes) > 1
    assert found.ledger is not None
    for name in ("visual_tokens", "total_tokens", "layer_flops"):
        assert getattr(found.ledger, name) == tuple(map(sum, zip(*(getattr(one, name) for one in ledgers), strict=True)))
    assert found.ledger.flops == {part: sum(one.flops[part] for one in ledgers) for part in ledgers[0].flops}
    assert sum(found.ledger.kv_bytes) == max(sum(one.kv_bytes) for one in ledgers)
    asked = [one for one in found.passes if one.what != "features"]
    assert found.ledger.total_tokens[0] == sum(one.prompt + one.new - 1 for one in asked)  # the last token that is made is not read
    last = found.passes[-1].ledger
    assert last is not None
    if len(found.boxes) == 0:
        assert last.total_flops <= bound
    if reducer:
        assert last.visual_tokens[-1] * 4 == last.visual_tokens[0]


def test_one_pass_costs_what_is_predicted(vlm: tuple[Any, Any]) -> None:
    model, processor = vlm
    with opened(model, processor) as eyes:
        inputs = eyes.write([picture()], "what digit is handwritten?")
        sure, seen = eyes.confidence(inputs)
        assert -1 <= sure <= 1
        assert seen.ledger is not None
        assert seen.ledger.total_flops == eyes.price(inputs, 1) == predict(model.config, inputs=inputs).total_flops
        _, seen = eyes.say(inputs, 8)
        assert seen.ledger is not None
        assert seen.ledger.total_flops == eyes.price(inputs, seen.new) < eyes.price(inputs, 8)


@pytest.mark.parametrize("reducer", ["fastv:keep=0.25", "tome:keep=0.5,site=tower,blocks=1"])
def test_what_reducers_do_not_act_on_costs_what_is_predicted_too(vlm: tuple[Any, Any], reducer: str) -> None:
    """Attention is heard, and views are encoded to be compared, without them."""
    model, processor = vlm
    with opened(model, processor, reducer) as eyes:
        inputs = eyes.write([picture()] * 2, "what digit is handwritten?")
        maps, seen = eyes.attended(inputs, 2)
        assert [one.shape for one in maps] == [(8, 8)] * 2
        assert seen.ledger is not None
        assert seen.ledger.total_flops == eyes.price(inputs, 1, 2) > eyes.price(inputs, 1)
        assert seen.ledger.flops["scores"] > 0
        _, seen = eyes.feature(inputs)
        assert seen.ledger is not None
        assert seen.ledger.total_flops == eyes.price(inputs, 0)


def hooks(model: Any) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_what_is_attached_already_acts_and_stays(vlm: tuple[Any, Any]) -> None:
    model, processor = vlm
    before = hooks(model)
    with foveate.attach(model, "fastv:keep=0.5", record="all") as run_:
        with opened(model, processor) as eyes:
            found = parse(SPELLED[0]).run(eyes, [picture()], "what digit is handwritten?", new_tokens=2)
        assert found.ledger is not None
        assert found.ledger.visual_tokens[-1] * 2 == found.ledger.visual_tokens[0]
        assert len(run_.passes) == len(found.passes)
        with pytest.raises(FoveateError, match="already has 'fastv' attached"), opened(model, processor, "random"):
            pass
    with foveate.attach(model, "fastv", record="none"), pytest.raises(FoveateError, match="attach with record="), opened(model, processor):
        pass
    assert hooks(model) == before


@pytest.mark.parametrize(("spelled", "times"), [("zoomeye:words=world", 3.5), ("lrs:side=32", 6), ("dc2:words=world", 4)])
def test_a_budget_of_flops_holds_on_a_model(vlm: tuple[Any, Any], spelled: str, times: float) -> None:
    model, processor = vlm
    with opened(model, processor, "fastv:keep=0.25") as eyes:
        least = eyes.price(eyes.write([picture()], "what digit is handwritten?"), 4)
        flops = round(times * least)
        found = parse(f"{spelled},flops={flops}").run(eyes, [picture()], "what digit is handwritten?", new_tokens=4)
    assert found.ended == "flops"
    assert found.ledger is not None
    assert found.ledger.total_flops <= flops


def test_eval_and_look_and_the_command(vlm: tuple[Any, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, processor = vlm
    images = tmp_path / "images" / "test"
    images.mkdir(parents=True)
    picture().save(images / "0.png")
    row = {"id": "0", "image": "test/0.png", "question": "what digit is handwritten?", "answer": "6", "family": "reading"}
    (tmp_path / "test.json").write_text(json.dumps([row]))
    result = evaluate(model, tmp_path, processor=processor, strategy="zoomeye:words=world,nodes=2", progress=False)
    assert (result.strategy, len(result.rows)) == ("zoomeye:words=world,nodes=2", 1)
    assert result.visual_tokens == 64 * 3  # asked of the whole and of a part, and answered
    assert result.layer_tokens == [192.0] * 6
    figure = look_for(
        model, [picture()], "what digit is handwritten?", ["zoomeye:words=world,nodes=3"], ["none", "fastv"], processor=processor
    )
    written = " ".join(text.get_text().replace("\n", " ") for text in figure.texts)
    assert "zoomeye:words=world, nodes=3 + fastv" in written
    assert "at the end of its nodes" in written
    assert "asset:vlm" not in refused(["look", "scene:1", "--ask", "what?", "--strategy", "zoomeye", "--keep", "0.5"], capsys)
    assert "unknown strategy 'zoom'" in refused(["look", "scene:1", "--ask", "what?", "--strategy", "zoom"], capsys)


TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}MARK{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)


@pytest.mark.parametrize("name", ["llava_next", "paddleocr_vl", "aya_vision"])
def test_families_of_the_library_are_searched(name: str, tmp_path: Path) -> None:
    """Any resolution, native resolution, and tiles as pictures of their own."""
    family = families()[name]
    model, processor = family.load(tmp_path)
    processor.chat_template = TEMPLATE.replace("MARK", family.prompt(1, ""))
    for spelled in ("zoomeye:nodes=3,view=both,side=20", "dc2:side=20,depth=1", "lrs:side=20,levels=1,keep=0.05"):
        with opened(model, processor, "random:keep=0.5") as eyes:
            if spelled.startswith("lrs") and name == "aya_vision":
                with pytest.raises(FoveateError, match="pictures of its own"):
                    parse(spelled).run(eyes, [noise((70, 41), 3)], "what is this", new_tokens=2)
                continue
            found = parse(spelled).run(eyes, [noise((70, 41), 3)], "what is this", new_tokens=2)
        assert found.ledger is not None
        assert found.ledger.total_flops > 0
        assert len(found.passes) > 1
        assert all(one.visual > 0 for one in found.passes if one.what != "features")


def test_yes_and_no_that_begin_alike_are_refused() -> None:
    from foveate.inference.strategies.eyes import _answers

    def tokenizer(first: Callable[[str], int]) -> Any:
        return SimpleNamespace(encode=lambda text, add_special_tokens: [first(text), 9], name_or_path="made-up")

    assert _answers(tokenizer(lambda text: 0 if text.startswith(" ") else ord(text[0]))) == ([ord("Y"), ord("y")], [ord("N"), ord("n")])
    with pytest.raises(FoveateError, match="begins yes and no with the same token"):
        _answers(tokenizer(lambda text: 0))
