"""Qwen3.5: a hybrid, whose fourth layer of five is a gated delta net; the others attend, with a gate and few rotary dimensions."""

from pathlib import Path
from typing import Any

from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3_5Config, Qwen3_5ForConditionalGeneration, Qwen3_5Tokenizer

from tests.conformance.families.qwen2_vl import MROPE, VISION, tokens
from tests.conformance.families.qwen3_vl import WIDTHS, processor, prompt
from tests.conformance.family import LAYERS, Family, decoder


def words(kind: Any = Qwen3_5Tokenizer) -> Any:
    """Letter by letter: the library loads no other tokenizer for this family than one of its own `kind`, whatever is saved."""
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    named = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    made = kind(vocab=letters, merges=[], pad_token="<|endoftext|>", extra_special_tokens=named)
    made.add_tokens(["<|vision_start|>", "<|vision_end|>", *named.values()], special_tokens=True)
    return made


def text(known: PreTrainedTokenizerFast) -> dict[str, Any]:
    """The arguments of the hybrid decoder's configuration."""
    linear = {
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "layer_types": ["full_attention"] * 3 + ["linear_attention", "full_attention"],
        "num_hidden_layers": LAYERS + 1,
    }
    return decoder(known, rope_parameters={**MROPE, "partial_rotary_factor": 0.5}, head_dim=16, **linear)


def build(folder: Path) -> None:
    known = words()
    config = Qwen3_5Config(vision_config={**VISION, **WIDTHS}, text_config=text(known), **tokens(known))
    Qwen3_5ForConditionalGeneration(config).save_pretrained(folder)
    processor(known).save_pretrained(folder)


FAMILIES = [
    Family("qwen3_5", build, prompt("image"), size=(48, 32)),
    Family("qwen3_5:video", build, prompt("video"), size=(48, 32), frames=4),
]
