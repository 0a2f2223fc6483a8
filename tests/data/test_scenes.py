"""The embedded world's scenes, questions and files. Answers are checked by an oracle of its own, from the truth on disk alone."""

import hashlib
import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from foveate.errors import FoveateError
from foveate.world.pictures import IGNORE, KINDS, RASTER, SIZES, digit_pool, labels, render, scene
from foveate.world.questions import FAMILIES, caption, conversation, parse_box
from foveate.world.scenes import world_scene, write_world

COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("world") / "scenes"
    write_world(out, 20, 300, seed=7, size=32, progress=False, processes=1)
    return out


def read(path: Path) -> Any:
    return json.loads(path.read_text())


# --- the oracle -----------------------------------------------------------------------------------------------------------------------


def matches(thing: dict[str, Any], phrase: str) -> bool:
    """Whether a phrase such as "small red object", "circle" or "red one" fits a thing of scenes.json."""
    words = phrase.split()
    if words[0] in ("number", "word", "digit"):
        return bool(thing["kind"] == words[0])
    return thing["kind"] == "shape" and all(
        word in ("object", "objects", "one") or word in (thing["size"], thing["colour"], thing["name"]) for word in words
    )


def only(things: list[dict[str, Any]], phrase: str) -> dict[str, Any]:
    found = [thing for thing in things if matches(thing, phrase)]
    assert len(found) == 1, phrase
    return found[0]


def iou(a: list[float] | tuple[float, ...], b: list[float] | tuple[float, ...]) -> float:
    meet = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    return meet / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - meet)


def oracle_agrees(question: str, answer: str, things: list[dict[str, Any]]) -> bool:
    if found := re.fullmatch(r"is there a (\w+ \w+)\?", question):
        return answer == ("yes" if any(matches(thing, found[1]) for thing in things) else "no")
    if found := re.fullmatch(r"how many (.+) are there\?", question):
        singular = {"crosses": "cross", **{f"{shape}s": shape for shape in SHAPES}}
        phrase = " ".join(singular.get(word, word) for word in found[1].split())
        return answer == str(sum(matches(thing, phrase) for thing in things))
    if found := re.fullmatch(r"what (color|shape|size) is the (.+)\?", question):
        return bool(answer == only(things, found[2])[{"color": "colour", "shape": "name", "size": "size"}[found[1]]])
    if found := re.fullmatch(r"what (number|word|digit) is (printed|handwritten)\?", question):
        assert (found[1] == "digit") == (found[2] == "handwritten")
        return bool(answer == only(things, found[1])["name"])
    if found := re.fullmatch(r"where is the (.+)\?", question):
        box = parse_box(answer)
        return box is not None and iou(box, only(things, found[1])["box"]) >= 0.5
    found = re.fullmatch(r"is the (.+) (left of|right of|above|below) the (.+)\?", question)
    assert found is not None, question
    axis, sign = {"left of": (1, -1), "right of": (1, 1), "above": (0, -1), "below": (0, 1)}[found[2]]
    one, other = (only(things, found[i])["box"] for i in (1, 3))
    gap = sign * ((one[axis] + one[axis + 2]) - (other[axis] + other[axis + 2])) / 2
    assert abs(gap) >= 0.15 - 1e-9  # never a close call
    return answer == ("yes" if gap > 0 else "no")


def test_every_answer_follows_from_the_truth(world: Path) -> None:
    truth = {row["image"]: row["things"] for row in read(world / "scenes.json")}
    rows = read(world / "test.json")
    wrong = [row for row in rows if not oracle_agrees(row["question"], row["answer"], truth[row["image"]])]
    assert not wrong
    families = Counter(row["family"] for row in rows)
    assert set(families) == set(FAMILIES)
    assert min(families.values()) > 200


def test_captions_say_everything_in_raster_order(world: Path) -> None:
    for row in read(world / "scenes.json"):
        cells = []
        for item in row["caption"].split(", "):
            what, place_row, place_col = re.fullmatch(r"(.+)<loc(\d+)><loc(\d+)>", item).groups()  # type: ignore[union-attr]
            cells.append((int(place_row), int(place_col)))
            phrase = re.sub(r"^(a handwritten|the number|the word|a) ?", "", what)
            centred = [
                thing
                for thing in row["things"]
                if (int(8 * (thing["box"][0] + thing["box"][2])), int(8 * (thing["box"][1] + thing["box"][3]))) == cells[-1]
            ]
            assert any(phrase == (t["name"] if t["kind"] != "shape" else f"{t['size']} {t['colour']} {t['name']}") for t in centred)
        assert cells == sorted(cells)
        assert len(cells) == len(row["things"])


# --- scenes ---------------------------------------------------------------------------------------------------------------------------


def test_same_seed_same_scene() -> None:
    assert scene(5) == scene(5)
    assert np.array_equal(render(scene(5)), render(scene(5)))
    assert conversation(scene(5)) == conversation(scene(5))
    assert scene(5).things != scene(6).things
    assert scene(5).things != scene(5, "test").things


def test_things_do_not_touch_and_stay_inside() -> None:
    for i in range(300):
        boxes = [thing.box for thing in scene(i).things]
        for n, a in enumerate(boxes):
            assert 0 <= a[0] < a[2] <= 1
            assert 0 <= a[1] < a[3] <= 1
            assert all(a[2] < b[0] or b[2] < a[0] or a[3] < b[1] or b[3] < a[1] for b in boxes[n + 1 :])


def test_one_to_five_objects_all_common() -> None:
    counts = Counter(len(scene(i).shapes) for i in range(1000))
    assert set(counts) == {1, 2, 3, 4, 5}
    assert min(counts.values()) > 50


def test_handwritten_digits_of_the_splits_are_apart() -> None:
    train, test = (set().union(*map(set, digit_pool(split).values())) for split in ("train", "test"))
    assert not train & test
    assert train | test == set(range(1797))
    for split, pool in (("train", train), ("test", test)):
        used = {thing.sample for i in range(400) for thing in scene(i, split).things if thing.kind == "digit"}  # type: ignore[arg-type]
        assert len(used) > 50
        assert used <= pool


@pytest.mark.parametrize("seed", range(8))
def test_things_are_drawn_in_their_boxes_and_nowhere_else(seed: int) -> None:
    full = scene(seed)
    changed = (render(full) != render(replace(full, things=()))).any(-1)
    inside = np.zeros_like(changed)
    for thing in full.things:
        top, left, bottom, right = (round(edge * RASTER) for edge in thing.box)
        inside[top:bottom, left:right] = True
        drawn = changed[top:bottom, left:right]
        assert drawn.any(0).mean() > 0.8  # the box is tight: nearly every column and row of it has ink
        assert drawn.any(1).mean() > 0.8
    assert not (changed & ~inside).any()


@pytest.mark.parametrize("grid", [8, 16])
def test_patch_labels(grid: int) -> None:
    squares = 0
    for seed in range(60):
        item = scene(seed)
        truth = labels(item, grid)
        assert truth.centre.sum() <= len(item.things)
        for patch in range(grid * grid):
            top, left = (index / grid for index in divmod(patch, grid))
            bottom, right = top + 1 / grid, left + 1 / grid
            touching = [t for t in item.things if t.box[0] < bottom and top < t.box[2] and t.box[1] < right and left < t.box[3]]
            if not touching:
                assert truth.kind[patch] == 0
                assert truth.colour[patch] == truth.size[patch] == truth.glyph[patch] == IGNORE
                continue
            thing = touching[0]
            within = thing.box[0] <= top and bottom <= thing.box[2] and thing.box[1] <= left and right <= thing.box[3]
            if thing.name == "square" and within:
                squares += 1
                assert KINDS[truth.kind[patch]] == "square"
                assert COLOURS[truth.colour[patch]] == thing.colour
                assert SIZES[truth.size[patch]] == thing.size
                middle = np.array([top + bottom, left + right] * 2) / 2
                assert truth.box[patch] + middle == pytest.approx(np.array(thing.box), abs=1e-6)
    assert squares > 20


# --- questions ------------------------------------------------------------------------------------------------------------------------


def test_presence_is_balanced_and_half_of_the_negatives_are_near() -> None:
    yes = no = near = 0
    for i in range(1500):
        item = scene(i)
        there = {(thing.colour, thing.name) for thing in item.shapes}
        for one in conversation(item):
            if one.family == "presence":
                colour, shape = one.question.removesuffix("?").split()[3:]
                yes += one.answer == "yes"
                no += one.answer == "no"
                near += one.answer == "no" and any((colour == c) != (shape == s) for c, s in there)
    total = yes + no
    assert abs(yes - no) < 4 * total**0.5  # four standard deviations of a fair coin
    # Half are made near, and of the random half many are near by chance.
    assert 0.5 <= near / no <= 0.9


@pytest.mark.parametrize("family", ["relation", "count", "attribute"])
def test_no_answer_wins_by_guessing(family: str) -> None:
    answers = Counter(one.answer for i in range(600) for one in conversation(scene(i)) if one.family == family)
    assert max(answers.values()) / answers.total() < {"relation": 0.56, "count": 0.35, "attribute": 0.25}[family]


def test_questions_of_a_conversation_do_not_answer_each_other() -> None:
    sizes: Counter[int] = Counter()
    for i in range(300):
        asked = conversation(scene(i))
        sizes[len(asked)] += 1
        assert len({one.question for one in asked}) == len(asked)
        ties = [tie for one in asked for tie in one.ties]
        assert len(ties) == len(set(ties))
    assert sizes[10] > 200
    assert max(sizes) == 10


@pytest.mark.parametrize(
    "text",
    ["", "yes", "<loc1><loc2><loc3>", "<loc4><loc2><loc3><loc9>", "<loc1><loc1><loc16><loc2>", "<loc1><loc1><loc2><loc2> x"],
)
def test_what_is_no_box(text: str) -> None:
    assert parse_box(text) is None


def test_box_cells_are_inclusive() -> None:
    assert parse_box("<loc0><loc4><loc7><loc15>") == (0.0, 0.25, 0.5, 1.0)


def test_caption_without_places() -> None:
    assert "<loc" not in caption(scene(1), places=False)


# --- files ----------------------------------------------------------------------------------------------------------------------------


def digests(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def test_layout(world: Path) -> None:
    assert len(list((world / "images/train").iterdir())) == 20
    assert len(list((world / "images/test").iterdir())) == 300
    for name, turns in (("pretrain", {1}), ("finetune", set(range(3, 11)))):
        rows = read(world / f"{name}.json")
        assert len(rows) == 20
        for row in rows:
            assert set(row) == {"id", "image", "conversations"}
            with Image.open(world / "images" / row["image"]) as picture:
                assert picture.size == (32, 32)
            said = row["conversations"]
            assert len(said) // 2 in turns
            assert [part["from"] for part in said] == ["human", "gpt"] * (len(said) // 2)
            assert [part["value"].count("<image>") for part in said] == [1] + [0] * (len(said) - 1)
            assert said[0]["value"].startswith("<image>\n")
    row = read(world / "test.json")[0]
    assert set(row) == {"id", "image", "question", "answer", "family"}
    assert np.array_equal(np.asarray(Image.open(world / "images/test/000003.png")), render(world_scene(7, "test", 3), 32))


def test_the_number_of_processes_does_not_matter(tmp_path: Path) -> None:
    for name, processes in (("one", 1), ("two", 2)):
        write_world(tmp_path / name, 100, 20, seed=1, size=32, progress=False, processes=processes)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


def test_running_again_keeps_a_complete_world_and_redoes_an_interrupted_one(tmp_path: Path) -> None:
    out = tmp_path / "w"
    write_world(out, 3, 2, seed=1, size=32, progress=False)
    first = digests(out)
    before = (out / "test.json").stat().st_mtime_ns
    write_world(out, 3, 2, seed=1, size=32, progress=False)
    assert (out / "test.json").stat().st_mtime_ns == before
    mark = read(out / "world.json")
    (out / "world.json").write_text(json.dumps(mark | {"complete": False}))
    (out / "test.json").unlink()
    write_world(out, 3, 2, seed=1, size=32, progress=False)
    assert digests(out) == first


def test_refusals(tmp_path: Path) -> None:
    out = tmp_path / "w"
    write_world(out, 2, 1, seed=1, size=32, progress=False)
    with pytest.raises(FoveateError, match="another world"):
        write_world(out, 2, 1, seed=2, size=32, progress=False)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    with pytest.raises(FoveateError, match="not empty"):
        write_world(foreign, 2, 1, seed=1)
    with pytest.raises(FoveateError, match="is a file"):
        write_world(foreign / "thesis.txt", 2, 1, seed=1)
    for numbers, match in (((-1, 1, 128), "train=-1"), ((1, -2, 128), "test=-2"), ((0, 0, 128), "at least one"), ((1, 1, 8), "size=8")):
        with pytest.raises(FoveateError, match=match):
            write_world(tmp_path / "new", numbers[0], numbers[1], seed=1, size=numbers[2])
    assert not (tmp_path / "new").exists()
