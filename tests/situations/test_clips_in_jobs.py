"""Batch jobs about clips: as an evaluation asks them, whatever else stands in the file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from foveate.batch import Job, answering, encode, generate
from foveate.batch.answering import Attached
from foveate.data import chat
from foveate.errors import FoveateError
from foveate.evaluation.evaluate import evaluate
from foveate.inference import Answers
from foveate.world.films import write_films
from tests.data.films import frame, gif

MODEL, FRAMES, NEW = "asset:vlm", "uniform:frames=3", 8


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten questions about two clips, of which the file has the folder `clips` beside it."""
    where = tmp_path_factory.mktemp("world") / "moving"
    write_films(where, 0, 2, seed=1, size=32, frames=12, kind="frames", progress=False, processes=1)
    rows = json.loads((where / "test.json").read_text())[:10]
    (where / "test.json").write_text(json.dumps(rows))
    return where


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows about clips of two lengths, a picture, both, nothing, and clips that are not there or not asked about."""
    where = tmp_path_factory.mktemp("mixed")
    gif(where / "long.gif", [100] * 12)
    gif(where / "short.gif", [100] * 2)
    frame(9).save(where / "a.png")
    rows = [
        {"video": "long.gif", "question": "what?"},
        {"video": "short.gif", "question": "in <video>\nwhat?"},
        {"image": "a.png", "video": "short.gif", "question": "which?"},
        {"image": "a.png", "question": "what?"},
        {"question": "what?"},
        {"video": "none.mp4", "question": "what?"},
        {"image": "a.png", "video": "short.gif", "question": "<image> which?"},
        {"video": "long.gif", "conversations": [{"from": "human", "value": "<video>\nwhat?"}, {"from": "gpt", "value": "x"}]},
        {"video": "long.gif", "question": "<video> or <video>?"},
    ]
    (where / "rows.json").write_text(json.dumps(rows))
    return where / "rows.json"


def job(data: Path, **options: Any) -> Job:
    return Job(str(data), **{"model": MODEL, "reducers": "none", "max_new_tokens": NEW, "batch_size": 4, "frames": FRAMES, **options})


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_answers_about_clips_are_those_of_an_evaluation(world: Path, tmp_path: Path) -> None:
    reducers = "evs:scope=sample,keep=0.5"
    found = evaluate(MODEL, world, reducers=reducers, progress=False, frames=FRAMES)
    done = generate(job(world / "test.json", reducers=reducers), tmp_path / "out", progress=False)
    assert done is not None
    assert [(row["id"], row["answer"]) for row in lines(done.path)] == [(row.id, row.prediction) for row in found.rows]
    with pytest.raises(FoveateError, match="frames"):
        generate(job(world / "test.json", reducers=reducers, frames="uniform:frames=4"), tmp_path / "out", progress=False)


def test_clips_stand_beside_pictures_and_text(mixed: Path, tmp_path: Path) -> None:
    done = generate(job(mixed), tmp_path / "out", progress=False)
    assert done is not None
    wrong = {5: "none.mp4", 6: "has 1 clips but 0 <video> markers", 8: "has 1 clips but 2 <video> markers"}
    rows = lines(done.path)
    assert [number for number, row in enumerate(rows) if "error" in row] == list(wrong)
    assert all(reason in rows[number]["error"] for number, reason in wrong.items())
    assert rows[0]["answer"] == rows[7]["answer"]


def test_a_model_with_videos_is_given_clips(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, list[int]]] = []

    def ask(model: Any, processor: Any, images: Sequence[Any], owners: Any, texts: Sequence[str], new: int, clips: Any) -> Answers:
        asked.append((len(images), [len(clip.frames) for own in clips for clip in own]))
        return Answers(list(texts), [], [], [False] * len(texts))

    for place in (answering, chat):
        monkeypatch.setattr(place, "takes_videos", lambda processor: True)
    monkeypatch.setattr(answering, "ask", ask)
    answers = [json.loads(line) for line in Attached(job(mixed), "cpu")(range(5)).splitlines()]
    assert asked == [(0, [3]), (0, [2]), (1, [2]), (1, []), (0, [])]
    assert ["<video>" in row["answer"] for row in answers] == [True, True, True, False, False]
    monkeypatch.setattr(Attached, "films", False)  # as of an engine that is given no clips
    told = [json.loads(line) for line in Attached(job(mixed), "cpu")(range(4)).splitlines()]
    assert ["only the engine transformers shows" in row.get("error", "") for row in told] == [True, True, True, False]


def test_embeddings_are_of_pictures(mixed: Path, tmp_path: Path) -> None:
    done = encode(job(mixed, reducers="divprune:keep=0.25"), tmp_path / "out", progress=False)
    assert done is not None
    reasons = dict(done.failed)
    assert all("embeddings are written of pictures" in reasons[f"row {number}"] for number in (0, 1, 2, 7))
    assert list(reasons) == [f"row {number}" for number in (0, 1, 2, 5, 6, 7, 8)]


def test_frames_of_jobs_are_a_sampling() -> None:
    with pytest.raises(FoveateError, match="did you mean 'uniform'"):
        job(Path("rows.json"), frames="unifrom:frames=3")
