"""DeepSpeed's ZeRO-2 on two processes is one process. Needs the environment that `make deepspeed` builds."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from foveate.errors import FoveateError
from foveate.train.run import main
from tests.situations.runs import prepare, recipe, stage, stages
from tests.train.processes import launched
from tests.train.sharded import check_resumed, check_the_same, how_divided, train_everywhere

pytestmark = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="DeepSpeed is not installed in this environment; `make deepspeed` builds one that has it"
)

CONFIG = "zero2.yaml"


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)


def test_zero2_is_one_process(tmp_path: Path) -> None:
    train_everywhere(tmp_path, CONFIG)
    check_the_same(tmp_path)
    for name in ("stages-two", "library-two", "killed"):
        found = how_divided(tmp_path, name)
        assert (found["divided"], found["model"]) == ("DeepSpeed on 2 processes", "DeepSpeedEngine")
        assert found["optimizer"] == "DeepSpeedZeroOptimizer"
    with pytest.raises(FoveateError, match="checkpoint-2 was made with DeepSpeed on 2 processes"):
        main(tmp_path / "killed.yaml")
    check_resumed(tmp_path, CONFIG)


def test_bfloat16_rounds_no_weights(tmp_path: Path) -> None:
    """DeepSpeed's module is all bfloat16: what is not trained comes out as it went in, and what is trained as the optimiser has it."""
    lora = {"bridge": True, "lm": {"lora": {"rank": 2}}}
    made = recipe(prepare(tmp_path), "two", stages(1), stage(0, train=lora, precision="bf16"))
    done = launched(CONFIG, tmp_path, "-m", "foveate", "train", str(made))
    assert done.returncode == 0, done.stderr[-3000:]
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("tower", "two/final"))
    frozen = [name for name in after if "vision_tower" in name]
    assert frozen
    assert all(torch.equal(after[name], before[name.rpartition("vision_tower.")[2]]) for name in frozen)
    trained = [value for name, value in after.items() if "bridge" in name and value.ndim > 1]
    assert not any(torch.equal(value, value.bfloat16().float()) for value in trained)


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "ZeRO stage 3 is not supported"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2"}, r"the recipe says it \(micro_batch\)"),
        ({"ACCELERATE_GRADIENT_CLIPPING": "0.5"}, r"the recipe says it \(max_grad_norm\)"),
        ({"ACCELERATE_USE_CPU": "true"}, "with use_cpu accelerate leaves DeepSpeed out"),
        ({"ACCELERATE_DEEPSPEED_CONFIG_FILE": "own.json"}, r"optimizer is what the recipe says \(optimizer\)"),
    ],
)
def test_configurations_that_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: dict[str, str], reason: str) -> None:
    monkeypatch.chdir(tmp_path)
    own = {"zero_optimization": {"stage": 2}, "optimizer": {"type": "Adam"}, "gradient_accumulation_steps": "auto"}
    Path("own.json").write_text(json.dumps(own))
    for name, value in {"ACCELERATE_USE_DEEPSPEED": "true", **said}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(FoveateError, match=f"accelerate's configuration: .*{reason}"):
        main(recipe(prepare(tmp_path), "refused"))
    assert not (tmp_path / "refused").exists()
