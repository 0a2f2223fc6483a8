"""`foveate plan` on the papers' own recipes: every number is from the papers or follows from their definitions."""

import json
from collections.abc import Callable
from fractions import Fraction
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tests.train.test_run import ONE
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from foveate.accounting import Trained, predict, trainable
from foveate.data.collate import IGNORED, Collator
from foveate.data.conversations import Conversations
from foveate.errors import FoveateError
from foveate.model import FoveateConfig, FoveateForConditionalGeneration
from foveate.train.account import Costs
from foveate.train.opening import open_model
from foveate.train.passes import passes_of
from foveate.train.plan import StagePlan, main, plan, print_plan
from foveate.train.recipe import load_recipe
from foveate.train.run import main as train
from foveate.train.schedule import reducer_at
from foveate.train.settings import LoraOf
from foveate.train.stages import read_config, walk
from foveate.train.supervised import SupervisedRows

PAPERS = Path(__file__).parents[2] / "recipes" / "papers"
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MiB = 2**20


def of(recipe: str, *overrides: str) -> list[StagePlan]:
    return plan(PAPERS / f"{recipe}.yaml", overrides).stages


# ---- Chain-of-Sight (arXiv 2407.15819)


@pytest.mark.parametrize(
    ("recipe", "few", "many"),
    [
        ("chain-of-sight-7b-32-528", [16, 16], [16, 256, 256]),
        ("chain-of-sight-7b-48-784", [16, 32], [16, 256, 512]),
        ("chain-of-sight-7b-80-1296", [16, 64], [16, 256, 1024]),
    ],
)
def test_chain_of_sight_tokens(recipe: str, few: list[int], many: list[int]) -> None:
    pretrain, finetune = of(recipe)
    assert (pretrain.image_size, pretrain.grid, pretrain.tokens_by_scale) == (224, (16, 16), few)
    assert (finetune.image_size, finetune.grid, finetune.tokens_by_scale) == (448, (32, 32), many)
    assert recipe.endswith(f"-{pretrain.tokens_per_image}-{finetune.tokens_per_image}")
    assert pretrain.parts[0].visual_tokens == [sum(few)] * 32


AT_336 = ["model.bridge.scales=[[16, 16], [8, 16], [2, 4]]", "stages.1.bridge={scales: [[32, 16], [16, 16], [4, 4]], sources: [0, 1, 2]}"]


@pytest.mark.parametrize(
    ("recipe", "overrides", "stage", "tokens", "bridge", "tower", "lm", "mib"),
    [
        ("chain-of-sight-7b-32-528", [], 0, 32, 5.9, 155, 414, 16),
        ("chain-of-sight-7b-48-784", [], 0, 48, 6.7, 155, 622, 24),
        ("chain-of-sight-7b-80-1296", [], 0, 80, 8.4, 155, 1036, 40),
        ("chain-of-sight-7b-80-1296", AT_336, 0, 336, 23.4, 155, 4352, 168),
        ("chain-of-sight-7b-80-1296", AT_336, 1, 336, 43.0, 693, 4352, 168),
        ("chain-of-sight-7b-80-1296", [], 1, 1296, 91.3, 693, 16786, 648),
    ],
)
def test_chain_of_sight_cost(
    recipe: str, overrides: list[str], stage: int, tokens: int, bridge: float, tower: int, lm: int, mib: int
) -> None:
    found = of(recipe, *overrides)[stage]
    giga = {part: float(value) / 1e9 for part, value in found.forward_flops.items()}
    assert found.tokens_per_image == tokens
    assert giga["bridge"] == pytest.approx(bridge, abs=0.05)
    assert giga["tower"] * 23 / 24 == pytest.approx(tower, abs=0.5)  # the table's ends with the deepest level, the last block runs as well
    assert giga["lm_linear"] == pytest.approx(lm, abs=0.5)
    assert found.visual_kv_bytes == mib * MiB == tokens * 512 * 1024


def test_chain_of_sight_parameters() -> None:
    pretrain, finetune = of("chain-of-sight-7b-80-1296")
    assert pretrain.trainable == {"tower": 0, "bridge": 54_663_168, "lm": 0, "lora": 159_907_840}
    assert finetune.trainable == {"tower": 291_367_936, "bridge": 81_098_752, "lm": 0, "lora": 159_907_840}
    assert sum(finetune.trainable.values()) == 532_374_528
    assert of("chain-of-sight-7b-80-1296", *AT_336)[0].trainable["bridge"] == 80_115_712
    assert "786,432 fewer" in finetune.notes[0]  # 1025 - 257 positions of width 1024
    assert pretrain.notes == []


def test_chain_of_sight_training_by_the_papers_settings() -> None:
    for few, many in ((32, 528), (48, 784), (80, 1296)):
        recipe = load_recipe(PAPERS / f"chain-of-sight-7b-{few}-{many}.yaml")
        pretrain, finetune = recipe.stages
        assert recipe.model.vision_feature_layer == [16, 23]
        assert pretrain.steps == 120_000
        assert (pretrain.train.bridge, pretrain.train.tower, finetune.train.tower) == (True, False, True)
        for stage in (pretrain, finetune):
            assert isinstance(stage.train.lm, LoraOf)
            assert (stage.train.lm.lora.rank, stage.train.lm.lora.targets) == (64, SEVEN)


# ---- LLaVolta (arXiv 2406.20092)

HEAVY, DEEP, WIDE, LIGHT, FULL = (3312, 5.565), (10368, 1.778), (9792, 1.882), (13824, 1.333), (18432, 1.0)


@pytest.mark.parametrize(
    ("recipe", "parts", "mean", "ratio"),
    [
        ("llava-1.5-7b", [FULL], 18432, 100.0),
        ("llavolta-7b-two", [HEAVY, FULL], 10872, 169.5),
        ("llavolta-7b-three-deeper", [HEAVY, DEEP, FULL], 10704, 172.2),
        ("llavolta-7b-three-wider", [HEAVY, WIDE, FULL], 10512, 175.3),
        ("llavolta-7b-four-wider-deeper", [HEAVY, WIDE, LIGHT, FULL], 11340, 162.5),
        ("llavolta-7b-four-deeper-wider", [HEAVY, DEEP, LIGHT, FULL], 11484, 160.5),
        ("llavolta-7b-last-stage", [(2232, 8.258), (9792, 1.882), (11520, 1.600)], 7848, 234.9),
    ],
)
def test_llavolta_recipes(recipe: str, parts: list[tuple[int, float]], mean: int, ratio: float) -> None:
    projector, instruct = of(recipe)
    assert [part.tokens for part in instruct.parts] == [tokens for tokens, _ in parts]
    assert [part.compression for part in instruct.parts] == pytest.approx([cr for _, cr in parts], abs=5e-4)
    assert [part.share for part in instruct.parts] == [Fraction(1, len(parts))] * len(parts)
    assert instruct.mean_tokens == mean
    assert instruct.compression is not None
    assert 100 * instruct.compression == pytest.approx(ratio, abs=0.05)
    assert projector.tokens_per_image == instruct.tokens_per_image == 576
    assert projector.parts[0].visual_tokens == [576] * 32
    assert projector.visual_kv_bytes == 288 * MiB
    assert (projector.steps, projector.samples) == (2181, 2181 * 256)
    assert (instruct.steps, instruct.samples) == (5197, 5197 * 128)
    assert projector.trainable["lm"] == 0
    assert instruct.trainable["lm"] == 6_738_415_616  # the whole Llama-2-7B shape
    assert instruct.share is not None
    assert projector.share is not None
    assert projector.share + instruct.share == pytest.approx(1)
    settings = [(stage.batch_size, stage.learning_rate, stage.warmup) for stage in load_recipe(PAPERS / f"{recipe}.yaml").stages]
    assert settings == [(256, 1e-3, 0.03), (128, 2e-5, 0.03)]


def test_mqt_recipe() -> None:
    """The mean of what is drawn, counted at numbers whose own mean is that of all; compression is against all tokens."""
    bridge, instruct = of("mqt-7b")
    assert (bridge.tokens_per_image, bridge.parts[0].view_tokens, instruct.tokens_per_image) == (256, None, 256)
    assert instruct.mean_tokens == 32 * Fraction(257, 2)
    assert [part.compression for part in instruct.parts] == pytest.approx([256 / (part.view_tokens or 0) for part in instruct.parts])
    assert any("view_tokens are drawn of 256 numbers" in note for note in instruct.notes)


def test_other_doors_recipes() -> None:
    """DeepStack: five views and no token more. COMM: a second tower, as many tokens."""
    base = of("llava-1.5-7b")[1]
    stacked, both = plan(PAPERS / "deepstack-7b.yaml", image=(1344, 1344)).stages[1], of("comm-7b")[1]
    assert (stacked.tokens_per_image, both.tokens_per_image, both.grid) == (576, 576, (24, 24))
    for part, flops in base.forward_flops.items():
        assert stacked.forward_flops[part] == flops * (5 if part in ("tower", "bridge") else 1)
        assert part in ("tower", "bridge") or both.forward_flops[part] == flops
    assert 1.9 < both.forward_flops["tower"] / base.forward_flops["tower"] < 2.2  # of CLIP also its last block
    assert both.trainable["bridge"] == 30 * (1024**2 + 3 * 1024 + 1) + 2 * 4 * 1024**2 + 5 * 1024 + 4096 * (2 * 1024 + 1)


def test_share_and_means_follow_the_parts() -> None:
    projector, instruct = of("llavolta-7b-two", "stages.1.reducers.0.share=1/4", "stages.1.reducers.1.share=3/4")
    assert instruct.mean_tokens == 14652  # the paper's ablation 25/75, by the formula
    for part, value in instruct.training_flops.items():
        assert value == Fraction(1, 4) * instruct.parts[0].training_flops[part] + Fraction(3, 4) * instruct.parts[1].training_flops[part]
    costs = [stage.samples * sum(stage.training_flops.values()) for stage in (projector, instruct) if stage.samples]
    assert instruct.share == pytest.approx(float(costs[1] / sum(costs)))


def test_every_recipe_of_the_papers_is_planned_here() -> None:
    tested = {f"chain-of-sight-7b-{name}" for name in ("32-528", "48-784", "80-1296")} | {"llava-1.5-7b", "mqt-7b"}
    tested |= {"deepstack-7b", "comm-7b", "vlora-7b"}
    tested |= {
        f"llavolta-7b-{name}" for name in ("two", "three-deeper", "three-wider", "four-wider-deeper", "four-deeper-wider", "last-stage")
    }
    assert {path.stem for path in PAPERS.glob("*.yaml")} == tested


# ---- the plan against a real model

VISION = CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, image_size=32, patch_size=8)
TEXT = LlamaConfig(
    hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2, head_dim=8, vocab_size=64
)
BRIDGE = {"kind": "chain_of_sight", "scales": [[4, 2], [2, 1]], "width": 32, "head_dim": 8}


def tiny_recipe(folder: Path, **stage: object) -> Path:
    """Backbones that are nothing but a config.json."""
    for name, config in (("vision", VISION), ("text", TEXT)):
        config.save_pretrained(folder / name)
    document = {
        "name": "tiny",
        "output": str(folder / "run"),
        "model": {"vision": str(folder / "vision"), "text": str(folder / "text"), "bridge": BRIDGE, "vision_feature_layer": [1, 3]},
        "stages": [
            {
                "name": "one",
                "data": {"conversations": str(folder / "none.json"), "images": str(folder)},
                "batch_size": 4,
                "learning_rate": 1e-3,
                **stage,
            }
        ],
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(document))
    return path


def test_plan_equals_the_model_that_is_built(tmp_path: Path) -> None:
    """Of five tokens of text three are supervised, and get logits. The tower's last block runs, but nothing comes back through it."""
    recipe = tiny_recipe(tmp_path, train={"bridge": True, "tower": True, "lm": True})
    (stage,) = plan(recipe, text_tokens=5, answer_tokens=3).stages
    config = FoveateConfig(vision_config=VISION, text_config=TEXT, bridge=BRIDGE, vision_feature_layer=[1, 3], image_token_id=63)
    config._attn_implementation = "eager"
    model = FoveateForConditionalGeneration(config)
    unused = set(model.model.unused_tower_parameters())
    tower = {name: p.numel() for name, p in model.model.vision_tower.named_parameters()}
    assert stage.trainable["tower"] == sum(n for name, n in tower.items() if name not in unused)
    assert stage.trainable["bridge"] == sum(p.numel() for p in model.model.bridge.parameters())
    assert stage.trainable["lm"] == model.num_parameters() - sum(tower.values()) - stage.trainable["bridge"]
    assert stage.tokens_per_image == 6
    ids = torch.tensor([[1] + [63] * 6 + [2, 3, 4, 5]])
    inputs = {"input_ids": ids, "labels": torch.tensor([[IGNORED] * 8 + [3, 4, 5]]), "pixel_values": torch.randn(1, 3, 32, 32)}
    rows = SupervisedRows(model.get_output_embeddings())
    unfused = sdpa_kernel(SDPBackend.MATH)  # else attention is not counted
    with torch.no_grad(), unfused, rows.alone(inputs) as given, FlopCounterMode(display=False) as counter:
        model(**given)
    last = model.model.vision_tower.encoder.layers[3]
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as above:
        last(torch.randn(1, 17, VISION.hidden_size), None)
    assert above.get_total_flops() > 0
    assert sum(stage.forward_flops.values()) == counter.get_total_flops()
    assert sum(stage.training_flops.values()) == 3 * counter.get_total_flops() - 2 * above.get_total_flops()


def test_the_head_is_counted_at_what_is_supervised_or_said_not_to_be(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, train={"bridge": True, "lm": True})
    none, text, some = plan(recipe), plan(recipe, text_tokens=5), plan(recipe, text_tokens=5, answer_tokens=3)
    assert [found.stages[0].training_flops["head"] for found in (none, text, some)] == [3 * 2 * rows * 48 * 64 for rows in (0, 5, 3)]
    assert [found.answer_tokens for found in (none, text, some)] == [0, 5, 3]
    out = StringIO()
    for found in (none, text, some):
        print_plan(found, Console(file=out, width=300))
    assert [line.split()[1] for line in out.getvalue().splitlines() if line.startswith("Head: ")] == ["left", "logits", "logits"]
    assert "--answer-tokens says how many" in text.head
    with pytest.raises(FoveateError, match="answer_tokens=6, but a sample has text_tokens=5"):
        plan(recipe, text_tokens=5, answer_tokens=6)


def test_a_cycle_shares_its_part(tmp_path: Path) -> None:
    reducers = [{"share": "1/2", "reducer": "vcc:layer=1,stride=2"}, {"share": "1/2", "cycle": ["none", "random:keep=0.5"]}]
    (stage,) = plan(tiny_recipe(tmp_path, reducers=reducers)).stages
    assert [(part.share, part.visual_tokens) for part in stage.parts] == [
        (Fraction(1, 2), [6, 3, 3]),
        (Fraction(1, 4), [6, 6, 6]),
        (Fraction(1, 4), [3, 3, 3]),
    ]
    assert stage.mean_tokens == Fraction(12, 2) + Fraction(18, 4) + Fraction(9, 4)


# ---- several passes in a step

HALVES = [{"share": "1/2", "reducer": "random:keep=0.5"}, {"share": "1/2", "cycle": ["random:keep=0.5,layer=1", "random:keep=0.25"]}]


def by_account(path: Path, steps: int, text: int) -> float:
    """FLOPs of a stage's steps by what the trainer counts of each, for a sample with one image and so much text."""
    recipe = load_recipe(path)
    ((setup,), (stage,)) = walk(recipe, read_config), recipe.stages
    costs, passes, spent = Costs(setup.config, setup.trained), passes_of(recipe, stage, steps), 0.0
    assert passes is not None
    for number in range(steps):
        made = passes.plan(number, reducer_at(stage.parts, number, steps))
        spent += sum(costs.of(reducers, (setup.image,), text) for reducers in made.students)
        spent += sum(costs.of(reducers, (setup.image,), text, teaches=True) for reducers in made.teachers)
    return spent


@pytest.mark.parametrize(
    ("losses", "trained", "taught"),
    [
        (["mdist", {"loss": "rdist", "weight": 0.5}], 1, 1),
        (["dualspeed:slow=0.5"], 1, None),
        (["epic"], 1, 1),
        (["matryoshka:budgets=1/0.5/0.25"], 3, 0),
        (["matryoshka:budgets=0.5/0.25,draw=one", "mdist"], 1, 1),
    ],
)
def test_the_plan_has_the_passes_of_the_trainers_account(losses: list[object], trained: int, taught: int | None, tmp_path: Path) -> None:
    path = tiny_recipe(tmp_path, steps=8, losses=losses, reducers=HALVES)
    (stage,) = plan(path, text_tokens=5, answer_tokens=2).stages
    assert 8 * sum(stage.training_flops.values()) == by_account(path, 8, 5)
    assert sum(part.share for part in stage.parts if part.trained) == trained
    shares = sum(part.share for part in stage.parts if not part.trained)
    assert shares == taught if taught is not None else 0 < shares < 1
    assert all(part.training_flops == part.forward_flops for part in stage.parts if not part.trained)
    assert all(sum(part.training_flops.values()) > 1.5 * sum(part.forward_flops.values()) for part in stage.parts if part.trained)
    assert [note.startswith("`losses` make several passes in a step, a line each") for note in stage.notes] == [True]
    assert stage.mean_tokens == sum(part.share * part.tokens for part in stage.parts if part.trained) / trained
    out = StringIO()
    print_plan(plan(path), Console(file=out, width=300))
    assert out.getvalue().count(", no gradient") == sum(not part.trained for part in stage.parts)


def test_where_more_is_drawn_than_counted_it_is_said(tmp_path: Path) -> None:
    """Also where the number of steps is not known, and with it what is drawn."""
    path = tiny_recipe(tmp_path, steps=60, losses=["epic"], reducers=[{"share": 1, "reducer": "random:keep=0.5"}])
    (stage,) = plan(path, text_tokens=5).stages
    assert len([part for part in stage.parts if part.trained]) == 8
    assert "the passes of a step are drawn" in stage.notes[-1]
    assert 60 * float(sum(stage.training_flops.values())) == pytest.approx(by_account(path, 60, 5), rel=0.02)
    slow = ["stages.0.losses=['dualspeed:slow=0.1']"]
    assert len(plan(path, slow).stages[0].notes) == 1  # 60 steps are all looked at
    (stage,) = plan(path, [*slow, "stages.0.steps=null", "stages.0.epochs=1"]).stages
    assert (stage.steps, sum(part.share for part in stage.parts if part.trained)) == (None, 1)
    assert next(float(part.share) for part in stage.parts if not part.trained) == pytest.approx(0.1, abs=0.02)
    assert "the passes of a step are drawn" in stage.notes[-1]


@pytest.mark.parametrize("losses", ["[]", "['dualspeed:slow=0.5']"])
def test_a_run_logs_what_its_plan_says(losses: str, recipe_file: Callable[..., Path], root: Path) -> None:
    """Of samples that are all alike: each pass of each step, and logits where they are computed."""
    row = json.loads((root / "data.json").read_text())[1]
    (root / "alike.json").write_text(json.dumps([{**row, "id": str(number)} for number in range(4)]))
    name = f"planned-{len(losses)}"
    path = recipe_file(name, ONE)
    overrides = [f"stages.0.data.conversations={root}/alike.json", "stages.0.train.lm=true", "stages.0.batch_size=2"]
    overrides += ["stages.0.reducers=[{share: 1, reducer: 'random:keep=0.5,layer=1'}]", f"stages.0.losses={losses}"]
    opened = open_model(load_recipe(path, overrides), 0, None)
    sample = Conversations.open(root / "alike.json", root / "images")[0]
    batch = Collator(opened.processor, 2048)([sample])
    (image,), labels = sample.plans, batch["labels"]
    text, answers = labels.shape[1] - image.tokens, int((labels[:, 1:] != IGNORED).sum())
    assert 0 < answers < text
    (stage,) = plan(path, overrides, text_tokens=text, answer_tokens=answers).stages
    log = (train(path, overrides).parent / "log.jsonl").read_text().splitlines()
    assert stage.cost == json.loads(log[-1])["flops"]


# ---- the rest


def test_steps_come_from_the_data_where_it_is(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, epochs=2)
    assert (plan(recipe).stages[0].steps, plan(recipe).stages[0].share) == (None, None)
    (tmp_path / "none.json").write_text(json.dumps([{}] * 10))
    assert (plan(recipe).stages[0].steps, plan(recipe).stages[0].share) == (5, 1.0)
    assert plan(recipe, ["stages.0.data.limit=8"]).stages[0].steps == 4


def test_a_checkpoint_of_another_family(tmp_path: Path) -> None:
    config = LlavaConfig(vision_config=VISION, text_config=TEXT)
    config.save_pretrained(tmp_path / "llava")
    recipe = tiny_recipe(tmp_path)
    document = json.loads(recipe.read_text())
    document["model"] = {"checkpoint": str(tmp_path / "llava")}
    recipe.write_text(json.dumps(document))
    (stage,) = plan(recipe, text_tokens=3).stages
    assert stage.tokens_per_image == 16
    assert stage.trainable["bridge"] == trainable(config, Trained())["bridge"] == 32 * 48 + 48 * 48 + 2 * 48
    expected = predict(config, text_tokens=3, mode="train", trained=Trained(), head_tokens=3)
    assert sum(stage.training_flops.values()) == expected.total_flops
    with pytest.raises(FoveateError, match=r"`bridge` needs a Foveate model.*llava"):
        plan(recipe, ["stages.0.bridge={scales: [[4, 2]]}"])


# ---- printing and errors


def test_printing_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = PAPERS / "llavolta-7b-four-deeper-wider.yaml"
    out = StringIO()
    print_plan(plan(recipe), Console(file=out))
    text = out.getvalue()
    for shown in ("576 x2, 72 x30", "556.5%", "11,484", "160.5%", "288.0", "6,759,395,328", "2 FLOPs per multiply-add"):
        assert shown in text
    main(recipe, ["stages.1.steps=100"], json=True)
    document = json.loads(capsys.readouterr().out)
    assert document["stages"][1]["mean_tokens"] == 11484
    assert document["stages"][1]["steps"] == 100
    assert document["stages"][1]["parts"][0]["share"] == 0.25


def test_errors_name_stage_and_way_out(tmp_path: Path) -> None:
    recipe = PAPERS / "chain-of-sight-7b-80-1296.yaml"
    with pytest.raises(FoveateError, match=r"stage finetune: .*5 does not divide.*32 x 32"):
        plan(recipe, ["stages.1.bridge={scales: [[32, 16], [5, 4]]}"])
    with pytest.raises(FoveateError, match=r"stage finetune: .*grid of 16 x 16 patches, got 32 x 32"):
        plan(recipe, ["stages.1.bridge=null"])
    with pytest.raises(FoveateError, match=r"stage pretrain: LoRA targets nothing are not in the decoder layers.*q_proj"):
        plan(recipe, ["stages.0.train.lm.lora.targets=[nothing]"])
    with pytest.raises(FoveateError, match="hidden states 0 to 24"):
        plan(recipe, ["model.vision_feature_layer=[16, 25]"])
    with pytest.raises(
        FoveateError, match=r"model.vision: the vision tower .*nowhere.* could not be loaded: .*config.json, or one of openai"
    ):
        plan(recipe, [f"model.vision={tmp_path}/nowhere"])
