"""Two real training runs of a few steps each, evaluated from their folders and put into a report: what one part writes, the other reads."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from foveate.evaluation.evaluate import evaluate
from foveate.reducers import VCC, parse
from foveate.report.demo import write_report
from foveate.report.pretraining import Question, aggregate, record
from foveate.report.runs import Arm, read_bridges, read_log
from foveate.train.run import train
from foveate.train.settings import Recipe
from foveate.world.scenes import write_world
from foveate.world.text import build_tokenizer

FEW, MANY = [[8, 4], [4, 1]], [[8, 4], [4, 4], [2, 1]]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("real")
    write_world(folder / "world", train=8, test=4, seed=1, size=64, progress=False, processes=1)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=64, patch_size=8)).save_pretrained(folder / "tower")
    CLIPImageProcessorPil(size={"height": 64, "width": 64}, do_center_crop=False).save_pretrained(folder / "tower")
    tokenizer = build_tokenizer(40)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=len(tokenizer), **ids)).save_pretrained(folder / "lm")
    tokenizer.save_pretrained(folder / "lm")
    return folder


def run(root: Path, name: str, bridge: dict[str, Any], finetune: dict[str, Any]) -> Arm:
    shared = {"batch_size": 4, "learning_rate": 1e-3, "steps": 4}
    images = root / "world" / "images"
    data = {stage: {"conversations": root / "world" / f"{stage}.json", "images": images} for stage in ("pretrain", "finetune")}
    recipe = Recipe.model_validate(
        {
            "name": name,
            "output": root / name,
            "log_steps": 2,
            "workers": 0,
            "model": {"vision": str(root / "tower"), "text": str(root / "lm"), "bridge": bridge},
            "stages": [
                {"name": "pretrain", "data": data["pretrain"], "train": {"bridge": True}, **shared},
                {"name": "finetune", "data": data["finetune"], "train": {"bridge": True, "lm": True}, **shared, **finetune},
            ],
        }
    )
    return Arm(name, name, root / name, evaluate(train(recipe), root / "world", progress=False, batch_size=16))


def test_report_on_real_runs(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: root)  # where the trainer remembers checked images
    pooled = {"reducers": [{"share": "1/2", "reducer": "vcc:layer=1,stride=8"}, {"share": "1/2", "reducer": "vcc:layer=2,stride=2"}]}
    chain = {"kind": "chain_of_sight", "scales": FEW, "width": 32, "head_dim": 16}
    arms = [run(root, "pooled", {"kind": "mlp"}, pooled), run(root, "chain", chain, {"bridge": {"scales": MANY}})]

    # The last reducer of the schedule is saved with the model, and evaluation takes it from there.
    assert parse(arms[0].result.reducers) == [VCC(layer=2, stride=2)]
    assert arms[0].result.layer_tokens == [64, 64, 32]
    assert arms[0].result.visual_tokens == 64
    assert (arms[1].result.reducers, arms[1].result.visual_tokens) == ("none", 4 + 16 + 16)
    assert [part.layers for part in read_log(arms[0].run)[1].parts] == [(64, 8, 8), (64, 64, 32)]
    assert [(stage.name, stage.grid, stage.bridge["scales"]) for stage in read_bridges(arms[1].run)] == [
        ("pretrain", (8, 8), FEW),
        ("finetune", (8, 8), MANY),
    ]
    stages = read_log(arms[1].run)
    assert [(stage.name, stage.images, stage.tokens) for stage in stages] == [("pretrain", 16, 8), ("finetune", 16, 36)]
    assert all(stage.seconds > 0 and stage.flops > 0 for stage in stages)

    text = write_report(root / "report.html", arms, root / "world").read_text()
    assert "chain (pretrain): 8 × 8 patches, 8 tokens" in text
    questions = [Question(row.image, row.family) for row in arms[0].result.rows]
    chained = aggregate([record(arm, 0) for arm in arms], questions).arms[1]
    assert chained.numbers["pretrain_tokens"].mean == 8
    assert chained.ratio["pretrain_flops"].mean < 1
