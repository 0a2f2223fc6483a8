"""Rows with clips: read, checked, made batches of, asked and trained on, by a model that is shown frames as pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from foveate.data.checked import Checked
from foveate.data.collate import Collator, Fit
from foveate.data.conversations import Conversations, find_bad, refuse_or_skip
from foveate.data.footage import CLIP, Footage, Still, framed, opened, placed, standing
from foveate.errors import FoveateError
from foveate.evaluation.asking import Asked, Put
from foveate.evaluation.bench import bench
from foveate.evaluation.evaluate import evaluate
from foveate.evaluation.tasks import load_task
from foveate.inference import load_model
from foveate.inspect.profile import profile
from foveate.train.run import main as train
from foveate.world.films import write_films
from tests.data.films import folder, frame, gif, number_of, sound


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clip of 12 frames, one of 3, a folder of 5, a picture, and what is no clip."""
    where = tmp_path_factory.mktemp("films")
    gif(where / "long.gif", [100] * 12)
    gif(where / "short.gif", [100] * 3)
    folder(where / "shots", 5)
    frame(9).save(where / "a.png")
    (where / "empty").mkdir()
    (where / "torn.gif").write_bytes((where / "long.gif").read_bytes()[:60])
    return where


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three clips to train on and two to ask about."""
    where = tmp_path_factory.mktemp("world") / "moving"
    write_films(where, 3, 2, seed=1, size=32, frames=12, kind="frames", progress=False, processes=1)
    return where


def row(name: str, asked: str, answer: str = "a cat", **shown: Any) -> dict[str, Any]:
    return {"id": name, **shown, "conversations": [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]}


def conversations(path: Path, where: Path, rows: list[dict[str, Any]], **options: Any) -> Conversations:
    path.write_text(json.dumps(rows))
    return Conversations.open(path, where, **options)


# ---- what a row shows


GOOD = [
    row("one", "<video>\nWhat?", video="long.gif"),
    row("llava", "<image>\nWhat?", video="short.gif"),  # as LLaVA-Video's data have it
    row("listed", "<video> or <video>?", videos=["short.gif", {"path": "shots"}]),
    row("both", "<image> in <video>?", image="a.png", video="short.gif"),
    row("text", "what does <video> do in HTML?"),
    row("none", "What?", video=None),
]
NUMBERS: list[tuple[list[int], int]] = [
    ([0, 2, 3, 5, 6, 8, 9, 11], 1),
    ([0, 1, 2], 1),
    ([0, 1, 2, 0, 1, 2, 3, 4], 2),
    ([9, 0, 1, 2], 2),
    ([], 0),
    ([], 0),
]
"""Frames, pictures among them, in their order, and how many clips and pictures there are."""


def test_frames_are_pictures_to_a_model_without_videos(films: Path, tmp_path: Path) -> None:
    data = conversations(tmp_path / "a.json", films, GOOD)
    assert find_bad(data.source, None) == []
    for number, (wanted, _) in enumerate(NUMBERS):
        sample = data[number]
        assert [number_of(image) for image in sample.images] == wanted
        assert not sample.clips
        assert sample.turns[0][1].count("<image>") == len(wanted)
        assert CLIP not in sample.turns[0][1]
    assert data[0].turns[0][1] == "\n".join(["<image>"] * 8 + ["What?"])
    assert data[3].turns[0][1] == "<image> in <image>\n<image>\n<image>?"
    assert data[4].turns[0][1] == "what does <video> do in HTML?"


def test_clips_stay_clips_to_a_model_with_videos(films: Path, tmp_path: Path) -> None:
    data = conversations(tmp_path / "a.json", films, GOOD, frames="uniform:frames=4", films=True)
    assert find_bad(data.source, None) == []
    assert [[len(clip) for clip in data[number].clips] for number in range(len(GOOD))] == [[4], [3], [3, 4], [3], [], []]
    assert data[3].turns[0][1] == f"<image> in {CLIP}?"
    assert data[1].turns[0][1] == f"{CLIP}\nWhat?"
    assert "<video>" in data[4].turns[0][1]


def test_markers() -> None:
    assert standing(["<image>"], 0, 1) == "<image>"
    assert standing(["<image>"], 1, 1) == standing(["<image> <video>"], 0, 1) == standing(["what?"], 0, 1) == "<video>"
    assert standing(["<video>"], 0, 0) == ""
    assert placed("<video> <video>", "") == "<video> <video>"
    turns, shown = framed([("system", CLIP), ("user", f"<image>{CLIP}"), ("assistant", "<image>")], [7], [[1, 2]])
    assert (turns[1], shown) == (("user", "<image><image>\n<image>"), [7, 1, 2])
    assert (turns[0][1], turns[2][1]) == (CLIP, "<image>")


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (row("bad", "<video>", video="gone.gif"), r"\(gone.gif\): clip is missing: there is no"),
        (row("bad", "<video>", video="empty"), r"\(empty\): clip has no frames"),
        (row("bad", "<video>", video="torn.gif"), r"\(torn.gif\): clip cannot be decoded"),
        (row("bad", "<video>", video="sound.mp4"), r"\(sound.mp4\): clip holds sound and no pictures"),
        (row("bad", "<video> <video>", video="long.gif"), "has 1 clip but 2 <video> markers"),
        (row("bad", "<video>\nWhat?", "<video>", video="long.gif"), "<video> stands outside of the human turns"),
    ],
)
def test_bad_clips_are_one_error_or_counted(given: dict[str, Any], reason: str, films: Path, tmp_path: Path, caplog: Any) -> None:
    if "sound" in str(given):
        sound(films / "sound.mp4")
    data = conversations(tmp_path / "a.json", films, [*GOOD, given])
    found = find_bad(data.source, None)
    with pytest.raises(FoveateError, match=rf"1 of 7 samples cannot be trained on.*\n  bad.*{reason}"):
        refuse_or_skip(data, found, "stop", tmp_path / "report.txt")
    refuse_or_skip(data, found, "skip", tmp_path / "report.txt")
    assert "1 of 7" in caplog.text
    assert len(data) == 6


def test_a_clip_longer_than_the_context_is_said(films: Path, tmp_path: Path) -> None:
    _, processor = load_model("asset:vlm", "cpu")
    data = conversations(tmp_path / "a.json", films, GOOD[:2])
    fits = Fit(Collator(processor, 300).renderer, processor.plan_image, 300)
    (bad,) = find_bad(data.source, None, fits=fits)
    assert bad.id == "one"
    assert "8 x 64 of them visual; cutting it to max_length 300 would cut an image" in bad.reason


def test_what_was_checked_is_not_decoded_again(films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long, few = Footage(films / "long.gif"), Footage(films / "long.gif", "uniform:frames=2")
    checked = Checked(tmp_path / "known.tsv")
    assert (checked.shape(long), checked.shape(few), checked.size(films / "a.png")) == ((8, 32, 32), (2, 32, 32), (32, 32))
    checked.save()
    again = Checked(tmp_path / "known.tsv")
    monkeypatch.setattr("foveate.data.checked._shape", lambda clip: pytest.fail("decoded"))
    assert (again.shape(long), again.shape(few)) == ((8, 32, 32), (2, 32, 32))
    assert again.size(films / "a.png") == (32, 32)


def test_of_a_clip_each_frame_is_held_once(films: Path) -> None:
    clip = Footage(films / "long.gif", "uniform:frames=3")
    assert len(clip) == 3
    shown = opened([films / "a.png", *(Still(clip, number) for number in (2, 0))])
    assert [number_of(image) for image in shown] == [9, 10, 1]


def test_ragged_clips_share_a_batch(films: Path, tmp_path: Path) -> None:
    model, processor = load_model("asset:vlm", "cpu")
    data = conversations(tmp_path / "a.json", films, GOOD)
    collator = Collator(processor, 2048)
    batch = collator([data[number] for number in range(len(GOOD))])
    each = [len(wanted) for wanted, _ in NUMBERS]
    assert batch["pixel_values"].shape[0] == sum(each)
    assert (batch["input_ids"] == model.config.image_token_id).sum(1).tolist() == [64 * count for count in each]
    alone = [collator([data[number]]) for number in (0, 2)]
    for number, one in zip((0, 2), alone, strict=True):
        n = one["input_ids"].shape[1]
        assert torch.equal(batch["input_ids"][number, :n], one["input_ids"][0])
        assert torch.equal(batch["labels"][number, :n], one["labels"][0])
    start = sum(each[:2])
    assert torch.equal(batch["pixel_values"][start : start + each[2]], alone[1]["pixel_values"])


# ---- asked


def test_a_world_of_clips_is_a_task(world: Path) -> None:
    task = load_task(str(world), progress=False)
    assert {sample.group for sample in task.samples} >= {"event", "reading", "tally"}
    assert len({sample.clips for sample in task.samples}) == 2
    assert load_task(f"{world}:frames=uniform:frames=2", progress=False).hash != task.hash
    assert load_task(f"{world}:families=event/order", progress=False).samples[0].group in ("event", "order")
    rate = load_task(f"{world}:frames=rate:fps=2:most=3", progress=False).samples[0].clips[0]
    assert (rate.rule, len(rate)) == ("rate:fps=2,most=3", 3)
    with pytest.raises(FoveateError, match="did you mean 'uniform'"):
        load_task(f"{world}:frames=unifrom", progress=False)
    (world / "clips" / "test" / "000001").rename(world / "away")
    try:
        with pytest.raises(FoveateError, match=r"1 video\(s\) are missing in .*clips, the first is test/000001"):
            load_task(str(world), progress=False)
    finally:
        (world / "away").rename(world / "clips" / "test" / "000001")


def test_questions_about_clips(films: Path, tmp_path: Path) -> None:
    _, processor = load_model("asset:vlm", "cpu")
    asked = [
        {"video": "long.gif", "question": "what?", "answer": "x"},
        {"video": "short.gif", "question": "in <video>\nwhat?", "answer": "x"},
        {"image": "a.png", "video": "short.gif", "question": "which?", "answer": "x"},
        {"image": "a.png", "question": "what?", "answer": "x"},
        row("talk", "<video>\nWhat?", video="shots"),
    ]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(asked))
    task = load_task(f"{path}:metric=exact,images={films},frames=uniform:frames=2,id=row", progress=False)
    puts = [Put.of(processor, sample) for sample in task.samples]
    assert [put.question for put in puts] == [
        "<image>\n<image>\nwhat?",
        "in <image>\n<image>\nwhat?",
        "<image>\n<image>\n<image>\nwhich?",
        "<image>\nwhat?",
        "<image>\n<image>\nWhat?",
    ]
    assert [number_of(image) for image in opened(puts[2].images)] == [9, 0, 2]
    whole = Asked.of(processor, task, 8)
    assert sorted(number for batch in whole.batches for number in batch) == list(range(5))
    path.write_text(json.dumps([{"image": "a.png", "video": "short.gif", "question": "<image> what?", "answer": "x"}]))
    with pytest.raises(FoveateError, match="has 1 images and 1 clips but 1 <image> markers and 0 <video> markers"):
        load_task(f"{path}:metric=exact,images={films}", progress=False)


def test_a_model_answers_about_clips(world: Path, tmp_path: Path) -> None:
    model, processor = load_model("asset:vlm", "cpu")
    result = evaluate(model, world, processor=processor, limit=6, progress=False, frames="uniform:frames=3")
    assert result.visual_tokens == 3 * 64
    assert {row.image for row in result.rows} <= {"test/000000", "test/000001"}
    methods = ["evs:scope=sample", "fewerframes:scope=sample", "dycoke:scope=sample"]
    found = bench(
        model, [f"{world}:limit=4,frames=uniform:frames=4"], methods, [0.5], tmp_path / "run", processor=processor, seeds=1, blind=True,
        progress=False,
    )  # fmt: skip
    cells = {cell.method: cell for cell in found.cells}
    assert not [cell.refused for cell in found.cells if cell.refused]
    assert cells["none"].visual_tokens == cells["blind"].visual_tokens == [256.0] * 6
    for method in ("evs:scope=sample", "fewerframes:scope=sample", "uniform"):
        assert cells[method].visual_tokens == [128.0] * 6
    assert cells["downsample"].visual_tokens[0] < 256
    assert {answer.image for answer in cells["none"].answers} <= {str(world / "clips" / f"test/00000{n}") for n in (0, 1)}


def test_a_prompt_about_a_clip_is_profiled(films: Path) -> None:
    model, processor = load_model("asset:vlm", "cpu")
    how: dict[str, Any] = {"new_tokens": 2, "repeats": 1, "frames": "uniform:frames=3"}
    film, methods = str(films / "long.gif"), ["evs:keep=0.5,scope=sample", "downsample:keep=0.25"]
    bare, evs, small = profile(model, processor, methods, [film], "what?", **how)
    assert bare.visual_tokens == bare.predicted_tokens == [192] * 6
    assert evs.visual_tokens == evs.predicted_tokens == [96] * 6
    assert small.visual_tokens == [48] * 6
    with pytest.raises(FoveateError, match="--frames is for one film, and 2 are named"):
        profile(model, processor, [], [film, film], "what?", **how)


def test_strategies_search_pictures_alone(world: Path) -> None:
    with pytest.raises(FoveateError, match=r"searches pictures, and .* asks about clips"):
        evaluate("asset:vlm", world, limit=1, strategy="zoomeye", progress=False)


# ---- trained on

RECIPE = """
name: clips
output: {out}
model: {{checkpoint: "asset:vlm"}}
log_steps: 1
workers: 0
stages:
  - name: moving
    data: {{conversations: {world}/finetune.json, images: {world}/clips, frames: "uniform:frames=3"}}
    train: {{bridge: true, lm: true}}
    steps: 2
    batch_size: 2
    learning_rate: 1.0e-4
    evaluate: {{tasks: "{world}:frames=uniform:frames=3", every: 2, limit: 2}}
"""


def test_a_recipe_trains_on_clips(world: Path, tmp_path: Path, home: None) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(out=tmp_path / "out", world=world))
    final = train(path)
    assert (final / "config.json").is_file()
    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    steps = [line for line in log if "loss" in line]
    assert len(steps) == 2
    assert all(np.isfinite(line["loss"]) for line in steps)
    assert steps[-1]["images"] == 4 * 3
    with pytest.raises(FoveateError, match="shows a clip, and only of pictures features are kept: leave `features` out"):
        train(path, [f"output={tmp_path / 'other'}", f"stages.0.features={{cache: {tmp_path / 'features'}, at_most: 1GB}}"])
    with pytest.raises(FoveateError, match=r"frames: 'unifrom': unknown sampling 'unifrom' \(did you mean 'uniform'\?\)"):
        train(path, ["stages.0.data.frames=unifrom"])
