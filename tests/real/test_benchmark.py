"""The benchmarks on real pictures: samples of the pre-training's arms, answers as an evaluation, the table of a model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from benchmarks.pretraining import sets
from benchmarks.real.run import table
from benchmarks.real.tasks import Asked, asked, result

from foveate.data.boxes import boxes_of
from foveate.data.conversations import check_row
from foveate.evaluation.cells import Answer, Bench, Cell
from foveate.evaluation.tasks import load_task
from foveate.real.write import write_real
from foveate.report.pretraining import record
from foveate.report.runs import Arm
from tests.real.little_stock import little_stock

SCENES, TEST = 45, 6


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, stock = tmp_path_factory.mktemp("real"), little_stock(tmp_path_factory.mktemp("stock"), ("fluent", "noto"))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sets, "open_stock", lambda: stock)
        patched.setattr(
            sets, "write_real", lambda out, stock, train, test: write_real(out, stock, train, test, progress=False, processes=1)
        )
        for _ in range(2):  # the second time all is there
            sets.write_pictures(folder / "data", SCENES, TEST)
    return folder / "data"


def read(data: Path, name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((data / "arms" / f"{name}.json").read_text())
    return rows


def test_samples_of_the_arms(data: Path) -> None:
    captions, scenes, questions, tuning = (read(data, name) for name in ("captions", "scenes", "questions", "tuning"))
    for row in (*captions, *scenes, *questions, *tuning):
        assert not check_row(row, 1)
        assert (data / "images" / row["image"]).is_file()
        assert len(row["conversations"]) <= 2 * sets.TURNS
    before = {row["image"] for rows in (captions, scenes, questions) for row in rows}
    assert not before & {row["image"] for row in tuning}
    assert len(before) == SCENES
    assert len({row["image"] for row in tuning}) == round(SCENES * 0.2 / 3) == 3
    assert 2 * len(captions) in (SCENES, SCENES + 1)
    assert len(tuning) / (len(captions) + len(questions)) == pytest.approx(0.1, abs=0.03)
    assert {row["image"] for row in scenes} == {row["image"] for row in captions if row["image"].endswith(".jpg")}
    assert all(boxes_of(row, 1) for row in scenes)
    assert not any("boxes" in row for row in captions)
    assert {Path(row["image"]).suffix for row in tuning} == {".jpg", ".png"}


def test_files_of_questions_are_tasks(data: Path) -> None:
    files = asked(data, ["compositions"])
    assert [one.family for one in files] == [
        "naming",
        "relation",
        "presence",
        "counting",
        "locating",
        "boxes",
        "reading",
        "documents",
        "charts",
    ]
    assert {one.split for one in asked(data)} > {"compositions", "style"}
    for one in files:
        task = load_task(one.task, progress=False)
        assert task.name == one.name
        assert len(task.samples) == len(json.loads(one.file.read_text()))


def answered(one: Asked, scores: list[float], method: str = "none") -> Cell:
    rows = json.loads(one.file.read_text())
    answers = [Answer(row["id"], row["image"], "scene", "said", score) for row, score in zip(rows, scores, strict=True)]
    arm = {"method": method, "keep": 1.0, "seed": None, "reducer": "none"}
    return Cell(one.name, **arm, answers=answers, visual_tokens=[64.0, 64.0], seconds=2.0, summary={"accuracy": 1.0})  # type: ignore[arg-type]


def bench(data: Path) -> tuple[Bench, list[Asked]]:
    """Of two families: every other question is right, the rest nearly so."""
    files = [one for one in asked(data, ["compositions"]) if one.family in ("naming", "reading")]
    cells = []
    for one in files:
        count = len(json.loads(one.file.read_text()))
        cells += [answered(one, [(0.5, 0.49)[i % 2] for i in range(count)]), answered(one, [0.0] * count, "blind")]
    return Bench(data, {"model": "real:vlm", "dtype": "float32", "environment": "one\ntwo", "tasks": []}, cells), files


def test_answers_become_an_evaluation(data: Path) -> None:
    found, files = bench(data)
    whole = result(found, files, "real:vlm")
    count = sum(len(json.loads(one.file.read_text())) for one in files)
    assert len(whole.rows) == count
    assert whole.visual_tokens == 64
    assert whole.seconds == 4
    told = json.loads((data / "real.json").read_text())["splits"]["compositions"]["questions"]
    for one in files:
        own, family = [row for row in whole.rows if row.family == one.family], whole.families[one.family]
        assert family.correct == sum(row.correct for row in own) == (len(own) + 1) // 2
        assert family.n == told[one.family]["questions"]
        assert (family.majority_answer, family.majority_accuracy) == (told[one.family]["constant"], told[one.family]["right"])
        assert [row.id for row in own] == [row["id"] for row in json.loads(one.file.read_text())]
    log = {"stage": "a", "step": 1, "loss": 1.0, "seconds": 1.0, "flops": 1.0, "tokens_per_image": 64, "images": 1, "reducer": "none"}
    rows = [log | {"visual_tokens_per_layer": [64]}, log | {"visual_tokens_per_layer": [64], "stage": "b", "images": 2}]
    (data.parent / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    kept = record(Arm("mlp", "", data.parent, whole), 0)
    assert kept["right"] == "".join(str(int(row.correct)) for row in whole.rows)


def test_the_table_of_a_model(data: Path) -> None:
    found, files = bench(data)
    lines = table(found, asked(data)).splitlines()
    assert len(lines) == 2 + len(files) + 2
    naming = json.loads((data / "real.json").read_text())["splits"]["compositions"]["questions"]["naming"]
    n, share = naming["questions"], 100 * ((naming["questions"] + 1) // 2) / naming["questions"]
    assert lines[2].startswith(f"| compositions | naming | {n} | {share:.1f} % | ")
    assert f"| 0.0 % | {100 * naming['right']:.1f} % | {naming['constant']} |" in lines[2]
    assert lines[-1] == "`real:vlm`, bare, in float32; one; two."
    bare = replace(found, cells=[cell for cell in found.cells if cell.method == "none"])
    assert " |  | " in table(bare, files).splitlines()[2]
