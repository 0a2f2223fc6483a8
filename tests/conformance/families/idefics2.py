"""Idefics2: SigLIP at the picture's own shape, padded to the largest; learned queries make as many tokens of each picture; Mistral."""

from pathlib import Path

from torch import nn
from transformers import Idefics2Config, Idefics2ForConditionalGeneration, Idefics2ImageProcessor, Idefics2Processor, MistralConfig

from tests.conformance.family import Family, decoder, tokenizer

VISION = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 64, "patch_size": 8}
QUERIES = {"resampler_n_latents": 12, "resampler_depth": 1, "resampler_n_heads": 2, "resampler_head_dim": 16, "num_key_value_heads": 2}


def build(folder: Path) -> None:
    words = tokenizer(["<end_of_utterance>"], image_token="<image>", image_boundary_token="<fake_token_around_image>")
    config = Idefics2Config(
        vision_config={**VISION, "initializer_range": 0.2},
        perceiver_config={**QUERIES, "hidden_size": 32, "initializer_range": 0.2},
        text_config=MistralConfig(**decoder(words, head_dim=8, sliding_window=None)),
        image_token_id=words.convert_tokens_to_ids("<image>"),
    )
    model = Idefics2ForConditionalGeneration(config)
    nn.init.normal_(model.model.connector.perceiver_resampler.latents)  # all alike until trained
    model.save_pretrained(folder)
    images = Idefics2ImageProcessor(size={"shortest_edge": 32, "longest_edge": 64})
    Idefics2Processor(images, words, image_seq_len=12).save_pretrained(folder)


FAMILIES = [Family("idefics2", build, lambda pictures, words: "<image>" * pictures + words, size=(48, 32), nested=True)]
