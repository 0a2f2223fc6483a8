"""MiniCPM-OCR: MiniCPM-V 4.6 without the merger half way into the tower, so that pictures have four times its tokens."""

from pathlib import Path

from transformers import (
    MiniCPMOcrConfig,
    MiniCPMOcrForConditionalGeneration,
    MiniCPMOcrImageProcessor,
    MiniCPMOcrProcessor,
    MiniCPMOcrVideoProcessor,
)

from tests.conformance.families.minicpmv4_6 import parts, prompt, words
from tests.conformance.family import Family

PIXELS = {"patch_size": 4, "scale_resolution": 40}


def build(folder: Path) -> None:
    known = words()
    MiniCPMOcrForConditionalGeneration(MiniCPMOcrConfig(**parts(known))).save_pretrained(folder)
    MiniCPMOcrProcessor(MiniCPMOcrImageProcessor(**PIXELS), MiniCPMOcrVideoProcessor(**PIXELS), known).save_pretrained(folder)


FAMILIES = [Family("minicpm_ocr", build, prompt, size=(48, 32))]
