"""GOT-OCR 2.0: a tower like that of Segment Anything, with windows and relative positions, and two convolutions down to a sixteenth."""

from pathlib import Path
from typing import Any

from transformers import (
    GotOcr2Config,
    GotOcr2ForConditionalGeneration,
    GotOcr2ImageProcessor,
    GotOcr2Processor,
    Qwen2Config,
)
from transformers.models.got_ocr2.configuration_got_ocr2 import GotOcr2VisionConfig

from tests.conformance.family import Family, decoder, tokenizer

VISION: dict[str, Any] = {
    "hidden_size": 32,
    "output_channels": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "mlp_dim": 64,
    "image_size": 64,
    "patch_size": 4,
    "window_size": 6,  # does not divide the 16 patches of an edge, as the real 14 does not divide 64
    "global_attn_indexes": [2],
    "initializer_range": 0.1,
}


def build(folder: Path) -> None:
    words = tokenizer(["<|im_start|>", "<|im_end|>", "<img>", "</img>", "<imgpad>"])
    config = GotOcr2Config(
        vision_config=GotOcr2VisionConfig(**VISION),
        text_config=Qwen2Config(**decoder(words)),
        image_token_index=words.convert_tokens_to_ids("<imgpad>"),
        image_seq_length=16,
    )
    GotOcr2ForConditionalGeneration(config).save_pretrained(folder)
    GotOcr2Processor(GotOcr2ImageProcessor(size={"height": 64, "width": 64}), words).save_pretrained(folder)


FAMILIES = [
    Family(
        "got_ocr2",
        build,
        lambda pictures, words: "<img> <imgpad> </img> " * pictures + words,
        size=(72, 40),
        plain=False,
        options={"num_image_tokens": 16},
        attention="eager",
    )
]
