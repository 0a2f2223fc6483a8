"""GLM-4.5V: the towers of GLM-4.1V; a decoder with two of four experts for every token, and one that every token meets, but in its first
layer."""

from pathlib import Path

from transformers import Glm4vImageProcessor, Glm4vMoeConfig, Glm4vMoeForConditionalGeneration, Glm4vProcessor, Glm4vVideoProcessor

from tests.conformance.families.glm4v import parts, prompt, words
from tests.conformance.families.qwen2_vl import PIXELS
from tests.conformance.family import Family

EXPERTS = {"moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1}


def build(folder: Path) -> None:
    known = words()
    named = parts(known)
    named["text_config"] |= EXPERTS
    Glm4vMoeForConditionalGeneration(Glm4vMoeConfig(**named)).save_pretrained(folder)
    videos = Glm4vVideoProcessor(**PIXELS, do_sample_frames=False)
    Glm4vProcessor(Glm4vImageProcessor(**PIXELS), known, videos).save_pretrained(folder)


FAMILIES = [Family("glm4v_moe", build, prompt("image"), size=(48, 32))]
