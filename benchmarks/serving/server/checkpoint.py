"""Checkpoints for a server: published architectures in small, with random weights, a processor and a chat template."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

WORDS = 4000
QWEN = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
MARKS = ("<|vision_start|>", "<|vision_end|>")


@dataclass(frozen=True)
class Shape:
    """what      it is, for a reader
    write     makes configuration and processor
    image     how the template writes one
    pictures  sizes of pictures (height, width) and how often each is sent
    methods   to measure, unless told
    length    of the longest prompt with its answer, in tokens
    """

    what: str
    write: Callable[[], tuple[Any, Any]]
    image: str
    pictures: dict[tuple[int, int], float]
    methods: tuple[str, ...]
    length: int


def words(*special: str, **named: str) -> PreTrainedTokenizerFast:
    """A word a token, so that a text of n words has n tokens."""
    vocabulary = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{number}" for number in range(WORDS))]
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(vocabulary)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>", extra_special_tokens=named
    )
    made.add_tokens([*special, *named.values()], special_tokens=True)
    return made


def sizes(width: int, mlp: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    return {"hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": layers, "num_attention_heads": heads, **more}


def llava(vision: dict[str, Any], text: dict[str, Any]) -> tuple[Any, Any]:
    known, side = words(image_token="<image>"), vision["image_size"]
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision),
        text_config=LlamaConfig(**text, vocab_size=len(known), max_position_embeddings=4096, eos_token_id=2, pad_token_id=0),
        image_token_id=known.convert_tokens_to_ids("<image>"),
    )
    images = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    of: dict[str, Any] = {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1, "image_token": "<image>"}
    return config, LlavaProcessor(images, known, patch_size=vision["patch_size"], **of)


def qwen(vision: dict[str, Any], text: dict[str, Any]) -> tuple[Any, Any]:
    known = words(*MARKS, **QWEN)
    ids = {
        name: known.convert_tokens_to_ids(token)
        for name, token in zip(("vision_start_token_id", "vision_end_token_id"), MARKS, strict=True)
    }
    ids |= {f"{name}_id": known.convert_tokens_to_ids(token) for name, token in QWEN.items()}
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]}
    text = {
        **text,
        "vocab_size": len(known),
        "rope_parameters": rope,
        "max_position_embeddings": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    limits: dict[str, Any] = {"size": {"shortest_edge": 56 * 56, "longest_edge": 896 * 896}}
    processor = Qwen2_5_VLProcessor(Qwen2VLImageProcessor(**limits), known, Qwen2VLVideoProcessor(**limits))
    return Qwen2_5_VLConfig(vision_config=vision, text_config=text, **ids), processor


SMALL = sizes(768, 2048, 8, 12)  # heads of 64
SHAPES = {
    "tiny": Shape(
        "a LLaVA of a million weights, to try the benchmark itself, and for many small requests",
        lambda: llava(sizes(64, 128, 3, 2, image_size=64, patch_size=8, projection_dim=64), sizes(128, 256, 2, 4)),
        "<image>",
        {(64, 64): 0.5, (48, 96): 0.5},
        ("divprune", "fastervlm", "visionzip"),
        256,
    ),
    "llava": Shape(
        "LLaVA-1.5's proportions at a hundredth of its size: a tower with a twentieth of the weights of the decoder layers, 576 tokens an "
        "image",
        lambda: llava(sizes(192, 768, 6, 3, image_size=336, patch_size=14, projection_dim=192), SMALL),
        "<image>",
        {(336, 336): 0.4, (480, 640): 0.4, (768, 1024): 0.2},
        ("divprune", "fastervlm", "visionzip"),
        1536,
    ),
    "qwen2.5-vl": Shape(
        "Qwen2.5-VL-7B's proportions at a hundredth of its size: a tower with a tenth of the weights of the decoder layers, which sees "
        "four patches for each token, and 256 to 1024 tokens an image",
        lambda: qwen(
            {
                "depth": 8,
                "hidden_size": 256,
                "num_heads": 4,
                "intermediate_size": 688,
                "out_hidden_size": 768,
                "fullatt_block_indexes": [3, 7],
            },
            {**SMALL, "num_key_value_heads": 3},
        ),
        "<|vision_start|><|image_pad|><|vision_end|>",
        {(448, 448): 0.4, (448, 672): 0.4, (896, 896): 0.2},
        ("divprune", "tome", "uniform"),
        2560,
    ),
}


def build(shape: Shape, folder: Path) -> None:
    """Writes the checkpoint, unless it is there."""
    if (folder / "done").is_file():
        return
    config, processor = shape.write()
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    weights = {_published(name): value for name, value in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    processor.chat_template = (
        "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
        + shape.image
        + " {% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
    )
    processor.save_pretrained(folder)
    (folder / "done").touch()


def _published(name: str) -> str:
    """CLIP towers lack a level of their names where they are saved anew, which vLLM asks for."""
    return name.replace("vision_tower.", "vision_tower.vision_model.") if "vision_model." not in name else name
