"""HyperCLOVA X Vision: the tower of Qwen2.5-VL, windows and all, one linear map, and a decoder with plain positions and scaled branches."""

from pathlib import Path

from transformers import (
    GPT2Tokenizer,
    HyperCLOVAXConfig,
    HyperCLOVAXVisionV2Config,
    HyperCLOVAXVisionV2ForConditionalGeneration,
    HyperCLOVAXVisionV2Processor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from tests.conformance.families.qwen2_5_vl import TOWER
from tests.conformance.families.qwen2_vl import PIXELS, tokens
from tests.conformance.families.qwen3_5 import words
from tests.conformance.family import Family, decoder


def build(folder: Path) -> None:
    known = words(GPT2Tokenizer)
    named = {name: token for name, token in tokens(known).items() if name in ("image_token_id", "video_token_id")}
    config = HyperCLOVAXVisionV2Config(
        vision_config={**TOWER, "model_type": "qwen2_5_vl_vision"}, text_config=HyperCLOVAXConfig(**decoder(known)), **named
    )
    HyperCLOVAXVisionV2ForConditionalGeneration(config).save_pretrained(folder)
    HyperCLOVAXVisionV2Processor(Qwen2VLImageProcessor(**PIXELS), known, Qwen2VLVideoProcessor(**PIXELS)).save_pretrained(folder)


FAMILIES = [Family("hyperclovax_vision_v2", build, lambda pictures, words: "<|image_pad|> " * pictures + words, size=(48, 32))]
