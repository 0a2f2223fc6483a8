"""Mistakes of any stage, and of any part of its schedule, are found before anything is trained."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Aimv2VisionConfig, AutoModel, AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, OPTConfig, Phi3Config, PhiConfig

from foveate.accounting.dry_run import skeleton
from foveate.errors import FoveateError
from foveate.model import FoveateConfig
from foveate.train import run, stages
from foveate.train.plan import main as show_plan
from foveate.train.plan import plan
from foveate.train.recipe import load_recipe
from foveate.train.run import main
from foveate.train.settings import Lora
from foveate.train.trainer import FoveateTrainer
from tests.situations.runs import Change, checkpoint, model, prepare, recipe, rows, save_llava, stage
from tests.train.tiny_training import tokenizer


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("before"))


@pytest.fixture(autouse=True)
def no_step(monkeypatch: pytest.MonkeyPatch, home: None) -> None:
    def step(*args: object) -> None:
        raise AssertionError("a training step was made")

    monkeypatch.setattr(FoveateTrainer, "training_step", step)


def lora(*targets: str) -> dict[str, Any]:
    return {"bridge": True, "lm": {"lora": {"rank": 2, "targets": list(targets)}}}


PARTS = [{"share": "3/4", "reducer": "none"}, {"share": "1/4", "reducer": "fastv:layer=7,keep=0.5"}]
LATE = [
    (stage(1, train=lora("q_proj", "v_prj")), "stage two: LoRA targets v_prj are not in the decoder layers, which have down_proj, gate_pr"),
    (stage(1, train=lora("query_key_value")), "stage two: LoRA targets query_key_value are not in the decoder layers"),
    (stage(1, train=lora("q_proj", "lm_head")), "LoRA targets lm_head are not in .*outside of them is trained by train.lm: true"),
    (stage(1, train=lora("embed_tokens")), "LoRA targets embed_tokens are not in .*trained by train.lm: true"),
    (stage(1, reducers=PARTS), "stage two: fastv:.*no decoder layer 7"),
    (stage(1, reducers=[{"share": 1, "cycle": ["none", "fastv:layer=2,keep=0.5"]}]), "stage two: fastv:.*no decoder layer 2 to act"),
    (stage(1, reducers=[{"share": 1, "reducer": "fastervlm:keep=0.5,layer=9"}]), "stage two: .*2 blocks"),
    (stage(1, reducers=[{"share": 1, "reducer": "downsample:keep=0.25"}]), "downsample acts on the image, .*stage's image_size instead"),
    (stage(1, bridge={"scales": [[5, 1]]}), "stage two: .*5"),
    (stage(1, bridge=None), "stage two: .*8 x 8"),
    (model(vision_feature_layer=[3]), r"vision_feature_layer \[3\]: the tower has hidden states 0 to 2"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), LATE)
def test_what_no_weights_are_needed_for_is_told_by_plan_and_train(root: Path, tmp_path: Path, change: Change, message: str) -> None:
    path = recipe(root, f"late-{tmp_path.name}", change)
    for told_by in (plan, main):
        with pytest.raises(FoveateError, match=message):
            told_by(path)
    assert not (root / f"late-{tmp_path.name}" / "log.jsonl").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (stage(1, optimizer="lion_32bit"), "stage two: optimizer lion_32bit cannot be used here: .*bitsandbytes"),
        (stage(1, optimizer="galore_adamw"), "stage two: optimizer galore_adamw cannot be used here"),
        (stage(1, adam_betas=[0.9, 1.5]), "stage two: optimizer adamw_torch cannot be used here: Invalid beta"),
        (stage(1, precision="fp16"), "stage two: precision fp16 cannot be trained here: needs a GPU"),
        (model(attn_implementation="flash_attention_2"), "attn_implementation flash_attention_2 cannot be used"),
        (stage(1, data={"conversations": "none.json"}), "none.json cannot be read"),
        (stage(1, validation={"conversations": "none.json", "every": 1}), "none.json cannot be read"),
        (stage(1, max_length=20), "cannot be trained on"),
    ],
)
def test_what_this_machine_or_the_data_lacks(root: Path, tmp_path: Path, change: Change, message: str) -> None:
    if torch.cuda.is_available() and "GPU" in message:
        pytest.skip("there is a GPU")
    with pytest.raises(FoveateError, match=message):
        main(recipe(root, f"lacks-{tmp_path.name}", change))


@pytest.mark.parametrize("output", ["file", "file/inside", "/proc/none"])
def test_an_output_that_cannot_be_written_to(root: Path, tmp_path: Path, output: str) -> None:
    (tmp_path / "file").write_text("here already")
    with pytest.raises(FoveateError, match="cannot be written to"):
        main(recipe(root, "unwritable", lambda made: made.update(output=str(tmp_path / output))))


# ---- families ------------------------------------------------------------------------------------------------------------------------

SHAPE = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
SEVEN = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (LlamaConfig(**SHAPE), SEVEN),
        (Phi3Config(**SHAPE, pad_token_id=0), {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}),
        (PhiConfig(**SHAPE), {"q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"}),
        (GPTNeoXConfig(**SHAPE), {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}),
        (OPTConfig(**{**SHAPE, "ffn_dim": 64, "word_embed_proj_dim": 32}), {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}),
    ],
)
def test_lora_without_targets_means_every_linear_map(root: Path, text: Any, names: set[str]) -> None:
    from transformers import CLIPVisionConfig

    vision = CLIPVisionConfig.from_pretrained(root / "tower")
    there = skeleton(FoveateConfig(vision_config=vision, text_config=text, bridge={"kind": "mlp"}, image_token_id=1))
    assert set(stages.lora_targets(there, Lora(rank=2))) == names
    with pytest.raises(FoveateError, match="LoRA targets nope, neither are not in the decoder layers"):
        stages.lora_targets(there, Lora(rank=2, targets=["nope", min(names), "neither"]))


def save_text(folder: Path, config: Any) -> str:
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def test_samples_longer_than_learned_positions(root: Path, tmp_path: Path) -> None:
    opt = OPTConfig(**{**SHAPE, "vocab_size": len(tokenizer())}, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=256)
    path = recipe(root, "opt", model(text=save_text(tmp_path / "opt", opt)))
    for told_by in (plan, main):
        with pytest.raises(FoveateError, match=r"stage one: max_length 2048 is more than the 256 positions that .* has learned; set"):
            told_by(path)
    assert plan(path, ["stages.0.max_length=256", "stages.1.max_length=200"]).stages[1].notes == []


def test_samples_longer_than_rotary_positions_are_possible_and_told(root: Path, tmp_path: Path) -> None:
    llama = LlamaConfig(**{**SHAPE, "vocab_size": len(tokenizer())}, max_position_embeddings=256)
    path = recipe(root, "rotary", model(text=save_text(tmp_path / "llama", llama)))
    assert "max_length: 256 cuts samples there" in plan(path).stages[1].notes[0]
    assert plan(path, [f"stages.{i}.max_length=256" for i in (0, 1)]).stages[1].notes == []


def test_a_tower_of_one_size(root: Path, tmp_path: Path) -> None:
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    folder = tmp_path / "aimv2"
    AutoModel.from_config(Aimv2VisionConfig(**shape, image_size=32, patch_size=8)).save_pretrained(folder)
    for told_by in (plan, main):
        with pytest.raises(FoveateError, match="stage two: Aimv2VisionModel was made for images of 32 x 32 pixels"):
            told_by(recipe(root, "one-size", model(vision=str(folder))))


def test_other_models_keep_their_size_and_their_bridge(root: Path, tmp_path: Path) -> None:
    llava = checkpoint(save_llava(tmp_path / "llava"))
    for change, message in [
        (stage(0, image_size=64), "stage one: a llava model takes images of 32 pixels, not image_size 64"),
        (stage(0, bridge={"scales": [[4, 1]]}), "stage one: `bridge` needs a Foveate model, but the checkpoint is a llava model"),
        (stage(0, reducers=[{"share": 1, "reducer": "fastv:layer=2,keep=0.5"}]), "stage one: .*no decoder layer 2"),
    ]:
        for told_by in (plan, main):
            with pytest.raises(FoveateError, match=message):
                told_by(recipe(root, "other", llava, change))


def test_what_only_the_model_itself_tells_is_tried_before_the_first_step(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the second stage, when the first has not begun."""
    monkeypatch.setattr(stages, "check_reducers", lambda reducers, config: None)
    change = stage(1, reducers=[{"share": "1/2", "reducer": "none"}, {"share": "1/2", "reducer": "fastv:layer=5,keep=0.5"}])
    with pytest.raises(FoveateError, match=r"stage two: fastv:layer=5,keep=0\.5 cannot run on this model: .*no decoder layer 5"):
        main(recipe(root, "tried", change))
    assert not (root / "tried" / "log.jsonl").exists()


# ---- parts, validation, plans --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"learning_rate": {"bridge": 1e-3, "lm": 1e-5}}, "by part has bridge, lm, but the stage trains bridge: give one rate to each"),
        ({"learning_rate": {"lm": 1e-3}}, "by part has lm, but the stage trains bridge"),
        ({"learning_rate": {"bridge": 0}}, r"stages.1.learning_rate.bridge: 0: input should be greater than 0"),
        ({"learning_rate": {"bridg": 1}}, "unknown key, did you mean bridge"),
        ({"learning_rate": {}}, "has no part"),
        ({"learning_rate": float("inf")}, "finite"),
        ({"validation": {"every": 2}}, "give either `conversations`"),
        ({"validation": {"conversations": "x.json"}}, "stages.1.validation.every: this key is required"),
    ],
)
def test_rates_and_validation_are_checked(root: Path, keys: dict[str, Any], message: str) -> None:
    path = recipe(root, "keys", stage(1, **keys))
    path.write_text(path.read_text().replace("Infinity", ".inf"))
    with pytest.raises(FoveateError, match=message):
        load_recipe(path)


def test_small_plans_show_numbers(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show_plan(recipe(root, "small"))
    shown = capsys.readouterr().out
    assert "MFLOPs and KiB of KV cache" in shown
    assert "0.000" not in shown.partition("by part of the model")[0]


def test_checkpoints_that_name_a_run(root: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    (output / "0-one" / "checkpoint-2").mkdir(parents=True)
    (output / "0-one" / "checkpoint-2" / "progress.json").write_text("{}")
    (output / "recipe.json").write_text("{}")
    with pytest.raises(FoveateError, match="is a run that has not ended"):
        stages.model_folder(str(output))
    with pytest.raises(FoveateError, match="is a checkpoint of a stage under way"):
        stages.model_folder(str(output / "0-one" / "checkpoint-2"))
    for place in (output / "final", output / "0-one" / "model"):
        place.mkdir()
        (place / "complete").touch()
        (place / "config.json").write_text("{}")
        assert stages.model_folder(str(place.parent)) == str(place) == stages.model_folder(str(place))
    assert stages.model_folder("llava-hf/llava") == "llava-hf/llava"


def test_the_rehearsal_changes_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(Path, "home", lambda: root)
    change = stage(1, reducers=[{"share": 1, "reducer": "random:keep=0.5"}]), stage(0, train={"bridge": True, "lm": lora("q_proj")["lm"]})
    main(recipe(root, "rehearsed", *change))
    monkeypatch.setattr(run, "rehearse", lambda *args: None)
    main(recipe(root, "unrehearsed", *change))
    assert rows(root / "rehearsed") == rows(root / "unrehearsed")
    assert json.loads((root / "rehearsed" / "recipe.json").read_text())["recipe"]["name"] == "tiny"
