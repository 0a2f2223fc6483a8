"""Muse Glimmer: a tower that puts its patches in order of windows and back, two of its blocks seeing all of them; windows in the decoder,
whose last layer sees everything and has no positions."""

from pathlib import Path

from transformers import (
    MuseGlimmerConfig,
    MuseGlimmerForConditionalGeneration,
    MuseGlimmerImageProcessor,
    MuseGlimmerProcessor,
    MuseGlimmerVideoProcessor,
)

from tests.conformance.family import Family, decoder, tokenizer

VISION = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64, "patch_size": 4}
WINDOWS = {"pos_emb_height": 4, "pos_emb_width": 4, "layer_types": ["window_attention", "full_attention"] * 2}
MARKS = ["image_start", "image_end", "vid_start", "vid_end", "vid_frame_separator", "patch", "video"]


def build(folder: Path) -> None:
    words = tokenizer([f"<|{mark}|>" for mark in MARKS])
    config = MuseGlimmerConfig(
        vision_config={**VISION, **WINDOWS, "max_position_embeddings": 16},
        text_config=decoder(words, head_dim=8, sliding_window=16),
        image_token_id=words.convert_tokens_to_ids("<|patch|>"),
        video_token_id=words.convert_tokens_to_ids("<|video|>"),
        out_hidden_size=128,
        projector_hidden_size=64,
    )
    MuseGlimmerForConditionalGeneration(config).save_pretrained(folder)
    images, videos = MuseGlimmerImageProcessor(patch_size=4), MuseGlimmerVideoProcessor(patch_size=4)
    MuseGlimmerProcessor(images, videos, words).save_pretrained(folder)


FAMILIES = [Family("muse_glimmer", build, lambda pictures, words: "<|patch|>" * pictures + words, size=(48, 32))]
