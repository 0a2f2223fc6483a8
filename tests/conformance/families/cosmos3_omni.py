"""Cosmos 3: the parts of Qwen3-VL in a model of another name."""

from pathlib import Path

from transformers import Cosmos3OmniConfig, Cosmos3OmniForConditionalGeneration, Qwen3VLTextConfig

from tests.conformance.families.qwen2_vl import MROPE, VISION, tokens, words
from tests.conformance.families.qwen3_vl import DEEPSTACK, WIDTHS, processor, prompt
from tests.conformance.family import Family, decoder


def build(folder: Path) -> None:
    known = words()
    config = Cosmos3OmniConfig(
        vision_config={**VISION, **WIDTHS, **DEEPSTACK, "model_type": "qwen3_vl_vision"},
        text_config=Qwen3VLTextConfig(**decoder(known, rope_parameters=MROPE, head_dim=8)),
        **tokens(known),
    )
    Cosmos3OmniForConditionalGeneration(config).save_pretrained(folder)
    processor(known).save_pretrained(folder)


FAMILIES = [Family("cosmos3_omni", build, prompt("image"), size=(48, 32))]
