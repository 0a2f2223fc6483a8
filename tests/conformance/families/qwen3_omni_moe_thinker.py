"""Qwen3-Omni's thinker: the parts of Qwen3-VL with experts, DeepStack and all, beside a tower for sound, which no prompt here has."""

from pathlib import Path
from typing import Any

from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3OmniMoeProcessor,
    Qwen3OmniMoeThinkerConfig,
    Qwen3OmniMoeThinkerForConditionalGeneration,
    WhisperFeatureExtractor,
)

from tests.conformance.families.qwen2_vl import MROPE, PIXELS, VISION, prompt
from tests.conformance.families.qwen3_vl import DEEPSTACK, WIDTHS
from tests.conformance.family import Family, decoder, tokenizer

SOUND = {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 64, "num_mel_bins": 8, "n_window": 4}
EXPERTS = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
NAMED = {
    "image_token": "<|image_pad|>",
    "audio_token": "<|audio_pad|>",
    "video_token": "<|video_pad|>",
    "vision_bos_token": "<|vision_start|>",
    "vision_eos_token": "<|vision_end|>",
    "audio_bos_token": "<|audio_start|>",
    "audio_eos_token": "<|audio_end|>",
}


def words() -> PreTrainedTokenizerFast:
    return tokenizer(**NAMED)


def ids(known: PreTrainedTokenizerFast, end: str) -> dict[str, int]:
    """The placeholders, as the configuration names them; `end` is "index" or "id"."""
    placeholders = {f"{name}_token_{end}": known.convert_tokens_to_ids(f"<|{name}_pad|>") for name in ("image", "audio", "video")}
    starts = {f"{name}_start_token_id": known.convert_tokens_to_ids(f"<|{name}_start|>") for name in ("vision", "audio")}
    return {**placeholders, **starts}


def parts(known: PreTrainedTokenizerFast) -> tuple[Any, ...]:
    """What the processor is made of, as it takes them."""
    return Qwen2VLImageProcessor(**PIXELS), Qwen2VLVideoProcessor(**PIXELS), WhisperFeatureExtractor(feature_size=8), known


def build(folder: Path) -> None:
    known = words()
    config = Qwen3OmniMoeThinkerConfig(
        vision_config={**VISION, **WIDTHS, **DEEPSTACK},
        audio_config={**SOUND, "output_dim": 32, "downsample_hidden_size": 8},
        text_config=decoder(known, rope_parameters=MROPE, head_dim=8, **EXPERTS),
        **ids(known, "id"),
    )
    Qwen3OmniMoeThinkerForConditionalGeneration(config).save_pretrained(folder)
    Qwen3OmniMoeProcessor(*parts(known)).save_pretrained(folder)


FAMILIES = [Family("qwen3_omni_moe_thinker", build, prompt("image"), size=(48, 32))]
