"""Real data from a little stock: answers by an oracle of their own, splits, files, balance, and what is refused."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from foveate.data.conversations import Conversations, check_row
from foveate.errors import FoveateError
from foveate.evaluation.tasks import load_task
from foveate.real import write
from foveate.real.closeups import closeup
from foveate.real.questions import FAMILIES, METRICS
from foveate.real.scenes import letters, make_scene, plate_size, render
from foveate.real.stock import Stock, held_names
from foveate.real.things import akin, held_pair, names
from foveate.real.write import splits, told, write_real
from tests.real.little_stock import little_stock
from tests.real.oracle import answers

TRAIN, TEST = 60, 20
SPLITS = ("train", "compositions", "style", "fonts", "names", "photographs")


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Stock:
    return little_stock(tmp_path_factory.mktemp("stock"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, stock: Stock) -> Path:
    out = tmp_path_factory.mktemp("real") / "data"
    write_real(out, stock, TRAIN, TEST, seed=3, progress=False, processes=1)
    return out


def records(data: Path, split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (data / "records" / f"{split}.jsonl").read_text().splitlines()]


def family(path: Path) -> str:
    return path.stem.partition("-")[2]


def questions(data: Path, split: str) -> list[dict[str, Any]]:
    """Rows of all families of a test split, or of the training conversations in the same form."""
    if split != "train":
        files = sorted((data / "test").glob(f"{split}-*.json"))
        return [row | {"family": family(path)} for path in files for row in json.loads(path.read_text())]
    found = []
    for row in json.loads((data / "train.json").read_text()):
        turns = [turn["value"].removeprefix("<image>\n") for turn in row["conversations"]]
        found += [{"image": row["image"], "question": q, "answers": [a]} for q, a in zip(turns[::2], turns[1::2], strict=True)]
    return found


# ---- answers


@pytest.mark.parametrize("split", SPLITS)
def test_every_answer_follows_from_the_record(data: Path, split: str) -> None:
    drawn = {record["image"]: record for record in records(data, split)}
    rows = questions(data, split)
    assert len(rows) > 2 * TEST
    for row in rows:
        wanted = answers(row["question"], drawn[row["image"]])
        assert row["answers"] == (wanted[:1] if split == "train" else wanted), row


def test_answers_on_pages_are_printed_there(data: Path) -> None:
    for split in SPLITS:
        printed = {record["image"]: [text["text"] for text in record["texts"]] for record in records(data, split) if "texts" in record}
        numbered = {record["image"] for record in records(data, split) if record.get("numbered", True)}
        for row in questions(data, split):
            if row["image"] in printed and not (row["question"].startswith("What is the value") and row["image"] not in numbered):
                assert row["answers"][0] in printed[row["image"]]


def test_no_question_names_what_another_one_asks_for(data: Path) -> None:
    """Of a conversation: no answer is given away."""
    kinds = {record["image"]: record["kind"] for record in records(data, "train")}
    for image, group in itertools.groupby(questions(data, "train"), key=lambda row: row["image"]):
        rows = list(group)
        named = [row["answers"][0] for row in rows if row["answers"][0] in names()] if kinds[image] == "scene" else []
        assert len({row["question"] for row in rows}) == len(rows)
        for name in named:
            assert not any(f" {name}?" in row["question"] or f" {name} say?" in row["question"] for row in rows)


def test_what_is_asked_for_in_vain_is_like_something_there(data: Path) -> None:
    for split in ("train", "compositions", "names"):
        there = {record["image"]: {thing["name"] for thing in record["things"]} for record in records(data, split) if "things" in record}
        vain = [row for row in questions(data, split) if row["answers"] == ["no"]]
        assert len(vain) > 3
        for row in vain:
            name = next(known for known in names() if row["question"] in (f"Is there {names()[known].some}?", f"Are there {known}?"))
            assert {names()[name].group} & {names()[other].group for other in there[row["image"]]}
            assert not any(akin(name, other) for other in there[row["image"]])


# ---- splits


def test_splits_are_disjoint(data: Path) -> None:
    scenes = {split: [record for record in records(data, split) if record["kind"] == "scene"] for split in SPLITS}
    shown = {split: [thing for record in scenes[split] for thing in record["things"]] for split in SPLITS}
    known = {thing["name"] for thing in shown["train"]}
    assert {thing["style"] for thing in shown["train"]} == {"fluent", "twemoji", "photograph"}
    assert {thing["style"] for thing in shown["style"]} == {"noto"}
    assert {thing["name"] for thing in shown["names"]} <= held_names()
    assert not held_names() & known
    assert not held_names() & {thing["name"] for split in ("compositions", "style", "photographs") for thing in shown[split]}
    photographed = {thing["name"] for thing in shown["train"] if thing["style"] == "photograph"}
    assert {thing["style"] for thing in shown["photographs"]} == {"photograph"}
    assert not photographed & {thing["name"] for thing in shown["photographs"]}
    for split, wanted in (("train", False), ("compositions", True), ("style", True)):
        for record in scenes[split]:
            together = itertools.combinations(sorted({thing["name"] for thing in record["things"]}), 2)
            assert any(held_pair(one, other) for one, other in together) == wanted


def test_fonts_and_words_are_disjoint(data: Path, stock: Stock) -> None:
    def fonts(split: str) -> set[str]:
        return {text["font"] for record in records(data, split) for text in [*record.get("texts", ()), *record.get("labels", ())]}

    assert fonts("train") == fonts("compositions") == {"DejaVuSans", "DejaVuSerif"}
    assert fonts("fonts") == {"Aileron"}
    learnt, new = stock.words.part(held=False), stock.words.part(held=True)
    for pool in ("first", "last", "cities", "streets", "common"):
        assert getattr(learnt, pool)
        assert getattr(new, pool)
        assert sorted(getattr(learnt, pool) + getattr(new, pool)) == sorted(getattr(stock.words, pool))
    said = " ".join(turn["value"] for row in json.loads((data / "captions.json").read_text()) for turn in row["conversations"])
    assert not any(word in said.split() for word in (*new.first, *new.last, *new.common))


def test_asked_names_of_training_and_of_new_names_are_disjoint(data: Path) -> None:
    asked = " ".join(row["question"] + " " + row["answers"][0] for row in questions(data, "train"))
    assert not any(f" {name}" in asked for name in held_names() & {name for name in names() if names()[name].group in ("bird", "fruit")})


def test_a_stock_without_a_style_has_no_split_of_it(tmp_path: Path) -> None:
    assert [split.name for split in splits(little_stock(tmp_path, ("twemoji",)))] == ["train", "compositions", "fonts", "names"]


# ---- pictures


def test_every_image_opens_and_masks_are_boxes(data: Path) -> None:
    for split in SPLITS:
        for record in records(data, split):
            with Image.open(data / "images" / record["image"]) as image:
                assert (image.size, image.mode) == ((384, 384), "RGB")
                image.load()
            if record["kind"] != "scene":
                continue
            with Image.open((data / "masks" / record["image"]).with_suffix(".png")) as file:
                mask = np.asarray(file)
            assert mask.max() == len(record["things"])
            for number, thing in enumerate(record["things"], start=1):
                rows, columns = np.nonzero(mask == number)
                assert thing["box"] == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
                assert 30 <= max(columns.max() - columns.min(), rows.max() - rows.min()) <= 88


def test_nothing_touches_and_nothing_sticks_out(data: Path) -> None:
    for split in SPLITS:
        for record in records(data, split):
            drawn = [item["box"] for kind in ("things", "labels", "texts") for item in record.get(kind, ()) if record["kind"] != "chart"]
            assert all(0 <= left < right <= 384 and 0 <= top < bottom <= 384 for left, top, right, bottom in drawn)
            for a, b in itertools.combinations(drawn, 2):
                assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1], record["id"]


def test_boxes_of_text_hold_its_ink(data: Path) -> None:
    """Somewhere in each box there is ink, and none beside the texts on an empty line."""
    for record in records(data, "compositions"):
        if record["kind"] in ("receipt", "form", "table"):
            pixels = np.asarray(Image.open(data / "images" / record["image"]).convert("L")).astype(int)
            for text in record["texts"]:
                left, top, right, bottom = text["box"]
                inside = pixels[top:bottom, left:right]
                assert inside.max() - inside.min() > 80
                assert abs(pixels[top:bottom, left - 2] - np.median(pixels[top:bottom, left - 2])).max() < 40


# ---- files


def test_rows_are_read_by_training_and_by_bench(data: Path) -> None:
    for name in ("train", "captions"):
        rows = Conversations.open(data / f"{name}.json", data / "images")
        assert len(rows) == TRAIN
        assert all(check_row(rows.source.row(index), 1) == "" for index in range(TRAIN))
    near = Conversations.open(data / "closeups.json", data / "images")
    assert all(check_row(near.source.row(index), 1) == "" for index in range(len(near)))
    specs = [f"{path}:metric={METRICS[family(path)]},images={data / 'images'}" for path in sorted((data / "test").glob("*.json"))]
    tasks = [load_task(spec, progress=False) for spec in specs]
    assert {family(path) for path in (data / "test").glob("*.json")} == set(FAMILIES)
    for task in tasks:
        assert all(task.metric.score(sample.answers[0], task.metric.complete(sample)) == 1 for sample in task.samples)


NINTHS = [f"{down} {across}".strip() or "middle" for down in ("top", "", "bottom") for across in ("left", "", "right")]
CELLS = [f"row {row}, column {column}" for row in range(1, 5) for column in range(1, 5)]


def listed(record: dict[str, Any], spots: list[str]) -> str:
    """What lies in which ninth, or cell, of a picture of 384 px."""
    found: dict[str, list[str]] = {}
    a_side = round(len(spots) ** 0.5)
    for thing in record["things"]:
        left, top, right, bottom = thing["box"]
        spot = spots[int((top + bottom) / 768 * a_side) * a_side + int((left + right) / 768 * a_side)]
        found.setdefault(spot, []).append(thing["name"])
    return "; ".join(f"{spot}: {', '.join(found[spot])}" for spot in spots if spot in found)


def test_a_caption_says_what_lies_where(data: Path) -> None:
    drawn = {record["image"]: record for record in records(data, "train")}
    rows = [row for row in json.loads((data / "captions.json").read_text()) if drawn[row["image"]]["kind"] == "scene"]
    assert [row["conversations"][0]["value"].endswith("4x4 grid.") for row in rows] == [number % 4 > 1 for number in range(len(rows))]
    assert len(rows) > TRAIN / 2
    for row in rows:
        spots = CELLS if "grid" in row["conversations"][0]["value"] else NINTHS
        assert row["conversations"][1]["value"] == listed(drawn[row["image"]], spots)


def test_print_is_spelled_and_nothing_else(data: Path) -> None:
    """What is read off labels and pages, whole; no name of a thing, place or number of things."""
    for name in ("train", "captions", "closeups", "words"):
        kinds = {"scene": 0, "page": 0}
        drawn = {record["id"]: record["kind"] for record in records(data, "train")}
        for row in json.loads((data / f"{name}.json").read_text()):
            page = drawn["-".join(row["id"].split("-")[:2])] != "scene"
            turns = row["conversations"]
            for asked, answered in zip(turns[::2], turns[1::2], strict=True):
                spelled = [answered["value"]] if page or "label" in asked["value"] else None
                assert answered.get("spelled") == spelled
                kinds["page" if page else "scene"] += spelled is not None
        assert (kinds["page"] > 0) == (name in ("train", "captions"))
        assert (kinds["scene"] > 0) == (name != "captions")


def extent(box: list[float], side: int = 1) -> list[int]:
    """Width and height, of shares of a side in pixels."""
    return [round(side * (after - before)) for before, after in ((box[0], box[2]), (box[1], box[3]))]


def test_a_closeup_shows_the_quarter_round_a_label(data: Path) -> None:
    drawn = {record["image"]: record for record in records(data, "train")}
    rows = json.loads((data / "closeups.json").read_text())
    scenes = [record for record in drawn.values() if record["kind"] == "scene"]
    assert len(scenes) <= len(rows) == sum(len(record["labels"]) for record in scenes)  # none of these labels is too long
    several = 0
    for row in rows:
        source, number = row["image"].removesuffix(".jpg").rsplit("-", 1)
        record = drawn[f"{source}.jpg"]
        label = record["labels"][int(number)]
        thing = record["things"][label["under"]]  # of which all is seen
        like = [box for name, box in row["boxes"] if name == thing["name"] and extent(box, 192) == extent(thing["box"])]
        left, top = (round(thing["box"][axis] - like[0][axis] * 192) for axis in (0, 1))
        with Image.open(data / "images" / row["image"]) as near, Image.open(data / "images" / record["image"]) as whole:
            shown = np.asarray(near).astype(int)
            parts = [whole.crop((left + by, top + by, left + by + 192, top + by + 192)) for by in (0, 2, -2)]
            right, *wrong = [float(np.abs(shown - np.asarray(part)).mean()) for part in parts]
        assert right < 5  # a JPEG of its own
        assert all(right < other for other in wrong)

        def seen(box: list[int], left: int = left, top: int = top) -> list[int]:
            return [2 * min(max(edge - start, 0), 192) for edge, start in zip(box, (left, top, left, top), strict=True)]

        inside = [
            i for i, thing in enumerate(record["things"]) if all(0 <= sum(thing["box"][a::2]) / 2 - (left, top)[a] < 192 for a in (0, 1))
        ]
        things = [record["things"][i] | {"box": seen(record["things"][i]["box"])} for i in inside]
        whole_ones = [
            one
            for one in record["labels"]
            if [b - a for a, b in zip(seen(one["box"]), seen(one["box"])[2:], strict=False)]
            == [2 * (one["box"][2] - one["box"][0]), 2 * (one["box"][3] - one["box"][1])]
        ]
        asked = [one for one in whole_ones if one["under"] in inside]
        labels = [one | {"under": inside.index(one["under"]), "box": seen(one["box"])} for one in asked]
        assert label["text"] in [one["text"] for one in labels]
        several += len(labels) > 1
        for (name, box), item in zip(row["boxes"][: len(things)], things, strict=True):
            assert name == item["name"]
            assert box == pytest.approx([edge / 384 for edge in item["box"]], abs=1e-3)
        spelled = row["boxes"][len(things) :]
        assert "".join(letter for letter, _ in spelled) == "".join(one["text"].replace(" ", "") for one in whole_ones)
        for one in whole_ones:
            (a, b, c, d), letters = (edge / 384 for edge in seen(one["box"])), one["text"].replace(" ", "")
            own, spelled = spelled[: len(letters)], spelled[len(letters) :]
            assert all(a < box[0] < box[2] < c and box[1::2] == pytest.approx([b, d], abs=1e-3) for _, box in own)
            assert all(box[0] < after[0] for (_, box), (_, after) in itertools.pairwise(own))
        turns = [turn["value"].removeprefix("<image>\n") for turn in row["conversations"]]
        if len(record["labels"]) == 1:
            wanted = [("What does the label say?", label["text"])]
        else:
            wanted = [(f"What does the label under the {things[one['under']]['name']} say?", one["text"]) for one in labels]
        assert list(zip(turns[::2], turns[1::2], strict=True)) == [
            *wanted,
            ("List the things, place by place.", listed({"things": things}, NINTHS)),
        ]
    assert several


def test_words_are_the_captions_of_scenes_and_the_closeups(data: Path) -> None:
    words, captions, near = (json.loads((data / f"{name}.json").read_text()) for name in ("words", "captions", "closeups"))
    things = {record["image"]: len(record["things"]) for record in records(data, "train") if record["kind"] == "scene"}
    scenes = [row | {"boxes": row["boxes"][: things[row["image"]]]} for row in captions if row["image"] in things]
    assert words == scenes + near


def test_letters_stand_where_they_are_drawn(stock: Stock) -> None:
    """There is ink on each one's part of the plate, and none before the first one, between the words and behind the last one."""
    scene = make_scene(random.Random(3), stock, stock.fonts, 1)
    label = replace(scene.labels[0], text="Ebb 47", ink=(0, 0, 0), plate=(255, 255, 255))
    wide, high = plate_size(label.text, label.font, label.size)
    label = replace(label, box=(20, 30, 20 + wide, 30 + high))
    ink = 255 - np.asarray(render(replace(scene, labels=(label,)))[0].convert("L"), dtype=int)[30 : 30 + high]
    found = letters(label)
    assert [letter for letter, _ in found] == list("Ebb47")
    spans = [box[::2] for _, box in found]
    between = [(20 + 2, spans[0][0]), (spans[2][1] + 1, spans[3][0]), (spans[4][1], 20 + wide - 2)]
    for first, last in spans:
        assert ink[:, first:last].sum() > 255
    assert sum(int(ink[:, first:last].sum()) for first, last in between) < 0.05 * ink[:, 22 : 18 + wide].sum()
    assert all(box[1::2] == (30, 30 + high) for _, box in found)


def test_a_label_that_does_not_fit_into_a_closeup_has_none(stock: Stock) -> None:
    scene = make_scene(random.Random(0), stock, stock.fonts, 1)
    first = scene.labels[0]
    assert closeup(random.Random(0), scene, 0) is not None
    wide = replace(first, box=(0, first.box[1], 193, first.box[3]))
    assert closeup(random.Random(0), replace(scene, labels=(wide, *scene.labels[1:])), 0) is None


def test_captions_list_things_with_their_boxes(data: Path) -> None:
    drawn = {record["image"]: record for record in records(data, "train")}
    for row in json.loads((data / "captions.json").read_text()):
        record, told = drawn[row["image"]], row["conversations"][1]["value"]
        items = [item for kind in ("things", "labels", "texts") for item in record.get(kind, ())]
        labels = {label["text"] for label in record.get("labels", ())}
        assert [text for text, _ in row["boxes"]] == [item.get("name", item.get("text")) for item in items]
        assert all(text in told for text, _ in row["boxes"] if text not in labels)
        for (_, box), item in zip(row["boxes"], items, strict=True):
            assert box == pytest.approx([edge / 384 for edge in item["box"]], abs=1e-3)


def test_licences_are_listed(data: Path) -> None:
    assert "little: made up. Blots." in (data / "licences.txt").read_text()


def test_balance(data: Path) -> None:
    """As many yes as no, all counts alike, up to the odd one; and what real.json says of the best constant answer."""
    found = json.loads((data / "real.json").read_text())["splits"]
    assert list(found) == list(SPLITS)
    for split in ("train", "compositions", "style", "names"):
        rows = questions(data, split)
        replies = Counter(row["answers"][0] for row in rows if row["answers"][0] in ("yes", "no"))
        assert abs(replies["yes"] - replies["no"]) <= 2
        counts = Counter(row["answers"][0] for row in rows if row["question"].startswith("How many") and "bought" not in row["question"])
        assert set(counts) == set("01234")
        assert max(counts.values()) - min(counts.values()) <= 2
    for split in SPLITS[1:]:
        for path in (data / "test").glob(f"{split}-*.json"):
            given = [row["answers"][0].lower() for row in json.loads(path.read_text())]
            summary = found[split]["questions"][family(path)]
            assert summary["questions"] == len(given)
            if family(path) != "boxes":
                assert summary["right"] == pytest.approx(max(Counter(given).values()) / len(given), abs=1e-4)
                assert given.count(summary["constant"]) == max(Counter(given).values())


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def test_same_seed_same_bytes_whatever_processes(tmp_path: Path, stock: Stock) -> None:
    for name, seed, processes in (("one", 1, 1), ("two", 1, 2), ("other", 2, 1)):
        write_real(tmp_path / name, stock, 5, 2, seed=seed, progress=False, processes=processes)
    one, two, other = (digests(tmp_path / name) for name in ("one", "two", "other"))
    assert one == two
    # Which families are asked and how many labels there are to be seen from near is drawn.
    always = [{name for name in found if not name.startswith("test") and "-" not in Path(name).stem} for found in (one, other)]
    assert always[0] == always[1]
    assert all(one[name] != other[name] for name in one.keys() & other.keys() if name.startswith("images"))


# ---- what is refused, and what is left alone


def test_complete_data_are_left_as_they_are(tmp_path: Path, stock: Stock) -> None:
    first = write_real(tmp_path / "data", stock, 4, 2, progress=False)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*")}
    assert write_real(tmp_path / "data", stock, 4, 2, progress=False) == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*")} == before
    with pytest.raises(FoveateError, match=r"holds other data \(train 4, wanted 5\); choose another folder"):
        write_real(tmp_path / "data", stock, 5, 2, progress=False)


def test_other_folders_are_refused(tmp_path: Path, stock: Stock) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo.jpg").write_text("x")
    (tmp_path / "file").write_text("x")
    for name, content in (("list", "[]"), ("other", '{"parameters": 1}'), ("torn", '{"param')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "real.json").write_text(content)
    for name in ("mine", "file", "list", "other", "torn"):
        with pytest.raises(FoveateError, match=f"{name} holds something else"):
            write_real(tmp_path / name, stock, 1, 1, progress=False)
    assert (tmp_path / "mine" / "photo.jpg").read_text() == "x"
    with pytest.raises(FoveateError, match=r"test=0: at least one"):
        write_real(tmp_path / "new", stock, 1, 0, progress=False)
    assert not (tmp_path / "new").exists()


def test_interrupted_data_are_not_there(tmp_path: Path, stock: Stock, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    (tmp_path / "data").mkdir()  # an empty folder is as good as none
    with monkeypatch.context() as patch:
        patch.setattr(write, "_write_tests", stop)
        with pytest.raises(KeyboardInterrupt):
            write_real(tmp_path / "data", stock, 2, 2, progress=False)
    assert not (tmp_path / "data").exists()
    assert write_real(tmp_path / "data", stock, 2, 2, progress=False)["parameters"]["train"] == 2


# ---- legibility


def test_what_cannot_be_read_is_drawn_again(tmp_path: Path, stock: Stock, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def reader(model: str, image: Image.Image, texts: Any) -> list[str]:
        seen.append([text for text, _ in texts])
        return ["smudge"] if len(seen) % 3 == 1 else []

    monkeypatch.setattr(write, "can_judge", lambda model: True)
    monkeypatch.setattr(write, "illegible", reader)
    stock = replace(stock, ocr="a reader")
    found = write_real(tmp_path / "data", stock, 4, 4, progress=False)
    assert found["parameters"]["judged"]
    pictures = sum(sum(split["pictures"].values()) for split in found["splits"].values())
    assert sum(split["redrawn"] for split in found["splits"].values()) == len(seen) - pictures > 0
    assert "drawn again" in told(found)
    for split in SPLITS[1:]:  # whatever is asked for was read
        for row in questions(tmp_path / "data", split):
            if row["family"] in ("reading", "documents"):
                assert any(row["answers"][0] in texts for texts in seen)
    monkeypatch.setattr(write, "illegible", lambda *_: ["smudge (5mudge)"])
    with pytest.raises(FoveateError, match=r"drawn 20 times and never legible: smudge \(5mudge\)"):
        write_real(tmp_path / "never", stock, 1, 1, progress=False)
    assert not (tmp_path / "never").exists()


def test_it_says_when_nothing_was_judged(data: Path) -> None:
    said = told(json.loads((data / "real.json").read_text()))
    assert "Legibility was not judged" in said
    assert "compositions: 20 pictures" in said
    assert "metric=iou,format=hundredths" in said
