"""FSDP2 on two processes is one process: the same losses, checkpoints that go on, whole models. And what sharded training refuses."""

from pathlib import Path
from typing import Any

import pytest
from tests.situations.runs import prepare, recipe, stage, stages
from tests.train.sharded import check_resumed, check_the_same, how_divided, train_everywhere

from foveate.errors import FoveateError
from foveate.train.run import main

CONFIG = "fsdp2.yaml"
LAYERS = ["model.vision_tower.encoder.layers", "model.causal_lm.model.layers"]


def test_fsdp2_is_one_process(tmp_path: Path) -> None:
    train_everywhere(tmp_path, CONFIG)
    check_the_same(tmp_path)
    for name in ("stages-two", "library-two", "killed"):
        found = how_divided(tmp_path, name)
        assert found["divided"] == "FSDP, FULL_STATE_DICT"
        assert found["parameters"] == ["DTensor"]
    assert {f"{layers}.{number}" for layers in LAYERS for number in range(2)} < set(how_divided(tmp_path, "stages-two")["units"])
    with pytest.raises(FoveateError, match=r"checkpoint-2 was made with FSDP, FULL_STATE_DICT, but this run has no FSDP and no DeepSpeed"):
        main(tmp_path / "killed.yaml")
    check_resumed(tmp_path, CONFIG)


# ---- refusals ----------------------------------------------------------------------------------------------------------------------------

LAUNCH = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({"FSDP_VERSION": "1"}, "fsdp_version 1 wraps modules"),
        ({"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, "fsdp_cpu_ram_efficient_loading leaves the weights"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "set gradient_checkpointing: true in the recipe"),
        ({"FSDP_AUTO_WRAP_POLICY": "LAYERS"}, "Invalid auto wrap policy: LAYERS"),
        ({"ACCELERATE_USE_FSDP": "false", "ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed is not installed"),
    ],
)
def test_configurations_that_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: dict[str, str], reason: str) -> None:
    monkeypatch.setattr("foveate.train.sharding.is_deepspeed_available", lambda: False)
    for name, value in {**LAUNCH, **said}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(FoveateError, match=f"accelerate's configuration: .*{reason}"):
        main(recipe(prepare(tmp_path), "refused"))
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"evaluate": {"tasks": "data.json:metric=anls", "every": 2}}, "evaluate needs the whole model in each process"),
        ({"micro_batch": "auto"}, "micro_batch auto is not for sharded training"),
        ({"kind": "align"}, "kind align is not for sharded training"),
        ({"precision": "bf16-copy"}, "bf16-copy is not for sharded training; bf16 is"),
    ],
)
def test_stages_that_are_refused_before_the_first_of_them_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any], reason: str
) -> None:
    for name, value in LAUNCH.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(FoveateError, match=f"stage two: .*{reason}"):
        main(recipe(prepare(tmp_path), "refused", stage(1, **keys)))
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize("precision", ["fp32", "bf16-copy"])
def test_the_recipe_says_the_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(FoveateError, match=f"stage one: precision {precision}, but accelerate's configuration has mixed_precision bf16"):
        main(recipe(prepare(tmp_path), "refused", stage(0, precision=precision)))


def test_a_precision_that_both_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert main(recipe(prepare(tmp_path), "both", stages(1), stage(0, precision="bf16", steps=1))).is_dir()
