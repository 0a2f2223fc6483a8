"""`foveate reproduce` on a made-up table, with the real lmms-eval and the shipped model. Needs the environment of `make interop`."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict, Features, Value
from datasets import Image as ImageFeature
from ruamel.yaml import YAML

from foveate.cli import main
from foveate.evaluation.evaluate import evaluate
from foveate.reproduce.harness import Job, command, lmms_eval
from foveate.reproduce.tables import Column, load_table, names
from foveate.world.scenes import write_world
from tests.interop.test_lmms_eval import SCENES, UTILS

pytestmark = pytest.mark.skipif(
    find_spec("lmms_eval") is None, reason="lmms-eval is not installed in this environment; `make interop` builds one that has it"
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a world of four scenes, in `world`, and lmms-eval's task of its questions, in `tasks`."""
    folder = tmp_path_factory.mktemp("reproduce")
    write_world(folder / "world", train=0, test=4, seed=3, progress=False)
    questions = json.loads((folder / "world" / "test.json").read_text())
    images = [{"path": str(folder / "world" / "images" / question["image"])} for question in questions]
    columns = {name: [question[name] for question in questions] for name in ("id", "question", "answer", "family")}
    scenes = Dataset.from_dict({**columns, "image": images}, Features({**dict.fromkeys(columns, Value("string")), "image": ImageFeature()}))
    DatasetDict({"test": scenes}).save_to_disk(folder / "tasks" / "scenes")
    (folder / "tasks" / "scenes.yaml").write_text(SCENES.format(folder=folder / "tasks"))
    (folder / "tasks" / "utils.py").write_text(UTILS)
    return folder


def accuracy(world: Path, reducers: str) -> tuple[float, int]:
    rows = evaluate("asset:vlm", world / "world", reducers=reducers, device="cpu", batch_size=16, progress=False).rows
    return 100 * sum(row.correct for row in rows) / len(rows), len(rows)


def ended(*words: str) -> Any:
    """The exit code of the command."""
    with pytest.raises(SystemExit) as end:
        main(["reproduce", *words])
    return end.value.code


def test_a_table_from_its_file_to_its_report(world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    full, questions = accuracy(world, "none")
    quarter, _ = accuracy(world, "fastv:keep=0.25,layer=2")
    shared = {"metric": ["acc"], "scale": 100, "tolerance": 0.5, "why": "the same questions and the same answers"}
    short = {"task": "foveate_short", "base": "scenes.yaml", "changes": {"generation_kwargs": {"max_new_tokens": 1}}}
    table = {
        "title": "Scenes",
        "paper": "none",
        "where": "made up",
        "model": {"name": "asset:vlm"},
        "dtype": "float32",
        "tasks": "tasks",
        "columns": {"Scenes": {"task": "foveate_scenes", **shared}, "Short": {**short, **shared}},
        "rows": {
            "full": {"reduce": "none", "budget": "64", "tokens": 64, "evidence": "[D]", "paper": {"Scenes": round(full, 1)}},
            "quarter": {
                "reduce": "fastv:keep=0.25,layer=2",
                "budget": "16 from layer 2",
                "tokens": 32,
                "evidence": "[D]",
                "paper": {"Scenes": round(quarter, 1) + 1},
            },
        },
        "average": {"full": "full", "tolerance": 5.0},
    }
    with (world / "scenes.yaml").open("w") as file:
        YAML(typ="safe").dump(table, file)
    words = [str(world / "scenes.yaml"), "--out", str(world / "out"), "--yes", "--batch-size", "16", "--device", "cpu"]

    assert ended(*words, "--only", "full") == 0  # two runs: the task itself, and the changed one
    cells = {path.name: path.stat().st_mtime_ns for path in (world / "out" / "cells").iterdir()}
    assert len(cells) == 2
    assert ended(*words, "--task", "Scenes") == 1  # one run: the other row
    assert {path.name: path.stat().st_mtime_ns for path in (world / "out" / "cells").iterdir()}.items() >= cells.items()
    assert len(list((world / "out" / "cells").iterdir())) == 3

    results = json.loads((world / "out" / "results.json").read_text())
    told = {row: results["rows"][row]["cells"] for row in ("full", "quarter")}
    assert told["full"]["Scenes"]["ours"] == pytest.approx(full, abs=1e-9)
    assert told["quarter"]["Scenes"]["ours"] == pytest.approx(quarter, abs=1e-9)
    assert (told["full"]["Scenes"]["verdict"], told["quarter"]["Scenes"]["verdict"]) == ("within", "outside")
    assert {(cell["questions"], cell["tokens"]) for cell in (told["full"]["Scenes"], told["quarter"]["Scenes"])} == {
        (questions, 64.0),
        (questions, 32.0),
    }
    whole = next(json.loads(path.read_text()) for path in (world / "out" / "cells").glob("full-Short-*.json"))
    assert 0 < whole["metrics"]["acc"] < full / 100  # answers of one token: the change has reached the harness
    page = (world / "out" / "report.html").read_text()
    assert "foveate_scenes" in page
    assert "lmms-eval 0.7" in page
    capsys.readouterr()
    assert ended(*words, "--plan") == 0
    assert "1 runs of lmms-eval to do, 3 finished" in capsys.readouterr().out


def test_the_harness_reason_is_told(world: Path, capfd: pytest.CaptureFixture[str]) -> None:
    column = Column(task="no_such_task", metric=["acc"], tolerance=1, why="")
    with pytest.raises(Exception, match=r"left no result of no_such_task under none: it has no such task"):
        lmms_eval(Job("asset:vlm", "none", column, include=str(world / "tasks")), world / "log", show=False)
    assert capfd.readouterr().err == ""
    assert "no_such_task" in (world / "log").read_text()


def test_every_task_of_the_shipped_tables_is_one_with_its_metrics_and_its_data(tmp_path: Path) -> None:
    from lmms_eval.tasks import TaskManager
    from lmms_eval.utils import load_yaml_config

    index = TaskManager("ERROR").task_index
    columns = {column.task: column for name in names() for column in load_table(name).columns.values()}
    assert len(columns) > 8
    for task, column in columns.items():
        if column.base is None:
            path = index[task]["yaml_path"]
        else:
            words = command(Job("asset:vlm", "none", column), tmp_path / task)
            path = str(Path(words[words.index("--include_path") + 1]) / f"{task}.yaml")
        told = load_yaml_config(path, mode="simple")
        assert told["task"] == task
        assert {metric["metric"] for metric in told["metric_list"]} >= set(column.metric), task
        assert told["dataset_path"] == column.data, task
        assert told["output_type"] == "generate_until", task
    assert told_ocr(tmp_path) is True


def told_ocr(folder: Path) -> Any:
    """Whether the changed TextVQA, as lmms-eval reads it, asks with OCR tokens."""
    from lmms_eval.utils import load_yaml_config

    (path,) = folder.glob("foveate_textvqa_val_ocr/*.yaml")
    return load_yaml_config(str(path), mode="simple")["lmms_eval_specific_kwargs"]["default"]["ocr"]
