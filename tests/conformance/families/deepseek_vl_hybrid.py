"""DeepSeek-VL with two towers: SigLIP sees a picture small, one like that of Segment Anything sees it large; their features are joined."""

from pathlib import Path

from transformers import (
    DeepseekVLHybridConfig,
    DeepseekVLHybridForConditionalGeneration,
    DeepseekVLHybridImageProcessor,
    DeepseekVLHybridProcessor,
    LlamaConfig,
    SamVisionConfig,
    SiglipVisionConfig,
)

from tests.conformance.families.deepseek_vl import VISION
from tests.conformance.family import Family, decoder, tokenizer

LARGE = {"hidden_size": 32, "output_channels": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "mlp_dim": 64, "num_pos_feats": 8}
WINDOWS = {"image_size": 64, "patch_size": 4, "window_size": 6, "global_attn_indexes": [1, 2]}


def build(folder: Path) -> None:
    words = tokenizer(image_token="<image_placeholder>")
    config = DeepseekVLHybridConfig(
        vision_config=SiglipVisionConfig(**VISION, vision_use_head=False),
        high_res_vision_config=SamVisionConfig(**LARGE, **WINDOWS, initializer_range=0.1),
        text_config=LlamaConfig(**decoder(words)),
        image_token_id=words.convert_tokens_to_ids("<image_placeholder>"),
    )
    DeepseekVLHybridForConditionalGeneration(config).save_pretrained(folder)
    small, large = ({"height": side, "width": side} for side in (32, 64))
    images = DeepseekVLHybridImageProcessor(size=small, high_res_size=large)
    DeepseekVLHybridProcessor(images, words, num_image_tokens=16).save_pretrained(folder)


FAMILIES = [Family("deepseek_vl_hybrid", build, lambda pictures, words: "<image_placeholder>" * pictures + words, size=(48, 32))]
