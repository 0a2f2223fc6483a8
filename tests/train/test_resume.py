"""A run that is interrupted and started again is the run that was never interrupted."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.train.tiny_training import RECIPE

from foveate.errors import FoveateError
from foveate.train import files
from foveate.train.run import main
from foveate.train.trainer import FoveateTrainer

Write = Callable[..., Path]


class Stopped(Exception):
    pass


def stop_after(monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
    """The process dies in front of micro-batch number `calls` of this run."""
    step, done = FoveateTrainer.training_step, 0

    def counting(self: FoveateTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal done
        if done == calls:
            raise Stopped
        done += 1
        return step(self, *args, **kwargs)

    monkeypatch.setattr(FoveateTrainer, "training_step", counting)


def rows(output: Path) -> list[dict[str, object]]:
    """The log without what the clock says."""
    found = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_s")} for row in found]


def assert_same(one: Path, other: Path) -> None:
    a, b = load_file(one / "final/model.safetensors"), load_file(other / "final/model.safetensors")
    assert a.keys() == b.keys()
    assert not [name for name in a if not torch.equal(a[name], b[name])]
    assert rows(one) == rows(other)


@pytest.fixture(scope="module")
def whole(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = root / "whole.yaml"
    path.write_text(RECIPE.format(root=root, output="whole"))
    return main(path).parent


# 12 micro-batches in the first stage (2 a step), 6 in the second, 5 in the third
@pytest.mark.parametrize("stops", [[1], [4], [7, 5, 1], [12], [14], [17, 4], [18], [21, 1]])
def test_same_bits(whole: Path, recipe_file: Write, monkeypatch: pytest.MonkeyPatch, stops: list[int]) -> None:
    recipe = recipe_file("stopped-" + "-".join(map(str, stops)))
    for calls in stops:
        with monkeypatch.context() as patch:
            stop_after(patch, calls)
            with pytest.raises(Stopped):
                main(recipe)
    assert_same(whole, main(recipe).parent)


def test_a_checkpoint_without_its_mark_does_not_count(whole: Path, recipe_file: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_file("unmarked")
    with monkeypatch.context() as patch:
        stop_after(patch, 9)
        with pytest.raises(Stopped):
            main(recipe)
    stage = recipe.parent / "unmarked" / "0-pretrain"
    assert [path.name for path in files.checkpoints(stage)] == ["checkpoint-2", "checkpoint-4"]
    (stage / "checkpoint-4" / files.MARK).unlink()
    (stage / "checkpoint-4" / "optimizer.pt").write_bytes(b"torn")
    assert files.newest(stage) == stage / "checkpoint-2"
    assert_same(whole, main(recipe).parent)
    assert not files.checkpoints(stage)


def test_a_finished_run_is_left_alone(whole: Path, recipe_file: Write) -> None:
    before = (whole / "final/model.safetensors").stat().st_mtime_ns
    log = rows(whole)
    assert main(recipe_file("whole")) == whole / "final"
    assert (whole / "final/model.safetensors").stat().st_mtime_ns == before
    assert rows(whole) == log


def test_another_recipe_is_refused(whole: Path, recipe_file: Write) -> None:
    with pytest.raises(FoveateError, match=r"stages\.1\.learning_rate: 0\.01 before, now 0\.02"):
        main(recipe_file("whole"), ["stages.1.learning_rate=0.02"])
    main(recipe_file("whole"), ["stages.1.save_steps=1", "report_to=[tensorboard]"])  # these change nothing that was computed


def test_other_data_is_refused(recipe_file: Write, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = root / "changed.json"
    changed.write_text((root / "data.json").read_text())
    recipe = recipe_file("other-data")
    override = [f"stages.0.data.conversations={changed}"]
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(Stopped):
            main(recipe, override)
    changed.write_text(json.dumps(json.loads(changed.read_text())[1:]))
    with pytest.raises(FoveateError, match=r"facts\.pretrain\.samples: 24 before, now 23"):
        main(recipe, override)


def test_log_counts(whole: Path) -> None:
    """Steps, images and supervised tokens add up; the reducer is the schedule's."""
    log = rows(whole)
    grow = [row for row in log if row["stage"] == "grow"]
    assert [row["step"] for row in grow] == [1, 2, 4, 6]
    assert [row["reducer"] for row in grow] == ["vcc:layer=1,stride=4", "vcc:layer=1,stride=4", "random:keep=0.5", "none"]
    # (8, 2), (4, 2), (2, 1) on 8 x 8 patches: 2 + 8 + 16 tokens; pooled by 4 from layer 1 on: 6
    assert [row["tokens_per_image"] for row in grow] == [26] * 4
    assert [row["visual_tokens_per_layer"] for row in grow] == [[26, 6], [26, 6], [13, 13], [26, 26]]
    # one epoch of 24 samples: 4 with two images (i % 6 == 5), 4 of the others without (i % 5 == 4 and i % 6 != 5): 16 with one
    assert next(row["images"] for row in log if row["step"] == 6) == 16 + 2 * 4
    assert json.loads((whole / "final/foveate.json").read_text())["reducers"][0]["stride"] == 2
