"""Clips of films go through the processors of models for videos, with the frames that were chosen and their times, and are reduced."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import foveate
from foveate.data.clips import open_clip
from foveate.inference import model_inputs
from tests.conformance.family import families
from tests.data.films import gif

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
