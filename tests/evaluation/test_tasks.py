"""Tasks from every kind of data, and every way in which data can be wrong, named before a model is asked."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from foveate.data.pixels import Held, open_image
from foveate.errors import FoveateError
from foveate.evaluation.samples import Sample, Task
from foveate.evaluation.tasks import load_task
from foveate.world.scenes import write_world


def load(spec: str) -> Task:
    return load_task(spec, progress=False)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the datasets library keeps of a file must not outlive a test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def picture(seed: int, size: tuple[int, int] = (20, 10)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures, "0.png" to "2.png"."""
    (tmp_path / "images").mkdir()
    for number in range(3):
        picture(number).save(tmp_path / "images" / f"{number}.png")
    return tmp_path


def write(path: Path, rows: list[Any]) -> Path:
    lines = path.suffix == ".jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n" if lines else json.dumps(rows))
    return path


def talk(number: int, *turns: str, **more: Any) -> dict[str, Any]:
    said = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(turns)]
    return {"id": f"q{number}", "image": f"{number}.png", "conversations": said, **more}


TALKS = [
    talk(0, "<image>\nWhat color?", "Red."),
    talk(1, "<image>\nHow many?", "2", "And blue ones?", " one "),
    talk(2, "Who?\n<image>", "me"),
]
COLUMNS = [
    {"question_id": 7, "image": "0.png", "question": "What color?", "answer": "red", "category": "color"},
    {"question_id": 8, "image": "1.png", "question": "How many?", "answers": ["2", "two"], "category": "count"},
    {"question_id": 9, "image": ["1.png", "2.png"], "question": "Which has <image> more: <image>?", "answer": 2, "category": "count"},
]


# ---- the embedded world ----------------------------------------------------------------------------------------------------------------


def test_embedded_scenes_are_those_that_are_written(tmp_path: Path) -> None:
    write_world(tmp_path / "world", train=0, test=3, seed=5, size=48, progress=False)
    written, drawn = load(str(tmp_path / "world")), load("scenes:count=3,seed=5,size=48")
    assert (written.name, drawn.name) == ("world", "scenes")
    assert written.hash == drawn.hash
    assert written.metric == drawn.metric
    assert written.max_new_tokens == 8
    plain = [(sample.id, sample.question, sample.answers, sample.group) for sample in written.samples]
    assert plain == [(sample.id, sample.question, sample.answers, sample.group) for sample in drawn.samples]
    assert all(len(sample.images) == 1 for sample in drawn.samples)
    for one, other in zip(written.samples, drawn.samples, strict=True):
        assert np.array_equal(np.asarray(open_image(one.images[0])), np.asarray(open_image(other.images[0])))
    assert open_image(drawn.samples[0].images[0]).size == (48, 48)


def test_embedded_scenes_differ_by_seed_and_some_families_can_be_asked() -> None:
    whole = load("scenes:count=4,size=32")
    assert load("scenes:count=4,size=32,seed=1").hash != whole.hash
    some = load("scenes:count=4,size=32,families=presence/count,name=few,max_new_tokens=3")
    assert {sample.group for sample in some.samples} == {"presence", "count"}
    assert [sample for sample in whole.samples if sample.group in ("presence", "count")] == list(some.samples)
    assert (some.name, some.max_new_tokens) == ("few", 3)
    assert len(load("scenes:count=4,size=32,limit=5").samples) == 5


def test_perfect_answers_to_scenes() -> None:
    task = load("scenes:count=4,size=32")
    answers = [sample.answers[0] for sample in task.samples]
    scores = [task.metric.score(answer, sample) for answer, sample in zip(answers, task.samples, strict=True)]
    assert set(task.metric.summary(task.samples, answers, scores).values()) == {100}


# ---- data sets -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".json", ".jsonl"])
def test_conversations(folder: Path, ending: str) -> None:
    task = load(f"{write(folder / f'talks{ending}', TALKS)}:metric=exact,images={folder / 'images'}")
    assert [(sample.id, sample.question, sample.answers) for sample in task.samples] == [
        ("q0", "<image>\nWhat color?", ("Red.",)),
        ("q1", "And blue ones?", ("one",)),
        ("q2", "Who?\n<image>", ("me",)),
    ]
    assert [sample.images for sample in task.samples] == [(folder / "images" / f"{number}.png",) for number in range(3)]
    assert (task.name, task.metric.name, task.max_new_tokens) == ("talks", "exact", 16)
    assert task.metric.score("red", task.samples[0]) == 1


def test_a_conversation_with_references_of_its_own(folder: Path) -> None:
    path = write(folder / "talks.json", [talk(0, "<image>\nWhat color?", "red", people=["red"] * 9 + ["blue"])])
    task = load(f"{path}:metric=vqa,answer=people,images={folder / 'images'}")
    assert task.samples[0].answers == ("red",) * 9 + ("blue",)


@pytest.mark.parametrize("ending", [".json", ".jsonl"])
def test_columns(folder: Path, ending: str) -> None:
    task = load(f"{write(folder / f'rows{ending}', COLUMNS)}:metric=exact,images={folder / 'images'}")
    images = [folder / "images" / f"{number}.png" for number in range(3)]
    assert list(task.samples) == [
        Sample("7", (images[0],), "What color?", ("red",), "color"),
        Sample("8", (images[1],), "How many?", ("2", "two"), "count"),
        Sample("9", (images[1], images[2]), "Which has <image> more: <image>?", ("2",), "count"),
    ]


def test_columns_of_other_names(folder: Path) -> None:
    row = {"uid": "a", "file": str(folder / "images" / "0.png"), "q": "What?", "gold": "x", "kind": "k", "note": "Look!", "question": "no"}
    task = load(f"{write(folder / 'rows.json', [row])}:metric=exact,question=q,answer=gold,image=file,id=uid,group=kind,hint=note")
    assert task.samples == (Sample("a", (folder / "images" / "0.png",), "Look!\nWhat?", ("x",), "k"),)


def test_suffix_and_limit(folder: Path) -> None:
    path = write(folder / "rows.json", COLUMNS)
    task = load(f"{path}:metric=exact,images={folder / 'images'},suffix=Be brief, please.\\nNow:,limit=1,max_new_tokens=5,id=row")
    assert [(sample.id, sample.question) for sample in task.samples] == [("0", "What color?\nBe brief, please.\nNow:")]
    assert task.max_new_tokens == 5


def dataset() -> datasets.Dataset:
    """Four questions about two pictures that lie within the data set."""
    rows = {
        "question": ["What color?", "How many?", "What shape?", "Where?"],
        "answers": [["red", "crimson"], ["2"], ["star"], ["left"]],
        "image": [picture(number // 2) for number in range(4)],
        "category": ["a", "a", "b", "b"],
    }
    return datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())


def check_dataset(task: Task) -> None:
    assert [(sample.id, sample.question, sample.answers, sample.group) for sample in task.samples] == [
        ("0", "What color?", ("red", "crimson"), "a"),
        ("1", "How many?", ("2",), "a"),
        ("2", "What shape?", ("star",), "b"),
        ("3", "Where?", ("left",), "b"),
    ]
    images = [sample.images[0] for sample in task.samples]
    assert isinstance(images[0], Held)
    assert isinstance(images[2], Held)
    assert images[0] is images[1]
    assert images[0].name != images[2].name
    assert np.array_equal(np.asarray(open_image(images[3])), np.asarray(picture(1)))


def test_parquet(tmp_path: Path) -> None:
    dataset().to_parquet(tmp_path / "rows.parquet")
    task = load(f"{tmp_path / 'rows.parquet'}:metric=exact")
    check_dataset(task)
    assert task.name == "rows"


def test_folder_of_parquet(tmp_path: Path) -> None:
    (tmp_path / "set" / "data").mkdir(parents=True)
    dataset().to_parquet(tmp_path / "set" / "data" / "test-00000-of-00001.parquet")
    check_dataset(load(f"{tmp_path / 'set'}:metric=exact"))
    dataset().select([0]).to_parquet(tmp_path / "set" / "data" / "train-00000-of-00001.parquet")
    with pytest.raises(FoveateError, match=r"has the splits .*: say which with split="):
        load(f"{tmp_path / 'set'}:metric=exact")
    check_dataset(load(f"{tmp_path / 'set'}:metric=exact,split=test"))


def test_saved_to_disk(tmp_path: Path) -> None:
    dataset().save_to_disk(tmp_path / "one")
    check_dataset(load(f"{tmp_path / 'one'}:metric=exact"))
    assert len(load(f"{tmp_path / 'one'}:metric=exact,limit=3").samples) == 3
    datasets.DatasetDict({"test": dataset(), "train": dataset().select([0])}).save_to_disk(tmp_path / "several")
    check_dataset(load(f"{tmp_path / 'several'}:metric=exact,split=test"))
    with pytest.raises(FoveateError, match="has the splits test, train: say which"):
        load(f"{tmp_path / 'several'}:metric=exact")
    with pytest.raises(FoveateError, match="there is no 'val' among them"):
        load(f"{tmp_path / 'several'}:metric=exact,split=val")
    with pytest.raises(FoveateError, match="has no splits"):
        load(f"{tmp_path / 'one'}:metric=exact,split=test")


def test_conversations_in_a_data_set(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "x"}]
    rows = datasets.Dataset.from_dict({"id": ["a"], "images": [[picture(0)]], "conversations": [turns]})
    rows.cast_column("images", datasets.List(datasets.Image())).save_to_disk(tmp_path / "talks")
    (sample,) = load(f"{tmp_path / 'talks'}:metric=exact").samples
    assert (sample.id, sample.question, sample.answers) == ("a", "<image>\nWhat?", ("x",))
    assert open_image(sample.images[0]).size == (20, 10)


def test_people_of_vqa(tmp_path: Path) -> None:
    people = [[{"answer": "red" if number < 3 else "blue", "answer_id": number} for number in range(10)]]
    rows = datasets.Dataset.from_dict({"question": ["What?"], "answers": people, "image": [picture(0)]})
    rows.cast_column("image", datasets.Image()).save_to_disk(tmp_path / "vqa")
    task = load(f"{tmp_path / 'vqa'}:metric=vqa,variant=both")
    assert task.metric.score("Red.", task.samples[0]) == 0.9


@pytest.mark.parametrize(
    ("columns", "options"),
    [
        ({"choices": ["cat", "dog", "cow"], "answer": 1}, ""),
        ({"options": ["cat", "dog", "cow"], "answer": "1"}, ",answer_is=index"),
        ({"A": "cat", "B": "dog", "C": "cow", "D": None, "answer": "B"}, ""),
        ({"choice_a": "cat", "choice_b": "dog", "choice_c": "cow", "answer": "dog"}, ",options=choice_a/choice_b/choice_c"),
        ({"these": ["cat", "dog", "cow"], "answer": "B"}, ",options=these"),
    ],
)
def test_options_are_written_behind_the_question(folder: Path, columns: dict[str, Any], options: str) -> None:
    path = write(folder / "rows.json", [{"image": "0.png", "question": "Which?", **columns}])
    (sample,) = load(f"{path}:metric=choice,images={folder / 'images'},suffix=Answer:{options}").samples
    assert sample.question == "Which?\nA. cat\nB. dog\nC. cow\nAnswer:"
    assert sample.answers == ("B",)


def test_options_in_the_question(folder: Path) -> None:
    path = write(folder / "talks.json", [talk(0, "<image>\nWhich?\nA. cat\nB. dog", "B")])
    task = load(f"{path}:metric=choice,rule=mmbench,images={folder / 'images'}")
    assert task.samples[0].question == "<image>\nWhich?\nA. cat\nB. dog"
    assert task.metric.score("It is a dog", task.samples[0]) == 1


def test_rotations_are_asked_one_by_one(folder: Path) -> None:
    path = write(folder / "rows.json", [{"index": 4, "image": "0.png", "question": "Which?", "A": "cat", "B": "dog", "answer": "A"}])
    task = load(f"{path}:metric=mmbench,images={folder / 'images'}")
    assert [(sample.id, sample.question, sample.answers) for sample in task.samples] == [
        ("4#0", "Which?\nA. cat\nB. dog", ("A",)),
        ("4#1", "Which?\nA. dog\nB. cat", ("B",)),
    ]


def test_boxes_know_the_size_of_their_image(folder: Path) -> None:
    rows = [{"image": "0.png", "question": "Where?", "bbox": [2, 2, 10, 5]}]
    path = write(folder / "rows.json", rows)
    task = load(f"{path}:metric=iou,format=fractions,truth=pixels,corners=xywh,answer=bbox,images={folder / 'images'}")
    assert task.samples[0].extra["size"] == (20, 10)
    assert task.metric.score("[0.1, 0.2, 0.6, 0.7]", task.samples[0]) == 1


def test_two_questions_about_each_image_of_mme(folder: Path) -> None:
    rows = [
        {"question_id": f"x/{i // 2}", "image": f"{i // 2}.png", "question": str(i), "answer": ("Yes", "No")[i % 2], "category": "count"}
        for i in range(4)
    ]
    spec = f"{write(folder / 'rows.json', rows)}:metric=mme,images={folder / 'images'}"
    task = load(f"{spec},id=row")
    told = task.metric.summary(task.samples, ["yes", "no", "yes", "yes"], [1, 1, 1, 0])
    assert (told["accuracy"], told["accuracy+"], told["score"], told["perception"]) == (75, 50, 125, 125)
    with pytest.raises(FoveateError, match="2 ids stand for several samples, such as 'x/0'; name others with id=, or id=row"):
        load(spec)
    with pytest.raises(FoveateError, match="an even limit="):
        load(f"{spec},id=row,limit=3")


def test_the_hash_is_that_of_what_is_asked(folder: Path) -> None:
    path, images = write(folder / "rows.json", COLUMNS), folder / "images"
    spec = f"{path}:metric=exact,images={images}"
    before = load(spec).hash
    assert load(spec).hash == before
    assert load(f"{spec},name=other").hash == before
    assert load(f"{spec},suffix=!").hash != before
    assert load(f"{spec},limit=2").hash != before
    picture(9).save(images / "0.png")
    assert load(spec).hash != before


# ---- what can be wrong -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere.json:metric=exact", "no such task: nowhere.json"),
        ("scens", "no such task: scens"),
        ("scenes:600", "no such task: scenes:600"),
        (":count=3", "names no data"),
        ("scenes:coun=3", "has no option 'coun' .did you mean 'count'"),
        ("scenes:metric=exact", "has no option 'metric'"),
        ("scenes:count=3,count=4", "count= is there twice"),
        ("scenes:count=", "count= is without a value"),
        ("scenes:count=none", "count=none: must be a whole number, at least 1"),
        ("scenes:size=8", "size=8: must be a whole number, at least 32"),
        ("scenes:count=1,limit=0", "limit=0: must be"),
        ("scenes:count=1,max_new_tokens=-1", "max_new_tokens=-1: must be"),
        ("scenes:count=1,families=presense", "unknown family 'presense' .did you mean 'presence'"),
    ],
)
def test_a_wrong_text(spec: str, message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        load(spec)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "say how answers are scored, with metric= one of exact, vqa"),
        (":metric=exacct", "unknown metric 'exacct' .did you mean 'exact'"),
        (":metric=exact,imges=x", "has no option 'imges' .did you mean 'images'"),
        (":metric=exact,variant=both", "has no option 'variant'"),
        (":metric=exact,options=a", "has no option 'options'"),
        (":metric=vqa,variant=bot", "variant=bot .did you mean 'both'"),
        (":metric=exact,images=nowhere", "images=nowhere: no such folder"),
        (":metric=exact,split=test", "has no splits"),
        (":metric=exact", "3 of 3 samples cannot be used:\n  row 0: names the image '0.png', but no images=FOLDER"),
        (":metric=vqa,images=IMAGES", "3 of 3 samples cannot be used:\n  7: has 1 answers, and metric vqa needs those of 10"),
        (":metric=pope,images=IMAGES", "3 of 3 samples cannot be used:\n  7: its answer must be yes or no, found 'red'"),
        (":metric=exact,images=IMAGES,answer=gold", "3 of 3 samples cannot be used:\n  row 0: has no field 'gold'"),
        (":metric=exact,images=IMAGES,answer=answer", "1 of 3 samples .*:\n  row 1: has no field 'answer' .did you mean 'answers'"),
        (":metric=exact,images=IMAGES,image=picture", "has no field 'picture'"),
        (":metric=exact,images=IMAGES,id=category", "1 ids stand for several samples, such as 'count'"),
    ],
)
def test_a_wrong_option_of_a_data_set(folder: Path, options: str, message: str) -> None:
    path = write(folder / "rows.json", COLUMNS)
    with pytest.raises(FoveateError, match=message):
        load(f"{path}{options.replace('IMAGES', str(folder / 'images'))}")


GOOD = COLUMNS[0]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": "0.png", "answer": "x"}, "row 1: has nothing in the field question; question= names another"),
        ({"image": "0.png", "question": "What?"}, "row 1: has nothing in the field answers or answer"),
        ({"image": "0.png", "question": "What?", "answer": None}, "row 1: has nothing in the field answers or answer"),
        ({"image": "0.png", "question": "What?", "answer": " "}, "row 1: has no answer"),
        ({"image": "0.png", "question": "What?", "answers": []}, "row 1: has no answer"),
        ({"image": "0.png", "question": "What?", "answer": {"a": 1}}, "row 1: answers must be texts or numbers"),
        ({"image": "0.png", "question": "", "answer": "x"}, "row 1: its question is no text: ''"),
        ({"image": "0.png", "question": "<image> or <image>?", "answer": "x"}, "row 1: has 1 images but 2 <image> markers"),
        ({"image": 3, "question": "What?", "answer": "x"}, "row 1: its image is neither a path nor"),
        ({"image": "0.png", "conversations": []}, "row 1: has no conversations"),
        ({"image": "0.png", "conversations": [{"from": "human", "value": "<image>?"}]}, "row 1: human and gpt must take turns"),
        (talk(0, "What?", "x"), "row 1: has 1 image but 0 <image> markers"),
    ],
)
def test_a_wrong_row_is_named(folder: Path, row: dict[str, Any], message: str) -> None:
    path = write(folder / "rows.json", [GOOD, row])
    with pytest.raises(FoveateError, match=f"rows.json: 1 of 2 samples cannot be used:\n  {message}"):
        load(f"{path}:metric=exact,images={folder / 'images'}")


def test_bad_images_are_named_and_counted(folder: Path) -> None:
    images = folder / "images"
    whole = (images / "1.png").read_bytes()
    (images / "1.png").write_bytes(whole[: len(whole) // 2])
    (images / "2.png").unlink()
    with pytest.raises(FoveateError, match=r"rows.json: 2 of 3 images cannot be used:\n.*1.png cannot be decoded: .*\n.*2.png is missing"):
        load(f"{write(folder / 'rows.json', COLUMNS)}:metric=exact,images={images}")


def test_a_bad_image_within_a_data_set(tmp_path: Path) -> None:
    held = io.BytesIO()
    picture(0).save(held, "PNG")
    images = [{"bytes": held.getvalue(), "path": "a.png"}, {"bytes": b"no picture", "path": "b.png"}]
    rows = {"question": ["What?"] * 2, "answer": ["x"] * 2, "image": images}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(FoveateError, match=r"1 of 2 images cannot be used:\n  b.png-.* cannot be decoded"):
        load(f"{tmp_path / 'rows.parquet'}:metric=exact")


def test_of_many_bad_rows_the_first_are_named(folder: Path) -> None:
    rows = [{**GOOD, "image": f"no-{number}.png"} for number in range(50)]
    with pytest.raises(FoveateError) as caught:
        load(f"{write(folder / 'rows.json', rows)}:metric=exact,id=row,images={folder / 'images'}")
    lines = str(caught.value).splitlines()
    assert len(lines) == 22
    assert lines[-1] == "  and 30 more"


def test_rows_without_any_picture(folder: Path) -> None:
    rows = [{"question": "What?", "answer": "x", "photo": "0.png"}]
    with pytest.raises(FoveateError, match=r"no row has a picture; name their column with image= \(there are question, answer, photo\)"):
        load(f"{write(folder / 'rows.json', rows)}:metric=exact,images={folder / 'images'}")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.json", "[]", "is empty"),
        ("rows.jsonl", "\n", "is empty"),
        ("rows.json", "{", "is not JSON"),
        ("rows.jsonl", '{"a": 1}\n{', "is not JSON"),
        ("rows.json", '{"a": 1}', "must hold a list of objects"),
        ("rows.json", "[1]", "must hold a list of objects"),
        ("rows.parquet", "no parquet", "cannot be read as a data set"),
        ("rows.csv", "a,b", "is no data set: give a .json, .jsonl or .parquet file"),
    ],
)
def test_a_wrong_file(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(FoveateError, match=message):
        load(f"{tmp_path / name}:metric=exact")


def test_an_empty_folder_and_an_empty_data_set(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(FoveateError, match="is no data set"):
        load(f"{tmp_path / 'empty'}:metric=exact")
    dataset().select([]).save_to_disk(tmp_path / "none")
    with pytest.raises(FoveateError, match="none is empty"):
        load(f"{tmp_path / 'none'}:metric=exact")


def test_an_image_that_is_gone_when_it_is_asked_about(folder: Path) -> None:
    task = load(f"{write(folder / 'rows.json', COLUMNS)}:metric=exact,images={folder / 'images'}")
    (folder / "images" / "0.png").unlink()
    with pytest.raises(FoveateError, match=r"0\.png"):
        open_image(task.samples[0].images[0])
    with pytest.raises(FoveateError, match=r"cannot read the image x.png"):
        open_image(Held(b"no picture", "x.png"))


def test_images_come_as_rgb() -> None:
    held = io.BytesIO()
    Image.new("LA", (3, 2), (7, 0)).save(held, "PNG")
    opened = open_image(Held(held.getvalue(), "grey.png"))
    assert (opened.mode, opened.size) == ("RGB", (3, 2))
