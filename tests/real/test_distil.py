"""A ViT distilled from towers of convolutions: views, targets, the loss, and a training that goes on where it was."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoModel, LlamaConfig

import foveate
from foveate.errors import FoveateError
from foveate.model import FoveateConfig, FoveateForConditionalGeneration
from foveate.real import distil as module
from foveate.real import packages, real
from foveate.real.distil import SIDE, Run, Settings, Student, Teachers, distil, files_of, loss, spread, view, views
from tests.command import refused
from tests.real.towers import LITE, lcnet, lite

STAGES = [*LITE["stages"], [1, 3, 2, 2, 8]]  # type: ignore[misc]
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def teachers() -> Teachers:
    """As the real ones, in little: levels of 8, 16 and 32 pixels a cell, and four narrow cells a patch."""
    return Teachers(lite(stages=STAGES, levels=[8, 16, 32], patch_size=32, hidden_size=128), lcnet())


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A small student, a cache of its own, and a folder of pictures."""
    monkeypatch.setattr(module, "STUDENT", module.STUDENT | SMALL)
    monkeypatch.setattr(module, "MEASURED", 2)
    monkeypatch.setattr(packages, "HF_HOME", str(tmp_path / "home"))
    rng = np.random.default_rng(0)
    for number in range(6):
        path = tmp_path / "pictures" / ("train" if number % 2 else ".") / f"{number}.{'jpg' if number < 3 else 'png'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        cells = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
        Image.fromarray(cells).resize((160, 128), Image.Resampling.NEAREST).save(path)
    (tmp_path / "pictures" / "notes.txt").write_text("no picture")
    return tmp_path


def train(small: Path, steps: int = 4, work: str = "work", **options: Any) -> Path:
    given: dict[str, Any] = {"batch": 2, "seed": 0, "teachers": teachers(), "every": 1, "progress": False}
    return distil(small / "pictures", steps=steps, work=small / work, **given | options)


# ---- views


@settings(max_examples=60)
@given(st.integers(3, 90), st.integers(3, 90), st.integers(0, 2**20))
def test_a_view_is_a_part_of_the_picture(width: int, height: int, seed: int) -> None:
    """Of a picture whose colours say where they are: the view's go from left to right and from top to bottom, and lie in it."""
    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    image = Image.fromarray(np.stack([across, down, 0 * down], -1).astype(np.uint8))
    found = np.asarray(view(image, random.Random(seed))).astype(int)
    assert found.shape == (SIDE, SIDE, 3)
    assert found[100, -1, 0] >= found[100, 0, 0]
    assert found[-1, 100, 1] >= found[0, 100, 1]
    shown = (found[100, -1, 0] - found[100, 0, 0] + 255 / width) * (found[-1, 100, 1] - found[0, 100, 1] + 255 / height) / 255**2
    assert shown > 1 / 30


def test_views_are_those_of_their_step(small: Path) -> None:
    files, given = files_of(small / "pictures"), Settings(10, 3, 7, "")
    assert [path.name for path in files] == ["0.jpg", "2.jpg", "4.png", "1.jpg", "3.png", "5.png"]
    one = views(files, given, 5)
    assert one.shape == (3, 3, SIDE, SIDE)
    assert 0 <= float(one.min()) < float(one.max()) <= 1
    assert torch.equal(views(files, given, 5), one)
    assert not torch.equal(views(files, given, 6), one)
    assert not torch.equal(views(files, Settings(10, 3, 8, ""), 5), one)


def test_a_folder_without_pictures_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(["real", "tower", "--pictures", str(tmp_path / "none")], capsys)
    assert f"there are no pictures in {tmp_path / 'none'}; make some with photographs among them: foveate data real" in said


# ---- what is learnt


def test_teachers_say_what_their_towers_say() -> None:
    both, pixels = teachers(), torch.rand(2, 3, SIDE, SIDE)
    found = both(pixels)
    assert {name: tuple(x.shape) for name, x in found.items()} == {
        "detail": (2, 196, 8),
        "letters": (2, 196, 128),
        "things": (2, 49, 128),
        "whole": (2, 1, 128),
    }
    with torch.no_grad():
        levels = both.efficientnet((pixels - 127 / 255) / (128 / 255)).hidden_states
        letters = both.ppocr(2 * pixels - 1).last_hidden_state
    near: dict[str, Any] = {"rtol": 1e-3, "atol": 1e-4}  # another order of the sums
    torch.testing.assert_close(found["things"], levels[-1], **near)
    torch.testing.assert_close(found["whole"][:, 0], levels[-1].mean(1), **near)
    torch.testing.assert_close(found["letters"], letters, **near)
    # A token of 32 pixels has the four cells of 16 side by side.
    cells = levels[1][..., : 4 * 8].view(2, 7, 7, 2, 2, 8).permute(0, 1, 3, 2, 4, 5).reshape(2, 196, 8)
    torch.testing.assert_close(found["detail"], cells, **near)


def test_a_student_answers_where_the_teachers_ask(small: Path) -> None:
    student = Student({"detail": 8, "letters": 128, "things": 128, "whole": 128}).eval()
    pixels = torch.rand(2, 3, SIDE, SIDE)
    said = student(pixels)
    assert {name: tuple(x.shape) for name, x in said.items()} == {name: tuple(x.shape) for name, x in teachers()(pixels).items()}
    states = student.vit(pixel_values=2 * pixels - 1).last_hidden_state
    for row in range(2):
        torch.testing.assert_close(said["whole"][row, 0], student.readers["whole"](states[row, 0]), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(said["detail"][row, 17], student.readers["detail"](states[row, 18]), rtol=1e-4, atol=1e-4)
        four = torch.stack([states[row, 1 + y * 14 + x] for y in (2, 3) for x in (4, 5)]).mean(0)
        torch.testing.assert_close(said["things"][row, 1 * 7 + 2], student.readers["things"](four), rtol=1e-4, atol=1e-4)


def test_the_student_has_the_size_that_is_told() -> None:
    with torch.device("meta"):
        weights = sum(p.numel() for p in AutoModel.from_config(Student({"whole": 1}).vit.config).parameters())
    assert round(weights / 1e5) == 55


def test_the_loss_is_its_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    said = {name: torch.randn(2, 3, 4, generator=generator) for name in "ab"}
    right = {name: 5 + 3 * torch.randn(2, 3, 4, generator=generator) for name in "ab"}
    right["a"][..., 2] = 7  # never moves
    known = spread(iter([{name: x[:1] for name, x in right.items()}, {name: x[1:] for name, x in right.items()}]))
    expected = 0.0
    for name in "ab":
        rows = right[name].reshape(6, 4).double().numpy()
        deviation = rows.std(0, ddof=1)
        plain = (rows - rows.mean(0)) / np.where(deviation > 1e-6, deviation, 1)
        for one, other in zip(said[name].reshape(6, 4).double().numpy(), plain, strict=True):
            expected += (1 - one @ other / math.sqrt(one @ one) / math.sqrt(other @ other)) / 6
    assert float(loss(said, right, known)) == pytest.approx(expected, rel=1e-4)


# ---- the run


def weights(folder: Path) -> dict[str, Tensor]:
    return dict(AutoModel.from_pretrained(folder).state_dict())


def test_a_run_that_goes_on_is_the_run(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = weights(train(small, work="whole"))
    step = Run.step

    def stops(self: Run, *given: Any) -> float:
        if self.done == 2:
            raise KeyboardInterrupt
        return step(self, *given)

    with monkeypatch.context() as patched:
        patched.setattr(Run, "step", stops)
        with pytest.raises(KeyboardInterrupt):
            train(small, work="again")
    (small / "work").mkdir()
    (small / "again" / "state.half").write_text("of a kill")
    again = weights(train(small, work="again"))
    assert whole.keys() == again.keys()
    assert all(torch.equal(again[name], weight) for name, weight in whole.items())
    fresh = weights(train(small, work="other", seed=1))
    assert not all(torch.equal(fresh[name], weight) for name, weight in whole.items())


def test_other_settings_are_told(small: Path) -> None:
    train(small, 2)
    changed: list[tuple[dict[str, Any], str]] = [({"steps": 3}, "steps 2, now 3"), ({"steps": 2, "seed": 4}, "seed 0, now 4")]
    for options, message in changed:
        with pytest.raises(FoveateError, match=f"holds a training that was begun with {message}; name another --work"):
            train(small, **options)
    Image.new("RGB", (20, 20)).save(small / "pictures" / "new.png")
    with pytest.raises(FoveateError, match="begun with pictures"):
        train(small, 2)
    with pytest.raises(FoveateError, match="at least one step of two views"):
        train(small, 0)


def test_it_learns(small: Path) -> None:
    run = Run(Student({"detail": 8, "letters": 128, "things": 128, "whole": 128}), Settings(30, 4, 0, ""), small)
    both, files = teachers(), files_of(small / "pictures")
    pixels = views(files, run.settings, 0)
    right = both(pixels)
    run.known = spread(iter([right]))
    losses = [run.step(pixels, right) for _ in range(30)]
    assert losses[0] > 3.5  # four times about 1, where nothing is known
    assert losses[-1] < 0.85 * losses[0]


def test_what_is_kept_is_a_tower_whose_attention_is_read(small: Path) -> None:
    folder = train(small, 1)
    assert folder == real("vit")
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    assert (processor.size["height"], list(processor.image_mean)) == (SIDE, [0.5] * 3)
    assert "1 steps of 2 views of 6 pictures by `foveate real tower`" in (folder / "README.md").read_text()
    tower = AutoModel.from_pretrained(folder)
    text = LlamaConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=99, eos_token_id=None)
    config = FoveateConfig(
        vision_config=tower.config, text_config=text, bridge={"kind": "mlp"}, vision_feature_layer=[-1], image_token_id=90
    )
    model = FoveateForConditionalGeneration(config, vision_tower=tower).eval()
    inputs = {"input_ids": torch.tensor([[5, *[90] * 196, 7]]), "pixel_values": torch.randn(1, 3, SIDE, SIDE)}
    for method in ("fastervlm:keep=0.25", "hired:keep=0.5"):
        with foveate.attach(model, method) as run, torch.no_grad():
            model(**inputs)
        assert run.last.visual_tokens[0] < 196
