"""MiniCPM-V 4.6: a picture and its slices, each of its own shape and an item of its own; a tower that merges its patches half way in and
again behind it; the hybrid decoder of Qwen3.5."""

from pathlib import Path
from typing import Any

from transformers import (
    MiniCPMV4_6Config,
    MiniCPMV4_6ForConditionalGeneration,
    MiniCPMV4_6ImageProcessor,
    MiniCPMV4_6Processor,
    MiniCPMV4_6VideoProcessor,
    PreTrainedTokenizerFast,
    Qwen3_5TextConfig,
)

from tests.conformance.families.qwen3_5 import text
from tests.conformance.family import Family, tokenizer

VISION = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 64, "patch_size": 4}
PIXELS = {"patch_size": 4, "scale_resolution": 48}
NAMED = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "image_start_token": "<image>",
    "image_end_token": "</image>",
    "slice_start_token": "<slice>",
    "slice_end_token": "</slice>",
    "image_id_start_token": "<image_id>",
    "image_id_end_token": "</image_id>",
}


def words() -> PreTrainedTokenizerFast:
    return tokenizer(**NAMED)


def parts(known: PreTrainedTokenizerFast) -> dict[str, Any]:
    """The arguments of a configuration of this line."""
    return {
        "vision_config": VISION,
        "text_config": Qwen3_5TextConfig(**text(known)),
        "insert_layer_id": 1,
        "image_token_id": known.convert_tokens_to_ids("<|image_pad|>"),
        "video_token_id": known.convert_tokens_to_ids("<|video_pad|>"),
    }


def build(folder: Path) -> None:
    known = words()
    MiniCPMV4_6ForConditionalGeneration(MiniCPMV4_6Config(**parts(known))).save_pretrained(folder)
    MiniCPMV4_6Processor(MiniCPMV4_6ImageProcessor(**PIXELS), MiniCPMV4_6VideoProcessor(**PIXELS), known).save_pretrained(folder)


def prompt(pictures: int, words: str) -> str:
    return "<|image_pad|> " * pictures + words


FAMILIES = [Family("minicpmv4_6", build, prompt, size=(96, 48))]
