"""Clips of films go through the processors of models for videos, with the frames that were chosen and their times, and are reduced."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import foveate
from foveate.data.clips import open_clip
from foveate.data.conversations import Conversations, find_bad
from foveate.data.library import LibraryCollator
from foveate.errors import FoveateError
from foveate.evaluation.bench import bench
from foveate.inference import model_inputs
from foveate.train.run import main as train
from tests.conformance.family import families
from tests.data.films import frame, gif

# Frames of a clip of eight, as the model has them: pairs of them, single ones, pictures of their own.
FRAMES = {"qwen2_5_vl:video": 4, "qwen3_vl:video": 4, "llava_onevision:video": 8, "video_llama_3:video": 8, "internvl:video": 1}


@pytest.mark.parametrize("name", FRAMES)
def test_a_clip_is_reduced(name: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    family = families()[name]
    model, processor = family.load(tmp_path_factory.mktemp("checkpoint"))
    clips = [open_clip(gif(tmp_path / f"{n}.gif", [100, 400] * n), "uniform:frames=8") for n in (4, 6)]
    texts = [family.prompt(1, "what is this")] * 2
    inputs = model_inputs(processor, [[], []], texts, [[clip] for clip in clips])
    scope = "sample" if FRAMES[name] == 1 else "image"
    with torch.no_grad(), foveate.attach(model, f"evs:keep=0.3,scope={scope}") as run:
        model(**inputs)
    entered, left = run.last.entered, run.last.layouts[0]
    for image in range(run.last.images):
        frames = entered.place[entered.image == image][:, 2]
        assert len(frames[frames >= 0].unique()) == (FRAMES[name] if FRAMES[name] > 1 else 0)
    for row in range(2):
        first = int(entered.visual[row].sum()) // (FRAMES[name] if FRAMES[name] > 1 else 8)
        assert first <= int(left.visual[row].sum()) < int(entered.visual[row].sum())


def test_times_of_frames_stand_in_the_prompt(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Qwen3-VL writes the middle of each pair's times, in seconds, in front of it."""
    family = families()["qwen3_vl:video"]
    _, processor = family.load(tmp_path_factory.mktemp("checkpoint"))
    clip = open_clip(gif(tmp_path / "a.gif", [1000, 3000, 1000, 1000]))
    assert clip.times == (0.0, 1.0, 4.0, 5.0)
    inputs = model_inputs(processor, [[]], [family.prompt(1, "what")], [[clip]])
    assert inputs["input_ids"].shape[0] == 1
    written = processor._calculate_timestamps(clip.metadata["frames_indices"], clip.metadata["fps"], 2)
    assert written == pytest.approx([0.5, 4.5])


# ---- conversations with clips

TEMPLATE = (
    "{% for m in messages %}{{ 'which ' if m.role == 'user' else 'one ' }}{% for part in m.content %}"
    "{% if part.type == 'image' %}{{ 'IMAGE ' }}{% elif part.type == 'video' %}{{ 'CLIP ' }}{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% else %}{{ ' ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'one ' }}{% endif %}"
)
LIBRARY = ("qwen2_vl", "llava_onevision", "internvl")


def opened(name: str, folder: Path) -> tuple[Any, Any]:
    """A tiny model and its processor, with a template for pictures and clips."""
    image, video = (families()[f"{name}{kind}"] for kind in ("", ":video"))
    model, processor = video.load(folder)
    template = TEMPLATE.replace("IMAGE", image.prompt(1, "").strip()).replace("CLIP", video.prompt(1, "").strip())
    processor.chat_template = template
    processor.save_pretrained(folder)
    return model, processor


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("films")
    for name, count in (("a", 8), ("b", 8), ("short", 4)):
        gif(where / f"{name}.gif", [100] * count)
    frame(3).save(where / "p.png")
    return where


def row(name: str, asked: str, **shown: str) -> dict[str, Any]:
    said = [{"from": "human", "value": asked}, {"from": "gpt", "value": "a red cat"}]
    return {"id": name, **shown, "conversations": said}


ROWS = [
    row("clip", "<video>\nwhat is this", video="a.gif"),
    row("text", "tell me"),
    row("picture", "<image>\nwhat", image="p.png"),
    row("other", "<video>\nwhich", video="b.gif"),
    row("short", "<video>\nwhat", video="short.gif"),
]


@pytest.mark.parametrize("name", LIBRARY)
def test_conversations_with_clips_are_the_processors_own(name: str, films: Path, tmp_path: Path) -> None:
    _, processor = opened(name, tmp_path)
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    collator = LibraryCollator(processor, 4096)
    data = Conversations.open(tmp_path / "rows.json", films, frames="uniform:frames=8", films=collator.renderer.videos)
    assert find_bad(data.source, None) == []
    samples = [data[number] for number in range(4)]
    batch = collator(samples)
    words = processor.tokenizer
    for number, sample in enumerate(samples):
        text = collator.renderer.render(sample.turns)[0]
        own: Any = (
            model_inputs(processor, [list(sample.images)], [text], [list(sample.clips)])
            if sample.images or sample.clips
            else words([text], return_tensors="pt")
        )
        length = own["input_ids"].shape[1]
        assert batch["input_ids"][number, :length].tolist() == own["input_ids"][0].tolist()
        labels = batch["labels"][number]
        assert words.decode(labels[labels >= 0]) == "a red cat </s>"
        assert len(sample.plans) == len(sample.images) + len(sample.clips)
    together = model_inputs(
        processor, [[], []], [collator.renderer.render(samples[i].turns)[0] for i in (0, 3)], [samples[i].clips for i in (0, 3)]
    )
    if "pixel_values_videos" in batch:
        assert torch.equal(batch["pixel_values_videos"], together["pixel_values_videos"])
    visual = [sum(plan.tokens for plan in sample.plans) for sample in samples]
    assert visual[0] == visual[3] > 8
    assert visual[2] > visual[1] == 0


@pytest.mark.parametrize("name", LIBRARY)
def test_clips_of_several_lengths_share_a_batch_or_say_so(name: str, films: Path, tmp_path: Path) -> None:
    _, processor = opened(name, tmp_path)
    (tmp_path / "rows.json").write_text(json.dumps([ROWS[0], ROWS[4]]))
    data = Conversations.open(tmp_path / "rows.json", films, frames="uniform:frames=8", films=True)
    samples, collator = [data[0], data[1]], LibraryCollator(processor, 4096)
    if name != "qwen2_vl":  # their processors stack clips
        with pytest.raises(
            FoveateError, match=r"sample clip, short: .* does not take clips of 4, 8 frames in one batch; set micro_batch: 1"
        ):
            collator(samples)
        return
    batch = collator(samples)
    assert batch["attention_mask"].sum(1)[0] > batch["attention_mask"].sum(1)[1]


RECIPE = """
name: clips
output: {root}/out
model: {{checkpoint: "{root}/model"}}
log_steps: 1
workers: 0
stages:
  - name: moving
    data: {{conversations: {root}/rows.json, images: {films}, frames: "uniform:frames=8"}}
    train: {{bridge: true, lm: true}}
    steps: 2
    batch_size: 3
    micro_batch: 1
    learning_rate: 1.0e-3
    max_length: {most}
    reducers: [{{share: 1, reducer: "evs:keep=0.5"}}]
"""


def test_a_model_of_the_library_trains_on_clips(films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    (tmp_path / "model").mkdir()
    opened("llava_onevision", tmp_path / "model")
    (tmp_path / "rows.json").write_text(json.dumps([ROWS[0], ROWS[3], ROWS[4]]))
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(root=tmp_path, films=films, most=4096))
    train(tmp_path / "recipe.yaml")
    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert sum("loss" in line for line in log) == 2
    with pytest.raises(FoveateError, match=r"sample \w+ has \d+ tokens; cutting it to max_length 20 would cut an image"):
        train(tmp_path / "recipe.yaml", [f"output={tmp_path}/long", "stages.0.max_length=20"])


def test_a_model_with_videos_answers_about_clips(films: Path, tmp_path: Path) -> None:
    model, processor = opened("qwen2_vl", tmp_path)
    asked = [{"video": name, "question": "what is this", "answer": "x"} for name in ("a.gif", "short.gif")]
    (tmp_path / "rows.json").write_text(json.dumps(asked))
    task = f"{tmp_path}/rows.json:metric=exact,images={films},id=row,max_new_tokens=2"
    found = bench(model, [task], ["evs"], [0.5], tmp_path / "run", processor=processor, baselines=False, blind=True, progress=False)
    bare, blind, evs = found.cells
    assert (bare.method, blind.method, evs.refused) == ("none", "blind", "")
    assert bare.visual_tokens == blind.visual_tokens
    assert evs.visual_tokens[0] == bare.visual_tokens[0] / 2
