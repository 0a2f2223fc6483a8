"""GLM-GA: the model of GLM-4.6V under a configuration of its own, with processors that round pictures otherwise."""

from pathlib import Path

from transformers import Glm46VForConditionalGeneration, Glm46VProcessor, GlmgaConfig, GlmgaImageProcessor, GlmgaVideoProcessor

from tests.conformance.families.glm4v import parts, prompt, words
from tests.conformance.families.qwen2_vl import PIXELS
from tests.conformance.family import Family


def build(folder: Path) -> None:
    known = words()
    named = parts(known)
    named["vision_config"]["model_type"], named["text_config"]["model_type"] = "glm4v_vision", "glm4v_text"
    Glm46VForConditionalGeneration(GlmgaConfig(**named)).save_pretrained(folder)
    videos = GlmgaVideoProcessor(**PIXELS, do_sample_frames=False)
    Glm46VProcessor(GlmgaImageProcessor(**PIXELS), known, videos).save_pretrained(folder)


FAMILIES = [Family("glmga", build, prompt("image"), size=(48, 32))]
