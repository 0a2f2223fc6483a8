"""PP-Chart2Table: the model of GOT-OCR 2.0 under a configuration of its own, with a processor that fills in no placeholders."""

from pathlib import Path

from transformers import (
    GotOcr2ForConditionalGeneration,
    PPChart2TableConfig,
    PPChart2TableImageProcessor,
    PPChart2TableProcessor,
    Qwen2Config,
)
from transformers.models.pp_chart2table.configuration_pp_chart2table import PPChart2TableVisionConfig

from tests.conformance.families.got_ocr2 import VISION
from tests.conformance.family import Family, decoder, tokenizer


def build(folder: Path) -> None:
    words = tokenizer(["<img>", "</img>", "<imgpad>"])
    config = PPChart2TableConfig(
        vision_config=PPChart2TableVisionConfig(**VISION),
        text_config=Qwen2Config(**decoder(words)),
        image_token_index=words.convert_tokens_to_ids("<imgpad>"),
        image_seq_length=16,
    )
    GotOcr2ForConditionalGeneration(config).save_pretrained(folder)
    PPChart2TableProcessor(PPChart2TableImageProcessor(size={"height": 64, "width": 64}), words).save_pretrained(folder)


def prompt(pictures: int, words: str) -> str:
    return f"<img> {'<imgpad> ' * 16}</img> " * pictures + words


FAMILIES = [Family("pp_chart2table", build, prompt, size=(72, 40), plain=False, attention="eager")]
