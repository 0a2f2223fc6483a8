"""Bad input on the command line: one message that names the thing and the way out, exit code 2, no traceback."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from ruamel.yaml import YAML
from tokenizers import Tokenizer, models
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.command import refused

CHAT = "{% for m in messages %}{{ '<user>' if m['role'] == 'user' else '<assistant>' }}{{ m['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny tower and a tiny LM whose tokenizer has no image token, as from_pretrained would find them."""
    folder = tmp_path_factory.mktemp("backbones")
    vision = CLIPVisionConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8)
    CLIPVisionModel(vision).save_pretrained(folder / "tower")
    CLIPImageProcessorPil(size={"height": 32, "width": 32}, do_center_crop=False).save_pretrained(folder / "tower")
    words = {w: i for i, w in enumerate(["<unk>", "<pad>", "</s>", "<user>", "<assistant>", "what", "a", "cat"])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")), unk_token="<unk>", pad_token="<pad>", eos_token="</s>"
    )
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder / "lm")
    text = LlamaConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=len(words))
    LlamaForCausalLM(text).save_pretrained(folder / "lm")
    return folder


@pytest.fixture
def recipe(tmp_path: Path, backbones: Path) -> dict[str, Any]:
    images = tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (32, 32), "red").save(images / "a.png")
    turns = [{"from": "human", "value": "<image>\nwhat"}, {"from": "gpt", "value": "a cat"}]
    (tmp_path / "data.json").write_text(json.dumps([{"id": "a", "image": "a.png", "conversations": turns}]))
    return {
        "name": "tiny",
        "output": str(tmp_path / "run"),
        "model": {
            "vision": str(backbones / "tower"),
            "text": str(backbones / "lm"),
            "bridge": {"kind": "chain_of_sight"},
            "vision_feature_layer": [1, 2],
        },
        "stages": [
            {
                "name": "one",
                "data": {"conversations": str(tmp_path / "data.json"), "images": str(images)},
                "bridge": {"scales": [[4, 2], [2, 1]]},
                "steps": 1,
                "batch_size": 1,
                "learning_rate": 0.001,
            }
        ],
    }


def write(recipe: dict[str, Any], folder: Path) -> str:
    path = folder / "recipe.yaml"
    YAML().dump(recipe, path)
    return str(path)


def test_train_and_plan_no_such_file(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("train", "plan"):
        assert "nowhere.yaml cannot be read: No such file" in refused([command, "nowhere.yaml"], capsys)


def test_train_and_plan_unknown_key(recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe["stages"][0]["learning_rat"] = recipe["stages"][0].pop("learning_rate")
    for command in ("train", "plan"):
        message = refused([command, write(recipe, tmp_path)], capsys)
        assert "recipe.yaml:" in message
        assert "did you mean learning_rate?" in message


def test_shares_that_do_not_add_up(recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe["stages"][0]["reducers"] = [{"share": "1/2", "reducer": "vcc:layer=1,stride=2"}, {"share": "1/3", "reducer": "none"}]
    for command in ("train", "plan"):
        assert "must add up to 1, but 1/2 + 1/3 = 5/6" in refused([command, write(recipe, tmp_path)], capsys)


def test_a_window_that_does_not_divide_the_grid(recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe["stages"][0]["bridge"] = {"scales": [[4, 2], [3, 1]]}
    for command in ("train", "plan"):
        message = refused([command, write(recipe, tmp_path)], capsys)
        assert "3" in message
        assert "4" in message
        assert "divide" in message


def test_a_corrupt_png(recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe["model"]["add_image_token"] = True
    picture = tmp_path / "images" / "a.png"
    picture.write_bytes(picture.read_bytes()[:-30])
    assert "a.png" in refused(["train", write(recipe, tmp_path)], capsys)


def test_a_language_model_without_the_image_token(recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(["train", write(recipe, tmp_path)], capsys)
    assert "<image>" in message
    assert "add_image_token" in message


def test_an_unknown_reducer_and_a_bad_override(recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(recipe, tmp_path)
    assert "unknown reducer 'vvc'" in refused(["train", path, 'stages.0.reducers=[{share: 1, reducer: "vvc:layer=1"}]'], capsys)
    assert "expected key.sub=value" in refused(["train", path, "seed"], capsys)


def test_data_refuses_a_foreign_folder_and_impossible_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    assert str(tmp_path) in refused(["data", "scenes", str(tmp_path), "--train", "2", "--test", "1"], capsys)
    assert (tmp_path / "mine.txt").read_text() == "precious"
    assert "--train" in refused(["data", "scenes", str(tmp_path / "new"), "--train", "0"], capsys)


def test_eval_without_model_or_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nowhere" in refused(["eval", str(tmp_path / "model"), "--data", str(tmp_path / "nowhere")], capsys)
    (tmp_path / "test.json").write_text("[]")
    assert "test.json" in refused(["eval", str(tmp_path / "model"), "--data", str(tmp_path)], capsys)


def test_as_a_program(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "foveate", "plan", str(tmp_path / "no.yaml")], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
