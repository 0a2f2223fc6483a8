"""Qwen2.5-VL: a tower with windows, 2 x 2 tokens wide in a picture of 4 x 6, so that the order of its patches is not the picture's."""

from pathlib import Path
from typing import Any

from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from tests.conformance.families.qwen2_vl import MROPE, PIXELS, VISION, prompt, tokens, words
from tests.conformance.family import Family, decoder

WIDTHS: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 32}
TOWER: dict[str, Any] = {**VISION, **WIDTHS, "depth": 4, "window_size": 16, "fullatt_block_indexes": [1, 3]}


def build(folder: Path) -> None:
    known = words()
    # Without a clock a video has 24 frames a second: its two pairs of frames are two positions apart.
    clock = {"tokens_per_second": 24}
    config = Qwen2_5_VLConfig(vision_config={**TOWER, **clock}, text_config=decoder(known, rope_parameters=MROPE), **tokens(known))
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    Qwen2_5_VLProcessor(Qwen2VLImageProcessor(**PIXELS), known, Qwen2VLVideoProcessor(**PIXELS)).save_pretrained(folder)


FAMILIES = [
    Family("qwen2_5_vl", build, prompt("image"), size=(48, 32)),
    Family("qwen2_5_vl:video", build, prompt("video"), size=(48, 32), frames=4),
]
