"""Janus: SigLIP, an MLP, Llama; beside them what draws pictures token by token, which nothing here asks for."""

from pathlib import Path

from transformers import JanusConfig, JanusForConditionalGeneration, JanusImageProcessor, JanusProcessor, LlamaConfig

from tests.conformance.family import Family, decoder, tokenizer

VISION = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "mlp_ratio": 2.0, "image_size": 32, "patch_size": 8}
DRAWS = {"embed_dim": 8, "num_embeddings": 16, "latent_channels": 8, "base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1}


def build(folder: Path) -> None:
    words = tokenizer(image_token="<image_placeholder>", boi_token="<begin_of_image>", eoi_token="<end_of_image>")
    config = JanusConfig(
        vision_config={**VISION, "projection_dim": 32, "num_image_tokens": 16, "initializer_range": 0.2},
        vq_config={**DRAWS, "projection_dim": 32, "image_token_embed_dim": 32},
        text_config=LlamaConfig(**decoder(words)),
        image_token_id=words.convert_tokens_to_ids("<image_placeholder>"),
    )
    JanusForConditionalGeneration(config).save_pretrained(folder)
    images = JanusImageProcessor(size={"height": 32, "width": 32})
    JanusProcessor(images, words, num_image_tokens=16).save_pretrained(folder)


FAMILIES = [Family("janus", build, lambda pictures, words: "<image_placeholder>" * pictures + words, size=(48, 32))]
