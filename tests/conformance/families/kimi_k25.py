"""Kimi K2.5: a tower of any resolution, 2x2 patches a token; a decoder with latent attention and, but for its first layer, experts."""

from pathlib import Path

from transformers import (
    DeepseekV3Config,
    Kimi_K25Config,
    Kimi_K25ForConditionalGeneration,
    Kimi_K25ImageProcessor,
    Kimi_K25Processor,
    Kimi_K25VideoProcessor,
)

from tests.conformance.family import Family, decoder, tokenizer

VISION = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64, "patch_size": 4}
PLACES = {"pos_emb_height": 8, "pos_emb_width": 8, "pos_emb_time": 4}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12}
EXPERTS = {"moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
PIXELS = {"patch_size": 4, "size": {"max_height": 512, "max_width": 512}}


def build(folder: Path) -> None:
    words = tokenizer(["<|media_begin|>", "<|media_content|>", "<|media_end|>"], image_token="<|media_pad|>", video_token="<|video|>")
    config = Kimi_K25Config(
        vision_config={**VISION, **PLACES},
        text_config=DeepseekV3Config(
            **decoder(words, num_key_value_heads=4, first_k_dense_replace=1, num_mtp_layers=0, **LATENT, **EXPERTS)
        ),
        projection_hidden_size=32,
        image_token_id=words.convert_tokens_to_ids("<|media_pad|>"),
        video_token_id=words.convert_tokens_to_ids("<|video|>"),
        vision_start_token_id=words.convert_tokens_to_ids("<|media_begin|>"),
        vision_end_token_id=words.convert_tokens_to_ids("<|media_end|>"),
    )
    Kimi_K25ForConditionalGeneration(config).save_pretrained(folder)
    Kimi_K25Processor(Kimi_K25ImageProcessor(**PIXELS), words, Kimi_K25VideoProcessor(**PIXELS)).save_pretrained(folder)


FAMILIES = [Family("kimi_k25", build, lambda pictures, words: "<|media_pad|> " * pictures + words, size=(48, 32))]
