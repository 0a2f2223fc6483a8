"""Recipes: every mistake is named with its place, and told before anything is trained."""

import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from tests.train.tiny_training import RECIPE, save_backbones

from foveate.errors import FoveateError
from foveate.train import trials, values
from foveate.train.recipe import load_recipe
from foveate.train.run import main
from foveate.train.settings import LoraOf
from foveate.train.stages import read_config, walk

Write = Callable[..., Path]


def line_of(path: Path, text: str) -> int:
    return next(i for i, line in enumerate(path.read_text().splitlines(), start=1) if text in line)


def test_a_good_recipe(recipe_file: Write) -> None:
    recipe = load_recipe(recipe_file("good"))
    assert [stage.name for stage in recipe.stages] == ["pretrain", "grow", "all"]
    grow = recipe.stages[1]
    assert [slot.share for slot in grow.reducers] == [Fraction(1, 3)] * 3
    assert grow.parts[1].cycle == ("none", "random:keep=0.5")
    assert isinstance(grow.train.lm, LoraOf)
    assert grow.train.lm.lora.rank == 4
    assert recipe.stages[1].data == recipe.stages[0].data  # a YAML anchor
    assert [setup.image.tokens for setup in walk(recipe, read_config)] == [2 + 4, 2 + 8 + 16, 26]


@pytest.mark.parametrize(
    ("gpu", "has", "chosen"), [(True, True, "bf16"), (False, True, "bf16-copy"), (True, False, "fp32"), (False, False, "fp32")]
)
def test_auto_is_the_precision_that_is_fast_here(
    gpu: bool, has: bool, chosen: str, recipe_file: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def has_bfloat16(device: str) -> bool:
        asked.append(device)
        return has

    monkeypatch.setattr(values, "has_bfloat16", has_bfloat16)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    recipe = load_recipe(recipe_file("auto"), ["stages.0.precision=auto"])
    assert (recipe.stages[0].precision, asked) == (chosen, ["cuda" if gpu else "cpu"])
    assert recipe.stages[1].precision == "fp32"


@pytest.mark.parametrize(
    ("has", "precision", "told"), [(False, "bf16-copy", 1), (False, "bf16", 1), (False, "fp32", 0), (True, "bf16-copy", 0)]
)
def test_bfloat16_where_it_is_slow_is_told(
    has: bool, precision: str, told: int, recipe_file: Write, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(trials, "has_bfloat16", lambda device: has)
    recipe = load_recipe(recipe_file("slow"), [f"stages.0.precision={precision}"])
    trials.check_machine(recipe, next(iter(walk(recipe, read_config))).config, PartialState())
    assert sum("no instructions for bfloat16" in line.getMessage() for line in caplog.records) == told


def test_overrides(recipe_file: Write) -> None:
    path = recipe_file("overridden")
    recipe = load_recipe(
        path, ["stages.0.learning_rate=1e-4", "stages.1.train.lm=true", "seed=3", "model.dtype=bfloat16", "report_to=[wandb]"]
    )
    assert (recipe.stages[0].learning_rate, recipe.stages[1].train.lm, recipe.seed) == (1e-4, True, 3)
    assert (recipe.model.dtype, recipe.report_to) == ("bfloat16", ["wandb"])
    for override, message in {
        "seed": "expected key.sub=value",
        "stages.7.steps=5": "stages is a list of 3, there is no entry '7'",
        "seed=-1": "command line: seed: -1: input should be greater than or equal to 0",
        "stages.0.lerning_rate=1": "command line: stages.0.lerning_rate: unknown key, did you mean learning_rate?",
    }.items():
        with pytest.raises(FoveateError) as error:
            load_recipe(path, [override])
        assert message in str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("    warmup: 0.2", "    warm_up: 0.2", "stages.1.warm_up: unknown key, did you mean warmup?"),
        ("    warmup: 0.2", "    warmup: two", "stages.1.warmup: 'two': input should be a valid number"),
        ("    warmup: 0.2", "    lr_schedule: cosin", "stages.1.lr_schedule: 'cosin' is not allowed; allowed: cosine, linear, constant or"),
        ("    warmup: 0.2", "    optimizer: adamv", "stages.1.optimizer: 'adamv': not an optimizer of the Trainer"),
        (
            "    warmup: 0.2",
            "    precision: bf16-copy\n    gradient_checkpointing: true",
            "stages.1: gradient_checkpointing would recompute with the float32 weights",
        ),
        ("rank: 4", "rnk: 4", "stages.1.train.lm.lora.rnk: unknown key, did you mean rank?"),
        ("    steps: 6", "    epochs: 1\n    steps: 6", "stages.1: give `epochs` or `steps`, not both"),
        (
            'share: 1/3, reducer: "vcc',
            'share: 1/4, reducer: "vcc',
            "stages.1: the shares of `reducers` must add up to 1, but 1/4 + 1/3 + 1/3 = 11/12",
        ),
        ("share: 1/3, reducer: none", "share: 0.33, reducer: none", "1/3 + 1/3 + 33/100 = 299/300"),
        ("share: 1/3, reducer: none", "share: 1/0, reducer: none", "stages.1.reducers.2.share: '1/0': a share is a number or a fraction"),
        ("share: 1/3, reducer: none", "share: 1/3", "stages.1.reducers.2: a part of the schedule has either `reducer` or `cycle`"),
        ("vcc:layer=1,stride=4", "vcd:layer=1", "stages.1.reducers.0.reducer: 'vcd:layer=1': unknown reducer 'vcd' (did you mean 'vcc'?)"),
        ("micro_batch: 2", "micro_batch: 3", "stages.0: batch_size 4 is no multiple of micro_batch 3"),
        (
            "micro_batch: 2",
            "micro_batch: auto\n    losses: [mdist]",
            "stages.0: `micro_batch: auto` tries one pass, and `losses` keep several",
        ),
        ("train: {{bridge: true}}", "train: {{bridge: false}}", "stages.0.train: nothing is trained"),
        ("name: grow", "name: pretrain", "recipe: two stages are called pretrain"),
        ("  vision: {root}/tower", "  checkpoint: x", "model: give either `checkpoint` or `vision`, `text` and `bridge`, not both"),
        ("  vision: {root}/tower\n", "", "model: `vision` missing"),
        ("name: tiny\n", "", "name: this key is required"),
        ("name: tiny\n", "name: [tiny\n", "not valid YAML"),
        ("conversations: {root}/data.json, images", "images", "stages.0.data: give either `conversations` (with `images`) or `dataset`"),
    ],
)
def test_mistakes_are_named(recipe_file: Write, old: str, new: str, message: str) -> None:
    assert RECIPE.count(old) >= 1
    path = recipe_file("mistake", RECIPE.replace(old, new, 1))
    with pytest.raises(FoveateError) as error:
        load_recipe(path)
    assert message in str(error.value)
    assert str(error.value).startswith(f"{path}:")


def test_the_line_is_named(recipe_file: Write) -> None:
    path = recipe_file("line", RECIPE.replace("warmup: 0.2", "warm_up: 0.2").replace("reducer: none", "reducer: nine"))
    with pytest.raises(FoveateError) as error:
        load_recipe(path)
    messages = str(error.value).splitlines()
    assert [message.partition(": ")[0] for message in sorted(messages)] == [
        f"{path}:{line_of(path, 'warm_up')}",
        f"{path}:{line_of(path, 'nine')}",
    ]


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    with pytest.raises(FoveateError, match=r"recipe .*none\.yaml cannot be read: No such file"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(FoveateError, match="a recipe is a mapping"):
        load_recipe(tmp_path / "list.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FoveateError, match="cannot be read"):
        load_recipe(tmp_path / "bytes.yaml")


# ---- what only a look at models and data can tell ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.bridge.scales=[[3, 1]]", "3"),
        ("stages.1.bridge.scales=[[5, 1]]", "stage grow: .*5"),
        ("stages.1.image_size=60", "stage grow: .*7 x 7"),
        ("model.bridge.kind=chain_of_site", "chain_of_sight"),
        ("model.vision=nowhere/at/all", "vision tower 'nowhere/at/all' could not be loaded"),
        ("model.text=nowhere/at/all", "language model 'nowhere/at/all' could not be loaded"),
        ("stages.2.data.conversations=none.json", r"conversations none\.json cannot be read: No such file"),
        ("stages.1.batch_size=3", None),
        ("report_to=[no-such-service]", "report_to: 'no-such-service' is not known or not installed"),
        ("stages.0.max_length=12", "cannot be trained on"),
    ],
)
def test_refused_before_training(recipe_file: Write, override: str, message: str | None) -> None:
    path = recipe_file("refused")
    if message is None:
        load_recipe(path, [override])  # any batch size is fine for one process
        return
    with pytest.raises(FoveateError, match=message):
        main(path, [override])
    assert not (path.parent / "refused" / "log.jsonl").exists()


def test_a_language_model_without_the_image_token(recipe_file: Write, tmp_path: Path) -> None:
    save_backbones(tmp_path, image_token=False)
    path = recipe_file("without-token")
    overrides = [f"model.text={tmp_path}/lm", "stages.0.steps=1", "stages.0.epochs=null", "stages.1.steps=1", "stages.2.steps=1"]
    with pytest.raises(FoveateError, match=r"has no token '<image>'; set model\.add_image_token: true"):
        main(path, overrides)
    assert (main(path, [*overrides, "model.add_image_token=true"]) / "model.safetensors").is_file()


def test_bad_images_stop_or_are_skipped(recipe_file: Write, root: Path) -> None:
    rows = json.loads((root / "data.json").read_text())
    rows[3]["image"] = "torn.png"
    whole = (root / "images" / "0-0.png").read_bytes()
    (root / "images" / "torn.png").write_bytes(whole[: len(whole) // 2])
    (root / "torn.json").write_text(json.dumps(rows))
    path = recipe_file("torn")
    overrides = [f"stages.{i}.data.conversations={root}/torn.json" for i in range(3)] + ["stages.1.steps=1", "stages.2.steps=1"]
    with pytest.raises(FoveateError, match=r"1 of 24 samples cannot be trained on[\s\S]*s3 \(torn\.png\): image cannot be decoded"):
        main(path, overrides)
    assert "s3 (torn.png)" in (root / "torn" / "bad-samples-pretrain.txt").read_text()
    assert not (root / "torn" / "log.jsonl").exists()
    main(path, [*overrides, *(f"stages.{i}.data.on_bad_image=skip" for i in range(3))])
    facts = json.loads((root / "torn" / "recipe.json").read_text())["facts"]
    assert facts["pretrain"]["samples"] == 23
