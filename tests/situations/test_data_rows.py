"""Which rows are read, from whatever they are in: the same by training, plans and benchmarks, and none is lost without a word."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from foveate.data.conversations import Bad, Conversations, cache_file, find_bad, refuse_or_skip
from foveate.data.rows import open_rows
from foveate.errors import FoveateError
from foveate.evaluation.samples import Task
from foveate.evaluation.sources import world_samples
from foveate.evaluation.tasks import load_task
from foveate.train.plan import count_steps
from foveate.train.settings import Data, Stage

datasets.disable_progress_bars()


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures 0.png to 5.png in `images`."""
    (tmp_path / "images").mkdir()
    for number in range(6):
        Image.new("RGB", (8, 8), (40 * number, 0, 0)).save(tmp_path / "images" / f"{number}.png")
    return tmp_path


def talk(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def rows(name: str, count: int) -> list[dict[str, Any]]:
    return [{"id": f"{name}{i}", "image": f"{i}.png", "conversations": talk("<image>\nWhat?", f"{name} {i}.")} for i in range(count)]


SPLITS = {"train": 5, "validation": 3, "test": 4}


def table(name: str, count: int) -> datasets.Dataset:
    return datasets.Dataset.from_list(rows(name, count))


def ids(where: Path | str, split: str = "train", **more: Any) -> list[str]:
    source = Conversations.open(dataset=str(where), split=split, **more).source
    return [source.row(i)["id"] for i in range(len(source))]


def task(where: Path, images: Path, more: str = "") -> Task:
    return load_task(f"{where}:metric=exact,images={images}{more}", progress=False)


def stage(**data: Any) -> Stage:
    fields: dict[str, Any] = {"name": "s", "train": {"bridge": True}, "batch_size": 1, "learning_rate": 1e-3, "epochs": 1}
    return Stage(**fields, data=Data(**data))


def bad(data: Conversations) -> list[Bad]:
    return find_bad(data.source, None)


# ---- splits ----------------------------------------------------------------------------------------------------------------------------


def shards(folder: Path) -> None:
    for name, count in SPLITS.items():
        table(name, count).to_parquet(folder / f"{name}-00000-of-00001.parquet")


def data_folder(folder: Path) -> None:
    (folder / "data").mkdir()
    shards(folder / "data")


def lines(folder: Path) -> None:
    for name, count in SPLITS.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows(name, count))))


def saved(folder: Path) -> None:
    datasets.DatasetDict({name: table(name, count) for name, count in SPLITS.items()}).save_to_disk(folder)


def card(folder: Path) -> None:
    """A clone whose card says which files are which: the names alone say otherwise."""
    for name, count in SPLITS.items():
        table(name, count).to_parquet(folder / f"part-{name[:2]}.parquet")
    files = "".join(f"\n  - split: {name}\n    path: part-{name[:2]}.parquet" for name in SPLITS)
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files:{files}\n---\n# A set\n")


@pytest.mark.parametrize("layout", [shards, data_folder, lines, saved, card])
def test_a_folder_has_the_rows_of_the_split_that_was_asked_for(folder: Path, layout: Any) -> None:
    where = folder / "set"
    where.mkdir()
    layout(where)
    for name, count in SPLITS.items():
        assert ids(where, name) == [f"{name}{i}" for i in range(count)]
        assert [sample.id for sample in task(where, folder / "images", f",split={name}").samples] == ids(where, name)
        assert count_steps(stage(dataset=str(where), split=name)) == count
    assert ids(where, "train[1:3]+test[:50%]") == ["train1", "train2", "test0", "test1"]
    assert ids(where, "test", limit=2) == ["test0", "test1"]
    for wrong in ("nonsense", "Train", "train["):
        for read in (lambda wrong=wrong: ids(where, wrong), lambda wrong=wrong: task(where, folder / "images", f",split={wrong}")):
            with pytest.raises(FoveateError, match=r"has the splits .*validation.*: there is no "):
                read()
    with pytest.raises(FoveateError, match="say which with split="):
        task(where, folder / "images")


def test_a_split_in_several_files_and_files_by_a_pattern(folder: Path) -> None:
    where = folder / "set"
    where.mkdir()
    for number in range(3):
        table(f"a{number}-", 2).to_parquet(where / f"train-0000{number}-of-00003.parquet")
    table("test", 4).to_parquet(where / "test-00000-of-00001.parquet")
    whole = ["a0-0", "a0-1", "a1-0", "a1-1", "a2-0", "a2-1"]
    assert ids(where) == whole
    assert ids(where / "train-*.parquet") == whole
    assert [sample.id for sample in task(where / "train-*.parquet", folder / "images").samples] == whole
    assert ids(where / "test-00000-of-00001.parquet") == [f"test{i}" for i in range(4)]  # a file that is named is what is read


def test_configurations_of_a_clone(folder: Path) -> None:
    where = folder / "set"
    for config in ("easy", "hard"):
        (where / config).mkdir(parents=True)
        table(config, 2).to_parquet(where / config / "train.parquet")
    configs = "".join(f"- config_name: {c}\n  data_files: {c}/train.parquet\n" for c in ("easy", "hard"))
    (where / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    assert ids(where, config="hard") == ["hard0", "hard1"]
    assert [sample.id for sample in task(where, folder / "images", ",config=easy").samples] == ["easy0", "easy1"]
    for read in (lambda: ids(where), lambda: task(where, folder / "images"), lambda: ids(where, config="hardest")):
        with pytest.raises(FoveateError, match=r"easy.*hard"):
            read()


@pytest.mark.parametrize("ending", ["json", "jsonl", "parquet", "saved"])
def test_a_file_is_one_split(folder: Path, ending: str) -> None:
    where = write(folder, ending, rows("x", 3))
    assert ids(where) == ids(where, "train[:]") == ["x0", "x1", "x2"]
    assert ids(where, "train[1:]") == ["x1", "x2"]
    for read in (lambda: ids(where, "test"), lambda: task(where, folder / "images", ",split=test")):
        with pytest.raises(FoveateError, match="has no splits, all its rows are train: leave out split=test"):
            read()


def test_a_clone_without_its_large_files(folder: Path) -> None:
    where = folder / "set"
    where.mkdir()
    (where / "train.parquet").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    for place in (where, where / "train.parquet"):
        with pytest.raises(FoveateError, match="git lfs pull"):
            ids(place)


# ---- one reader ------------------------------------------------------------------------------------------------------------------------


def write(folder: Path, ending: str, held: list[dict[str, Any]]) -> Path:
    path = folder / f"held.{ending}"
    text = json.dumps(held)
    if ending == "json":
        path.write_text(text)
    elif ending == "bom.json":
        path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    elif ending == "jsonl":
        path.write_text("\n".join(map(json.dumps, held)) + "\n\n")
    elif ending == "crlf.jsonl":
        path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(map(json.dumps, held)).encode())
    elif ending == "lines.json":
        path.write_text("\n".join(map(json.dumps, held)))
    elif ending == "list.jsonl":
        path.write_text(json.dumps(held, indent=1))
    elif ending == "parquet":
        datasets.Dataset.from_list(held).to_parquet(path)
    else:
        datasets.Dataset.from_list(held).save_to_disk(path)
    return path


@pytest.mark.parametrize("ending", ["json", "bom.json", "jsonl", "crlf.jsonl", "lines.json", "list.jsonl", "parquet", "saved"])
@pytest.mark.parametrize("field", ["image", "images"])
def test_training_plans_and_benchmarks_read_alike(folder: Path, ending: str, field: str) -> None:
    held = [{**row, field: [row["image"]]} for row in rows("x", 4)]
    held = [{name: value for name, value in row.items() if name in ("id", field, "conversations")} for row in held]
    where = write(folder, ending, held)
    for key in ("conversations", "dataset"):
        spec = {key: where if key == "conversations" else str(where)}
        data = Conversations.open(**spec, images=folder / "images")  # type: ignore[arg-type]
        assert bad(data) == []
        assert [(data[i].id, data[i].turns[1][1], data[i].images[0].getpixel((0, 0))) for i in range(4)] == [
            (f"x{i}", f"x {i}.", (40 * i, 0, 0)) for i in range(4)
        ]
        assert count_steps(stage(**spec)) == 4
    asked = task(where, folder / "images")
    assert [(sample.id, sample.answers) for sample in asked.samples] == [(f"x{i}", (f"x {i}.",)) for i in range(4)]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "latin-1", "cp1252"])
@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_other_encodings_are_refused_with_the_way_out(folder: Path, encoding: str, ending: str) -> None:
    path = folder / f"a.{ending}"
    held = {"id": "é", "image": "0.png", "conversations": talk("<image>\nCafé?", "Déjà.")}
    text = json.dumps([held] if ending == "json" else held, ensure_ascii=False)
    path.write_bytes(text.encode(encoding))
    for read in (lambda: Conversations.open(path), lambda: task(path, folder / "images"), lambda: count_steps(stage(conversations=path))):
        with pytest.raises(FoveateError, match=r"a\.json.*UTF-8.*save.*iconv -f .* -t utf-8"):
            read()


def test_test_json_of_a_world_is_read_by_the_same_reader(folder: Path) -> None:
    held = [{"id": "q", "image": "0.png", "family": "count", "question": "how many?", "answer": "2"}]
    (folder / "test.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(held).encode())
    assert [question.id for question in world_samples(folder)] == ["q"]
    assert [sample.id for sample in load_task(str(folder), progress=False).samples] == ["q"]
    (folder / "test.json").write_bytes(json.dumps(held).encode("utf-16"))
    with pytest.raises(FoveateError, match=r"test\.json is text in utf-16, and must be UTF-8"):
        world_samples(folder)


@pytest.mark.parametrize("line", [1, 2, 3])
def test_a_broken_line_is_named(folder: Path, line: int) -> None:
    texts = list(map(json.dumps, rows("x", 3)))
    texts[line - 1] = texts[line - 1][:-5]
    (folder / "a.jsonl").write_text("\n".join(texts))
    with pytest.raises(FoveateError, match=rf"a\.jsonl is not JSON lines: line {line} of 3"):
        Conversations.open(folder / "a.jsonl")


# ---- no rows ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["json", "jsonl", "blank", "slice", "parquet", "saved", "split"])
def test_no_rows_are_an_error(folder: Path, kind: str) -> None:
    where, split = folder / "a.json", "train"
    if kind == "json":
        where.write_text("[]")
    elif kind in ("jsonl", "blank"):
        where = folder / "a.jsonl"
        where.write_text("" if kind == "jsonl" else "\n \n")
    elif kind == "slice":
        where.write_text(json.dumps(rows("x", 3)))
        split = "train[3:]"
    else:
        where = folder / ("a.parquet" if kind == "parquet" else "a")
        empty = table("x", 1).select([])
        if kind == "parquet":
            empty.to_parquet(where)
        elif kind == "saved":
            empty.save_to_disk(where)
        else:
            datasets.DatasetDict({"train": empty, "test": table("x", 1)}).save_to_disk(where)
    reads = [lambda: Conversations.open(dataset=str(where), split=split), lambda: task(where, folder / "images", f",split={split}")]
    for read in [*reads, lambda: count_steps(stage(dataset=str(where), split=split))]:
        with pytest.raises(FoveateError, match="is empty"):
            read()


# ---- pictures under other keys ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"images": ["0.png"], "conversations": talk("What?", "x")}, "has 1 image but 0 <image> markers"),
        ({"image": "0.png", "images": ["0.png"], "conversations": talk("<image>", "x")}, "under both `image` and `images`"),
        (
            {"film": "v.mp4", "conversations": talk("<video>\nWhat?", "x")},
            r"has 'film', but only pictures, clips \(under `video`\) and text",
        ),
        ({"videos": ["v.mp4"], "conversations": talk("What?", "x")}, "has 1 clip but 0 <video> markers"),
        ({"video": "v", "image": "0.png", "conversations": talk("<image>", "x")}, "has 1 clip but 0 <video> markers"),
        ({"video": "v", "videos": ["v"], "conversations": talk("<video>", "x")}, "under both `video` and `videos`"),
        ({"video": "http://example.org/a.mp4", "conversations": talk("<video>", "x")}, "is an address, .* save the film"),
        ({"video": 3, "conversations": talk("<video>", "x")}, "is no name of a film"),
        ({"video": {"bytes": "AAAA"}, "conversations": talk("<video>", "x")}, "lies within the data set; save it as a file"),
        ({"audio": {"path": "a.wav", "bytes": None}, "conversations": talk("What?", "x")}, "has 'audio'"),
        ({"frames": ["0.png", "1.png"], "conversations": talk("What?", "x")}, "has 'frames'"),
        ({"img": "0.png", "conversations": talk("What?", "x")}, "has 'img', but pictures stand under `image` or `images`: rename"),
        ({"image_path": "0", "conversations": talk("What?", "x")}, "has 'image_path'"),
        ({"pictures": ["0.png"], "conversations": talk("What?", "x")}, "has 'pictures'"),
        ({"foto": "dir/0.JPG", "conversations": talk("What?", "x")}, "has 'foto'"),
        ({"image": "0.png", "image_2": "1.png", "conversations": talk("<image>", "x")}, "has 'image_2'"),
        ({"image": "", "conversations": talk("What?", "x")}, "neither a path nor the bytes"),
        ({"image": 3, "conversations": talk("<image>", "x")}, "neither a path nor the bytes"),
        ({"image": "http://example.org/a.png", "conversations": talk("<image>", "x")}, "is an address, .* save the picture"),
    ],
)
def test_no_picture_or_film_is_lost(folder: Path, row: dict[str, Any], reason: str) -> None:
    path = folder / "a.json"
    path.write_text(json.dumps([*rows("x", 2), {"id": "one", **row}]))
    data = Conversations.open(path, folder / "images")
    found = bad(data)
    assert [sample.id for sample in found] == ["one"]
    with pytest.raises(FoveateError, match=f"1 of 3 samples cannot be trained on.*\n  one: .*{reason}"):
        refuse_or_skip(data, found, "stop", None)
    with pytest.raises(FoveateError, match=f"1 of 3 samples cannot be used:\n  (one|row 2): .*{reason}"):
        task(path, folder / "images")


@pytest.mark.parametrize(
    "row",
    [
        {"images": ["0.png", "1.png"], "conversations": talk("<image><image>\nWhich?", "x")},
        {"image": None, "images": ["0.png"], "conversations": talk("<image>\nWhat?", "x")},
        {"image": "0.png", "video": None, "audio": [], "conversations": talk("<image>\nWhat?", "x")},
        {"image": "0.png", "image_id": "7", "image_size": [8, 8], "url": "http://x.org/a.jpg", "conversations": talk("<image>", "x")},
        {"source": "a book", "video_length": 0, "conversations": talk("Tell me of a <video> tag", "x")},
    ],
)
def test_what_is_said_beside_pictures_does_no_harm(folder: Path, row: dict[str, Any]) -> None:
    path = folder / "a.json"
    path.write_text(json.dumps([*rows("x", 2), {"id": "one", **row}]))
    assert bad(Conversations.open(path, folder / "images")) == []
    assert len(task(path, folder / "images").samples) == 3


def test_questions_with_pictures_in_other_columns(folder: Path) -> None:
    held = [{"image": "0.png", "question": "a", "answer": "x"}, {"photo": "1.png", "question": "b", "answer": "x"}]
    path = folder / "a.json"
    path.write_text(json.dumps(held))
    with pytest.raises(FoveateError, match=r"1: has 'photo', .*; or name the column of the pictures with image="):
        task(path, folder / "images")
    path.write_text(json.dumps([{**row, "video": "v.mp4"} for row in held[:1]]))
    with pytest.raises(FoveateError, match=r"1 of 2 images and clips cannot be used:\n  .*v\.mp4 is missing"):
        task(path, folder / "images")
    assert len(task(path, folder / "images", ",image=image").samples) == 1


# ---- odd text and names ----------------------------------------------------------------------------------------------------------------


ODD = [
    ({"conversations": talk("<image>\nA \ud800 b", "x")}, "no valid Unicode: half of a surrogate pair at character 10"),
    ({"conversations": talk("<image>\nA", "x \udfff")}, "no valid Unicode"),
    ({"conversations": talk("<image>\nA", "x \x00 y")}, "a NUL at character 2"),
    ({"image": "a\x00.png", "conversations": talk("<image>\nA", "x")}, "cannot be decoded: embedded null"),
    ({"image": "a\ud800.png", "conversations": talk("<image>\nA", "x")}, "cannot be decoded: .*surrogates not allowed"),
    ({"image": "x" * 5000, "conversations": talk("<image>\nA", "x")}, "cannot be decoded: .*File name too long"),
    ({"image": ".", "conversations": talk("<image>\nA", "x")}, "is a folder or device"),
    ({"image": "0%2Epng", "conversations": talk("<image>\nA", "x")}, "is missing: there is no file /.*/images/0%2Epng"),
    ({"image": "0.PNG", "conversations": talk("<image>\nA", "x")}, "is missing: there is no file /.*/images/0.PNG"),
    ({"image": "no/0.png", "conversations": talk("<image>\nA", "x")}, "no file /.*/images/no/0.png, nor the folder /.*/images/no"),
    ({"image": "a\nb.png", "conversations": talk("<image>\nA", "x")}, r"is missing: there is no file /.*/a\\nb.png"),
    ({"conversations": [{"from": ["human"], "value": "a"}]}, "a turn must be"),
    ({"conversations": {"from": ["human"], "value": ["a", "b"]}}, "no conversations"),
    ({"conversations": "hello"}, "no conversations"),
]


@pytest.mark.parametrize(("row", "reason"), ODD)
def test_odd_samples_are_bad_samples(folder: Path, row: dict[str, Any], reason: str) -> None:
    path = folder / "a.json"
    path.write_text(json.dumps([{"id": "odd\n\ud800", "image": "0.png", **row}, rows("x", 1)[0]]))
    data = Conversations.open(path, folder / "images")
    found = find_bad(data.source, folder / "checked.tsv")
    refuse_or_skip(data, found, "skip", folder / "bad.txt")
    assert [data[i].id for i in range(len(data))] == ["x0"]
    (line,) = (folder / "bad.txt").read_text().splitlines()
    assert line.startswith(r"odd\n\ud800")
    with pytest.raises(FoveateError, match=reason):
        raise FoveateError(line)
    with pytest.raises(FoveateError):
        task(path, folder / "images")


@pytest.mark.parametrize("held", [1, None, "text", [1], True])
def test_a_row_that_is_no_object_is_a_bad_sample(folder: Path, held: Any) -> None:
    path = folder / "a.json"
    path.write_text(json.dumps([*rows("x", 2), held]))
    (sample,) = bad(Conversations.open(path, folder / "images"))
    assert (sample.id, sample.index) == ("row 2", 2)
    assert "is no object with conversations" in sample.reason
    with pytest.raises(FoveateError, match="row 2: is no object"):
        task(path, folder / "images")


def test_names_are_taken_as_they_are(folder: Path) -> None:
    images = folder / "images"
    names = ["a b.png", "日本 é.png", "a\nb.png", "a%20b.png", "UP.PNG", "sub/../0.png", "'\"\\.png", str(images / "0.png")]
    (images / "sub").mkdir()
    for number, name in enumerate(names):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(images / name)
    held = [{"id": str(i), "image": name, "conversations": talk("<image>\na", "b")} for i, name in enumerate(names)]
    (folder / "a.json").write_text(json.dumps(held))
    data = Conversations.open(folder / "a.json", images)
    for _ in range(2):  # by then they are remembered
        assert find_bad(data.source, folder / "checked.tsv") == []
    colours = [data[i].images[0].getpixel((0, 0))[0] for i in range(len(names))]
    assert colours == [0, 1, 2, 3, 4, 7, 6, 7]
    assert len(task(folder / "a.json", images).samples) == len(names)
    assert len(set((folder / "checked.tsv").read_text().splitlines())) == len(names) - 1  # two of them are one file


def test_a_pipe_is_no_picture(folder: Path) -> None:
    os.mkfifo(folder / "images" / "pipe.png")
    (folder / "a.json").write_text(json.dumps([{"id": "p", "image": "pipe.png", "conversations": talk("<image>\na", "b")}]))
    (sample,) = bad(Conversations.open(folder / "a.json", folder / "images"))
    assert "is a folder or device" in sample.reason


def test_broken_rows_of_a_table(folder: Path) -> None:
    """Text in a parquet file that is not UTF-8 is found no earlier than it is read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = pa.Array.from_buffers(pa.string(), 2, [None, pa.py_buffer(np.array([0, 1, 3], "i4").tobytes()), pa.py_buffer(b"a\xff\xfe")])
    turn = pa.StructArray.from_arrays([pa.array(["human", "human"]), texts], ["from", "value"])
    talks = pa.ListArray.from_arrays(pa.array([0, 1, 2], pa.int32()), turn)
    pq.write_table(pa.table({"id": ["a", "b"], "conversations": talks}), folder / "a.parquet")
    found = bad(Conversations.open(folder / "a.parquet"))
    assert [sample.index for sample in found] == [0, 1]
    assert "human and gpt must take turns" in found[0].reason
    assert "cannot be read from" in found[1].reason
    assert len(open_rows(folder / "a.parquet").fingerprint) == 16


# ---- the same data ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["json", "jsonl", "parquet", "saved", "folder"])
def test_data_is_known_by_its_content(folder: Path, ending: str) -> None:
    def make(held: list[dict[str, Any]]) -> Path:
        if ending != "folder":
            return write(folder, ending, held)
        (folder / "set").mkdir(exist_ok=True)
        datasets.Dataset.from_list(held).to_parquet(folder / "set" / "train.parquet")
        return folder / "set"

    where = make(rows("x", 5))

    def known(limit: int | None = None) -> str:
        return Conversations.open(where, limit=limit).source.fingerprint

    before, two = known(), known(2)
    for path in [where, *where.rglob("*")]:
        os.utime(path, (1, 1))
    assert (known(), known(2)) == (before, two)
    assert two != before
    moved = folder / "moved"
    moved.mkdir()
    shutil.copytree(where, moved / where.name) if where.is_dir() else shutil.copy(where, moved / where.name)
    assert Conversations.open(moved / where.name).source.fingerprint == before
    shutil.rmtree(where) if where.is_dir() else where.unlink()
    changed = rows("x", 5)
    changed[3]["conversations"][1]["value"] = "y 3."
    where = make(changed)
    assert known() != before
    if ending != "parquet":
        return
    import pyarrow.parquet as pq

    pq.write_table(datasets.Dataset.from_list(rows("x", 5)).data.table, where, compression="gzip", row_group_size=2)
    assert known() == before


def test_pictures_are_part_of_the_content(folder: Path) -> None:
    marks: list[str] = []
    for number in (0, 1, 0):
        content = (folder / "images" / f"{number}.png").read_bytes()
        held = datasets.Dataset.from_list([{"image": content, "conversations": talk("<image>\na", "b")}])
        held.cast_column("image", datasets.Image()).to_parquet(folder / f"{len(marks)}.parquet")
        marks.append(Conversations.open(folder / f"{len(marks)}.parquet").source.fingerprint)
    assert marks[0] == marks[2] != marks[1]


def test_what_was_checked_is_remembered_by_content_and_by_the_rules(folder: Path) -> None:
    content = (folder / "images" / "0.png").read_bytes()
    datasets.Dataset.from_list([{"image": content, "conversations": talk("<image>\na", "b")}]).to_parquet(folder / "a.parquet")
    data = Conversations.open(folder / "a.parquet")
    for _ in range(2):
        assert find_bad(data.source, folder / "checked.tsv") == []
    assert len((folder / "checked.tsv").read_text().splitlines()) == 1
    assert cache_file(data.source).name.endswith("-3.tsv")


# ---- getting there by the messages -----------------------------------------------------------------------------------------------------


def test_own_photographs_by_the_messages_alone(folder: Path) -> None:
    """From the first idea to the answer, each step being what the message before says."""
    mine = folder / "images"
    held = [{"image": f"{i}.png", "question": "What colour?", "answer": "red"} for i in range(6)]
    with pytest.raises(FoveateError, match=r'holds pictures, but nothing that is asked .* a JSON list of \{"image": "a\.jpg", "question"'):
        load_task(f"{mine}:metric=exact", progress=False)
    (mine / "questions.json").write_text(json.dumps(held))
    with pytest.raises(FoveateError, match=r"has no test\.json, so it is no world\. .*foveate bench MODEL --tasks FILE\.json:metric="):
        world_samples(mine)
    with pytest.raises(FoveateError, match="say how answers are scored, with metric="):
        load_task(str(mine), progress=False)
    with pytest.raises(FoveateError, match=r"it holds questions\.json: name one of them"):
        load_task(f"{mine}:metric=exact", progress=False)
    with pytest.raises(FoveateError, match="no images=FOLDER says where that is"):
        load_task(f"{mine / 'questions.json'}:metric=exact", progress=False)
    with pytest.raises(FoveateError, match=rf"there is no file {folder}/0\.png"):
        task(mine / "questions.json", folder)
    assert len(task(mine / "questions.json", mine).samples) == 6


def test_own_questions_as_test_json(folder: Path) -> None:
    (folder / "test.json").write_text(json.dumps([{"id": "1", "image": "0.png", "question": "What?", "answer": "red"}]))
    with pytest.raises(FoveateError, match=r"'family' must be a text, got None\. A world is .* foveate bench|'family' must be a text"):
        world_samples(folder)
    assert len(task(folder / "test.json", folder / "images").samples) == 1
    for wrong, reason in {"\ud800": "no valid Unicode", "a\x00": "a NUL"}.items():
        held = {"id": "1", "image": "0.png", "family": "count", "question": wrong, "answer": "2"}
        (folder / "test.json").write_text(json.dumps([held]))
        with pytest.raises(FoveateError, match=f"row 0: the field 'question': its text .*{reason}"):
            world_samples(folder)


@pytest.mark.parametrize(
    ("held", "reason"),
    [
        ({"image": "0.png", "question": "a", "answer": "b"}, r"has no conversations, but image, question, answer; a sample is \{\"id\""),
        ({"messages": []}, "has no conversations, but messages"),
        ({}, "has no conversations; a sample is"),
    ],
)
def test_training_rows_of_another_kind_say_what_a_sample_is(folder: Path, held: dict[str, Any], reason: str) -> None:
    (folder / "a.json").write_text(json.dumps([held]))
    data = Conversations.open(folder / "a.json", folder / "images")
    with pytest.raises(FoveateError, match=f"row 0: {reason}"):
        refuse_or_skip(data, bad(data), "stop", None)


@pytest.mark.parametrize("name", ["nowhere", "no/where", "nowhere.json", "nowhere.parquet", "/no/where", "~/nowhere-at-all"])
def test_data_that_is_not_there(name: str) -> None:
    specs: tuple[dict[str, Any], ...] = ({"conversations": Path(name)}, {"dataset": name})
    for spec in specs:
        with pytest.raises(FoveateError, match=r"there is no file or folder /|No such file as /"):
            Conversations.open(**spec)
