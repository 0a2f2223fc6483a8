"""Granite Docling: square tiles as in Idefics3, pixel-shuffled, with DeepStack features of three tower blocks; Granite."""

from pathlib import Path

from transformers import (
    GraniteDoclingConfig,
    GraniteDoclingForConditionalGeneration,
    GraniteDoclingImageProcessor,
    GraniteDoclingProcessor,
)

from tests.conformance.family import Family, decoder, tokenizer

TOKENS = ["<fake_token_around_image>", "<global-img>", *(f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5))]
VISION = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 32, "patch_size": 4}
DEEPSTACK = {"scale_factor": 2, "out_hidden_size": 32, "deepstack_visual_indexes": [0, 1, 2], "initializer_range": 0.2}
SCALES = {"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "attention_multiplier": 0.35, "logits_scaling": 1.0}


def build(folder: Path) -> None:
    words = tokenizer(TOKENS, image_token="<image>")
    config = GraniteDoclingConfig(
        vision_config={**VISION, **DEEPSTACK},
        text_config=decoder(words, **SCALES),
        image_token_id=words.convert_tokens_to_ids("<image>"),
        pad_token_id=words.pad_token_id,
    )
    GraniteDoclingForConditionalGeneration(config).save_pretrained(folder)
    images = GraniteDoclingImageProcessor(size={"height": 32, "width": 32}, max_patches=4)
    GraniteDoclingProcessor(images, words, image_seq_len=16).save_pretrained(folder)


FAMILIES = [Family("granite_docling", build, lambda pictures, words: "<image>" * pictures + words, size=(64, 32), nested=True)]
