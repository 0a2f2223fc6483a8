"""LFM3-VL: a tower whose blocks convolve over the picture or attend, 2x2 patches a token; a hybrid decoder, whose fourth layer
of five is a short convolution."""

from pathlib import Path

from transformers import (
    Lfm3Config,
    Lfm3VlConfig,
    Lfm3VlForConditionalGeneration,
    Lfm3VlProcessor,
    Qwen2VLImageProcessor,
    Qwen3VLVideoProcessor,
)

from tests.conformance.families.qwen2_vl import PIXELS, prompt, tokens, words
from tests.conformance.family import LAYERS, Family, decoder

VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 1}


def build(folder: Path) -> None:
    known = words()
    types = ["full_attention", "sliding_attention", "full_attention", "conv", "full_attention"]
    config = Lfm3VlConfig(
        vision_config={**VISION, "patch_size": 4, "layer_types": ["conv", *["full_attention"] * 3], "initializer_range": 0.2},
        text_config=Lfm3Config(**decoder(known, head_dim=8, sliding_window=16, num_hidden_layers=LAYERS + 1, layer_types=types)),
        projector_hidden_size=64,
        **tokens(known),
    )
    Lfm3VlForConditionalGeneration(config).save_pretrained(folder)
    videos = Qwen3VLVideoProcessor(**PIXELS, do_sample_frames=False)
    Lfm3VlProcessor(Qwen2VLImageProcessor(**PIXELS), known, videos).save_pretrained(folder)


FAMILIES = [Family("lfm3_vl", build, prompt("image"), size=(48, 32))]
