"""Qwen3.5 with experts in its decoder: two of four for every token, and one that every token meets."""

from pathlib import Path

from transformers import Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration

from tests.conformance.families.qwen2_vl import VISION, tokens
from tests.conformance.families.qwen3_5 import text, words
from tests.conformance.families.qwen3_vl import WIDTHS, processor, prompt
from tests.conformance.family import Family


def build(folder: Path) -> None:
    known = words()
    experts = {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
    config = Qwen3_5MoeConfig(vision_config={**VISION, **WIDTHS}, text_config={**text(known), **experts}, **tokens(known))
    Qwen3_5MoeForConditionalGeneration(config).save_pretrained(folder)
    processor(known).save_pretrained(folder)


FAMILIES = [Family("qwen3_5_moe", build, prompt("image"), size=(48, 32))]
