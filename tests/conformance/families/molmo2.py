"""Molmo 2: a small view of the whole picture, then overlapping crops of a large one, pooled by attention into two rasters; features are
added to the embeddings of their slots, and all slots of pictures see each other both ways."""

from pathlib import Path

from transformers import Molmo2Config, Molmo2ForConditionalGeneration, Molmo2ImageProcessor, Molmo2Processor, Molmo2VideoProcessor

from tests.conformance.family import Family, decoder, tokenizer

MARKS = ["<im_patch>", "<im_col>", "<im_start>", "<low_res_im_start>", "<frame_start>", "<im_end>", "<frame_end>", "<im_low>"]
WIDTHS = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 64}
PIXELS = {"size": {"height": 24, "width": 24}, "patch_size": 4}


def build(folder: Path) -> None:
    words = tokenizer(MARKS, image_token="<|image|>", video_token="<|video|>")
    ids = {name: words.convert_tokens_to_ids(f"<{name}>") for name in ("im_patch", "im_start", "low_res_im_start", "im_end")}
    config = Molmo2Config(
        vision_config={**WIDTHS, "num_hidden_layers": 3, "image_size": [24, 24], "patch_size": 4, "initializer_range": 0.2},
        adapter_config={**WIDTHS, "vision_feature_layer": [2, 0], "text_hidden_size": 32, "initializer_range": 0.2},
        text_config=decoder(words, head_dim=8, additional_vocab_size=0),
        image_patch_id=ids["im_patch"],
        image_start_token_id=ids["im_start"],
        low_res_image_start_token_id=ids["low_res_im_start"],
        image_end_token_id=ids["im_end"],
    )
    Molmo2ForConditionalGeneration(config).save_pretrained(folder)
    images = Molmo2ImageProcessor(**PIXELS, overlap_margins=[1, 1])
    Molmo2Processor(images, Molmo2VideoProcessor(**PIXELS), words).save_pretrained(folder)


FAMILIES = [Family("molmo2", build, lambda pictures, words: "<|image|>" * pictures + words, size=(40, 24))]
