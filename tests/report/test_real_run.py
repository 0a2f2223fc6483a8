"""Real training runs of a few steps each, evaluated from their folders and put into a report: what one part writes, the other reads. So
does the demo, from beginning to end, on a stand-in for its half-way model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from foveate import demo
from foveate.errors import FoveateError
from foveate.evaluation.evaluate import evaluate
from foveate.model.assembly import from_backbones
from foveate.reducers import VCC, parse
from foveate.report.demo import write_report
from foveate.report.pretraining import Question, aggregate, record
from foveate.report.runs import Arm, read_bridges, read_log
from foveate.train.recipe import load_recipe
from foveate.train.run import train
from foveate.train.settings import Recipe
from foveate.world.scenes import write_world
from foveate.world.text import build_tokenizer

RECIPES = Path(__file__).parents[2] / "recipes" / "demo"
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


# ---- the demo


def test_the_arms_differ_in_their_tokens_alone() -> None:
    """The same half-way model, samples, order and fine-tuning."""
    many, few = (load_recipe(RECIPES / f"{recipe}.yaml").model_dump() for recipe, _ in demo.ARMS.values())
    scales = [[stage.pop("bridge") for stage in recipe["stages"]] for recipe in (many, few)]
    grown = ((8, 4), (4, 4), (1, 1))
    assert [one and tuple(one["scales"]) for own in scales for one in own] == [grown, None, ((8, 4), (2, 1)), grown]
    assert many["model"]["checkpoint"] == "asset:begun"
    for recipe in (many, few):
        assert recipe.pop("output").name == recipe.pop("name")
    assert many == few


@pytest.fixture
def begun(root: Path) -> Path:
    """As asset:begun is: a Chain-of-Sight model of 20 tokens at 64 px."""
    folder = root / "begun"
    if not folder.is_dir():
        bridge = {"kind": "chain_of_sight", "scales": [[8, 4], [2, 1]], "width": 32, "head_dim": 16}
        for part in from_backbones(root / "tower", root / "lm", bridge, vision_feature_layer=[-2, -1], image_size=64, dtype="float32"):
            part.save_pretrained(folder)
    return folder


def files(folder: Path) -> dict[str, int]:
    found = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix in (".json", ".jsonl", ".safetensors")]
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in found}


def test_the_demo_from_beginning_to_end_and_again(
    root: Path, begun: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Path, "home", lambda: root)
    for name, value in {"METHODS": ("random", "divprune"), "KEEP": (0.25,), "QUESTIONS": 16}.items():
        monkeypatch.setattr(demo, name, value)
    out = root / "demo"
    words = [str(out), "--recipes", str(RECIPES), "--train", "8", "--test", "3", "--checkpoint", str(begun)]
    demo.main(words)
    printed = capsys.readouterr().out
    assert printed.index("1. A finished model") < printed.index("asset:vlm on world") < printed.index("2. Trained on few tokens")
    assert "few to many: pre-training took 0." in printed
    text = (out / "report.html").read_text()
    assert text.index('id="finished"') < text.index('id="training"')
    assert "Seconds are not compared" in text  # of two steps
    few, many = read_log(out / "runs" / "few-to-many"), read_log(out / "runs" / "all-tokens")
    assert [[stage.tokens for stage in log] for log in (few, many)] == [[20, 84], [84, 84]]
    assert [stage.images for stage in few] == [stage.images for stage in many]
    assert few[1].flops == many[1].flops  # the fine-tuning is common

    before = files(out)
    demo.main(words)
    again = files(out)
    changed = {name for name in before if before[name] != again[name]}
    assert before.keys() == again.keys()
    assert not [name for name in changed if name.startswith("runs/") or "cells/" in name or name.startswith("world/")]
    with pytest.raises(FoveateError, match="another world"):
        demo.main([*words, "--seed", "1"])
