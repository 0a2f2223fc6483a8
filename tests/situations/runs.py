"""Small runs for the tests of training: backbones, data and recipes as dictionaries, which the tests change."""

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

from tests.train.tiny_training import save_backbones, save_data, tokenizer

Change = Callable[[dict[str, Any]], Any]


def prepare(folder: Path) -> Path:
    torch.set_num_threads(1)
    save_backbones(folder)
    save_data(folder)
    return folder


def document(root: Path, output: str) -> dict[str, Any]:
    """Two stages of three steps, of which the second grows the bridge; JSON is YAML."""
    data = {"conversations": str(root / "data.json"), "images": str(root / "images")}
    stage = {"data": data, "train": {"bridge": True}, "steps": 3, "batch_size": 4, "learning_rate": 1e-2}
    return {
        "name": "tiny",
        "output": str(root / output),
        "model": {
            "vision": str(root / "tower"),
            "text": str(root / "lm"),
            "bridge": {"kind": "chain_of_sight", "scales": [[4, 2], [2, 1]], "width": 32, "head_dim": 16},
        },
        "log_steps": 1,
        "workers": 0,
        "stages": [
            {"name": "one", **deepcopy(stage)},
            {"name": "two", **deepcopy(stage), "image_size": 64, "bridge": {"scales": [[8, 2], [4, 2], [2, 1]]}},
        ],
    }


def recipe(root: Path, output: str, *changes: Change) -> Path:
    """The recipe's file, after `changes` to its document."""
    made = document(root, output)
    for change in changes:
        change(made)
    path = root / f"{output}.yaml"
    path.write_text(json.dumps(made, indent=1))
    return path


def stage(number: int, **keys: Any) -> Change:
    return lambda made: made["stages"][number].update(keys)


def model(**keys: Any) -> Change:
    return lambda made: made["model"].update(keys)


def stages(count: int) -> Change:
    return lambda made: made.update(stages=made["stages"][:count])


def checkpoint(folder: Path) -> Change:
    """Another model, as it is: only the first stage, without a bridge of ours."""

    def change(made: dict[str, Any]) -> None:
        made["model"] = {"checkpoint": str(folder)}
        made["stages"] = made["stages"][:1]

    return change


def rows(output: Path) -> list[dict[str, Any]]:
    """The log without what the clock says."""
    found = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in ("seconds", "images_per_s")} for row in found]


def same(one: Path, other: Path) -> bool:
    a, b = (load_file(run / "final" / "model.safetensors") for run in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) and rows(one) == rows(other)


def save_llava(folder: Path) -> Path:
    """LLaVA as transformers has it, with 16 tokens an image of 32 pixels."""
    words, size = tokenizer(), {"height": 32, "width": 32}
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**shape, image_size=32, patch_size=8, projection_dim=16),
        text_config=LlamaConfig(**shape, vocab_size=len(words), pad_token_id=words.pad_token_id),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    pictures = CLIPImageProcessorPil(size=size, crop_size=size)
    how = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    LlavaProcessor(pictures, words, **how, chat_template=words.chat_template).save_pretrained(folder)
    return folder
