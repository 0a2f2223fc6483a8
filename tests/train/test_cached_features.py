"""Stages that read their tower's features from a cache: the same training as without, and refused where it could not be."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tests.train.processes import killed, train_in_two
from tests.train.test_run import ONE, Write, weights
from transformers import CLIPVisionConfig, CLIPVisionModel

from foveate.data.features import fill
from foveate.errors import FoveateError
from foveate.train import features, run
from foveate.train.features import open_features
from foveate.train.plan import plan
from foveate.train.recipe import load_recipe
from foveate.train.run import main
from foveate.train.trainer import FoveateTrainer

GROWING = (
    ONE.replace("steps: 3", "epochs: 1\n    save_steps: 2")
    + """  - name: grow
    data: {{conversations: {root}/data.json, images: {root}/images}}
    validation: {{conversations: {root}/data.json, images: {root}/images, limit: 5, every: 2}}
    image_size: 64
    bridge: {{scales: [[8, 2], [4, 2], [2, 1]]}}
    train: {{bridge: true, lm: {{lora: {{rank: 2}}}}}}
    steps: 4
    batch_size: 4
    micro_batch: 2
    learning_rate: 1.0e-2
    save_steps: 2
    reducers: [{{share: 1/2, reducer: "vcc:layer=1,stride=2"}}, {{share: 1/2, reducer: "uniform:keep=0.5"}}]
"""
)


def cached(folder: Path, *stages: int, storage: str = "exact") -> list[str]:
    return [f"stages.{stage}.features={{cache: {folder}, at_most: 1GB, storage: {storage}}}" for stage in stages or (0,)]


def rows(final: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (final.parent / "log.jsonl").read_text().splitlines()]


def told(final: Path) -> list[dict[str, Any]]:
    """The log without what differs between a run with a cache and one without."""
    return [{key: value for key, value in row.items() if key not in ("seconds", "images_per_s", "flops", "tower")} for row in rows(final)]


def tower_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of all pixels that the tower gets from here on."""
    seen: list[tuple[int, ...]] = []
    forward = CLIPVisionModel.forward

    def noted(self: Any, pixel_values: Any = None, *args: Any, **kwargs: Any) -> Any:
        if pixel_values.device.type != "meta":
            seen.append(tuple(pixel_values.shape))
        return forward(self, pixel_values, *args, **kwargs)

    noted.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    monkeypatch.setattr(CLIPVisionModel, "forward", noted)
    return seen


# ---- the same training -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-copy"])
def test_exact_features_train_the_same_model(recipe_file: Write, tmp_path: Path, precision: str) -> None:
    overrides = [f"stages.{stage}.precision={precision}" for stage in (0, 1)]
    plain = main(recipe_file(f"plain-{precision}", GROWING), overrides)
    read = main(recipe_file(f"read-{precision}", GROWING), [*overrides, *cached(tmp_path / "cache", 0, 1)])
    assert told(read) == told(plain)
    assert all(torch.equal(value, weights(plain)[name]) for name, value in weights(read).items())
    assert len(list((tmp_path / "cache").iterdir())) == 2  # one a resolution


@pytest.mark.parametrize(("storage", "most"), [("half", 1e-4), ("int8", 1e-3)])
def test_smaller_storage_trains_nearly_the_same_model(recipe_file: Write, tmp_path: Path, storage: str, most: float) -> None:
    plain = main(recipe_file(f"beside-{storage}", ONE))
    read = main(recipe_file(storage, ONE), cached(tmp_path / "cache", storage=storage))
    pairs = [(one["loss"], other["loss"]) for one, other in zip(rows(plain), rows(read), strict=True)]
    assert max(abs(one - other) for one, other in pairs) < most
    assert any(not torch.equal(value, weights(plain)[name]) for name, value in weights(read).items())


def test_the_tower_runs_once_for_all_epochs_and_arms(recipe_file: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = tower_calls(monkeypatch)
    main(recipe_file("first-arm", ONE), [*cached(tmp_path / "cache"), "stages.0.steps=null", "stages.0.epochs=2"])
    rows = json.loads((recipe_file("first-arm", ONE).parent / "data.json").read_text())
    named = [row["image"] for row in rows if "image" in row]
    images = len({name for image in named for name in (image if isinstance(image, list) else [image])})
    assert sum(shape[0] for shape in calls if shape[0] > 2) == images  # beside the trial of the tower, and blank images
    calls.clear()
    other = ["model.bridge={kind: mlp}", "seed=3", "stages.0.micro_batch=2", *cached(tmp_path / "cache")]
    main(recipe_file("second-arm", ONE), other)
    assert {shape[0] for shape in calls} <= {1, 2}


def test_freed_memory_is_kept_in_the_steps_alone(recipe_file: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tower's batches are larger than a step's: what they free must be there for others."""
    seen: list[str] = []

    @contextmanager
    def kept(device: str) -> Iterator[None]:
        seen.append(f"kept on the {device}")
        yield
        seen.append("given back")

    def noted(what: str, act: Callable[..., Any]) -> Callable[..., Any]:
        def noting(*given: Any, **named: Any) -> Any:
            seen.append(what)
            return act(*given, **named)

        return noting

    monkeypatch.setattr(run, "kept_memory", kept)
    monkeypatch.setattr(features, "fill", noted("encodes", fill))
    monkeypatch.setattr(FoveateTrainer, "training_step", noted("steps", FoveateTrainer.training_step))
    main(recipe_file("memory", ONE), [*cached(tmp_path / "cache"), "stages.0.steps=1", "stages.0.micro_batch=4"])
    assert seen == ["encodes", "kept on the cpu", "steps", "given back"]


def test_only_what_the_steps_read_is_encoded(recipe_file: Write, tmp_path: Path) -> None:
    main(recipe_file("few-steps", ONE), [*cached(tmp_path / "cache"), "stages.0.steps=1"])
    (store,) = (tmp_path / "cache").iterdir()
    size = sum(path.stat().st_size for path in store.glob("*.safetensors"))
    assert 0 < size < 9 * (16 * 32 * 4 + 24) + 800  # four samples with two images at most


def test_data_workers_and_skipped_samples(recipe_file: Write, root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "images", tmp_path / "images")
    (tmp_path / "images" / "3-0.png").write_bytes(b"no picture")
    skip = [f"stages.0.data.images={tmp_path / 'images'}", "stages.0.data.on_bad_sample=skip", "workers=1"]
    plain = main(recipe_file("skip-plain", ONE), skip)
    assert told(main(recipe_file("skip-read", ONE), [*skip, *cached(tmp_path / "cache")])) == told(plain)


def test_flops_leave_the_tower_out(recipe_file: Write, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    plain = rows(main(recipe_file("flops-plain", ONE)))
    read = rows(main(recipe_file("flops-read", ONE), cached(tmp_path / "cache")))
    assert {row["tower"] for row in read} == {"from cache"}
    assert not any("tower" in row for row in plain)
    spared = {(one["flops"] - other["flops"]) / one["images"] for one, other in zip(plain, read, strict=True)}
    (each,) = spared
    linear, attention, embedding = 17 * (4 * 32 * 32 + 2 * 32 * 64), 2 * 17 * 17 * 32, 16 * 3 * 8 * 8 * 32
    assert each == 2 * (2 * (linear + attention) + embedding)  # two blocks, 2 FLOPs a multiplication
    assert "tower: from cache" in capfd.readouterr().err


def test_the_plan_leaves_the_tower_out(recipe_file: Write, tmp_path: Path) -> None:
    recipe = recipe_file("planned", ONE)
    plain, read = plan(recipe).stages[0], plan(recipe, cached(tmp_path / "cache")).stages[0]
    assert plain.training_flops["tower"] > read.training_flops["tower"] == 0
    assert plain.forward_flops == read.forward_flops
    assert any("from a cache" in note for note in read.notes)
    assert not (tmp_path / "cache").exists()


def test_two_processes_share_the_encoding(recipe_file: Write, root: Path, tmp_path: Path) -> None:
    without_dropout = [f"model.text={root}/lm-plain"]
    plain = main(recipe_file("cached-one-process", ONE), without_dropout)
    recipe, overrides = recipe_file("cached-two-processes", ONE), without_dropout + cached(tmp_path / "cache")
    said = train_in_two(tmp_path, recipe, overrides, "from foveate.data import features", "features.MOST = 4")
    assert said.count("14 of them encoded now") == 1
    assert len(shards(tmp_path / "cache")) == 4
    pairs = zip(rows(plain), rows(root / "cached-two-processes" / "final"), strict=True)
    assert all(one["loss"] == pytest.approx(other["loss"], abs=1e-5) for one, other in pairs)


# ---- refused ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "reason"),
    [
        ("", r"stage only: features of \d+ images \(1 x 16 x 32, exact\) take \d+kB in .*: agree to that with features.at_most: \d+kB"),
        (", at_most: 1kB", r"more than features.at_most \(1kB\): allow \d+kB"),
    ],
)
def test_a_size_that_was_not_agreed_to(recipe_file: Write, tmp_path: Path, limit: str, reason: str) -> None:
    recipe = recipe_file(f"limit{len(limit)}", ONE)
    with pytest.raises(FoveateError, match=reason) as refused:
        main(recipe, [f"stages.0.features={{cache: {tmp_path / 'cache'}{limit}}}"])
    assert not (tmp_path / "cache").exists()
    assert not (load_recipe(recipe).output / "recipe.json").exists()  # another storage, or fewer samples, is no other run
    asked = str(refused.value).rpartition("at_most: ")[2] if not limit else str(refused.value).rpartition("allow ")[2].split(",")[0]
    main(recipe, [f"stages.0.features={{cache: {tmp_path / 'cache'}, at_most: {asked}}}"])


def test_the_limit_is_for_all_stages_together(recipe_file: Write, tmp_path: Path) -> None:
    alone = [f"stages.{stage}.features={{cache: {tmp_path / 'cache'}, at_most: 150kB}}" for stage in (0, 1)]
    with pytest.raises(FoveateError, match="those of all stages"):
        main(recipe_file("together", GROWING), alone)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (["stages.0.train={tower: true}"], "trains the tower"),
        (["stages.0.reducers=[{share: 1, reducer: 'fastervlm:keep=0.5'}]"], r"looks at what happens inside of the tower \(ClsAttention\)"),
        (["stages.0.reducers=[{share: 1, reducer: 'visionzip'}]"], "inside of the tower"),
        (["stages.0.reducers=[{share: 1, cycle: [none, 'random:keep=0.5']}]"], "draws by the pixels"),
        (["stages.0.reducers=[{share: 1, reducer: 'tome:site=tower,blocks=1,r=2'}]"], "acts inside of the tower"),
    ],
)
def test_what_needs_the_tower_is_refused(recipe_file: Write, tmp_path: Path, changed: list[str], reason: str) -> None:
    with pytest.raises(FoveateError, match=f"stage only: .*{reason}"):
        main(recipe_file("needs-tower", ONE), [*changed, *cached(tmp_path / "cache")])


def test_a_tower_with_dropout_is_refused(recipe_file: Write, root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "tower", tmp_path / "tower")
    CLIPVisionConfig.from_pretrained(root / "tower", attention_dropout=0.1).save_pretrained(tmp_path / "tower")
    with pytest.raises(FoveateError, match="stage only: the tower makes other features in training"):
        main(recipe_file("dropout", ONE), [f"model.vision={tmp_path / 'tower'}", *cached(tmp_path / "cache")])


@pytest.mark.parametrize(("text", "size"), [("20GB", 20 * 10**9), ("1.5 MiB", 3 * 2**19), ("7", 7), ("300mb", 3 * 10**8)])
def test_sizes_have_units(recipe_file: Write, text: str, size: int) -> None:
    features = load_recipe(recipe_file("units", ONE), [f"stages.0.features={{cache: a, at_most: {text}}}"]).stages[0].features
    assert features is not None
    assert features.at_most == size


@pytest.mark.parametrize("text", ["20 apples", "-1", "0", "much", "1e9GB"])
def test_other_sizes_are_refused(recipe_file: Write, text: str) -> None:
    with pytest.raises(FoveateError, match=r"stages.0.features.at_most"):
        load_recipe(recipe_file("units", ONE), [f"stages.0.features={{cache: a, at_most: {text}}}"])


# ---- kills and faults of the disk ------------------------------------------------------------------------------------------------------


def shards(cache: Path) -> list[Path]:
    return list(cache.glob("*/*.safetensors"))


def logged(output: Path) -> int:
    return len((output / "log.jsonl").read_text().splitlines()) if (output / "log.jsonl").is_file() else 0


def test_kill_and_resume(recipe_file: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foveate.data.features.MOST", 4)
    recipe, cache = recipe_file("killed", GROWING), tmp_path / "cache"
    overrides, output = cached(cache, 0, 1), recipe.parent / "killed"
    plain = main(recipe_file("not-killed", GROWING))
    killed(recipe, overrides, lambda: len(shards(cache)) == 2)
    assert logged(output) == 0
    killed(recipe, overrides, lambda: logged(output) >= 3)
    one = shards(cache)[0]
    one.write_bytes(one.read_bytes()[:-100])
    killed(recipe, overrides, lambda: len(list(cache.iterdir())) == 2)
    read = main(recipe, overrides)
    assert told(read) == told(plain)
    assert all(torch.equal(value, weights(plain)[name]) for name, value in weights(read).items())


def test_a_picture_that_has_changed_meanwhile_is_named(
    recipe_file: Write, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(root / "images", tmp_path / "images")
    from foveate.train import run

    def change(*args: Any) -> Any:
        store = open_features(*args)
        for path in (tmp_path / "images").iterdir():
            Image.new("RGB", (32, 32), "red").save(path)
        return store

    monkeypatch.setattr(run, "open_features", change)
    with pytest.raises(FoveateError, match=r"another one than when the run began"):
        main(recipe_file("changed-picture", ONE), [f"stages.0.data.images={tmp_path / 'images'}", *cached(tmp_path / "cache")])
