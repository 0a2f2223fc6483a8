"""Cohere Compass: the tower of Qwen3-VL with its DeepStack, and a decoder whose two branches stand side by side."""

from pathlib import Path

from transformers import (
    CohereCompassConfig,
    CohereCompassForConditionalGeneration,
    CohereCompassImageProcessor,
    CohereCompassProcessor,
    CohereCompassVideoProcessor,
)

from tests.conformance.families.qwen2_vl import MROPE, PIXELS, VISION
from tests.conformance.families.qwen3_vl import DEEPSTACK, WIDTHS
from tests.conformance.family import Family, decoder, tokenizer

TOKENS = {name: f"<|{name.upper()}|>" for name in ("image_pad", "video_pad", "vision_start", "vision_end")}


def build(folder: Path) -> None:
    words = tokenizer(list(TOKENS.values()))
    ids = {name: words.convert_tokens_to_ids(token) for name, token in TOKENS.items()}
    config = CohereCompassConfig(
        vision_config={**VISION, **WIDTHS, **DEEPSTACK},
        text_config=decoder(words, rope_parameters={"full_attention": MROPE}, logit_scale=1.0),
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
    )
    CohereCompassForConditionalGeneration(config).save_pretrained(folder)
    videos = CohereCompassVideoProcessor(**PIXELS, do_sample_frames=False)
    CohereCompassProcessor(CohereCompassImageProcessor(**PIXELS), words, videos).save_pretrained(folder)


FAMILIES = [
    Family("cohere_compass", build, lambda pictures, words: "<|VISION_START|><|IMAGE_PAD|><|VISION_END|>" * pictures + words, size=(48, 32))
]
