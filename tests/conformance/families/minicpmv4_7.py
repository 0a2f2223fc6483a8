"""MiniCPM-V 4.7: MiniCPM-V 4.6 with positions in rows and columns of the picture that all slices lie in."""

from pathlib import Path

from transformers import (
    MiniCPMV4_6ImageProcessor,
    MiniCPMV4_6VideoProcessor,
    MiniCPMV4_7Config,
    MiniCPMV4_7ForConditionalGeneration,
    MiniCPMV4_7Processor,
)

from tests.conformance.families.minicpmv4_6 import PIXELS, parts, prompt, words
from tests.conformance.family import Family


def build(folder: Path) -> None:
    known = words()
    marks = {"image_start_id": "<image>", "image_end_id": "</image>", "slice_start_id": "<slice>", "slice_end_id": "</slice>"}
    ids = {name: known.convert_tokens_to_ids(token) for name, token in marks.items()}
    # The tokens of words know no line breaks: no token is one.
    config = MiniCPMV4_7Config(**parts(known), **ids, newline_id=known.pad_token_id)
    MiniCPMV4_7ForConditionalGeneration(config).save_pretrained(folder)
    MiniCPMV4_7Processor(MiniCPMV4_6ImageProcessor(**PIXELS), MiniCPMV4_6VideoProcessor(**PIXELS), known).save_pretrained(folder)


FAMILIES = [Family("minicpmv4_7", build, prompt, size=(96, 48))]
