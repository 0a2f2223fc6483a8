"""Qwen2.5-Omni's thinker: the parts of Qwen2.5-VL beside a tower for sound, which no prompt here has."""

from pathlib import Path

from transformers import Qwen2_5OmniProcessor, Qwen2_5OmniThinkerConfig, Qwen2_5OmniThinkerForConditionalGeneration

from tests.conformance.families.qwen2_5_vl import TOWER
from tests.conformance.families.qwen2_vl import MROPE, prompt
from tests.conformance.families.qwen3_omni_moe_thinker import SOUND, ids, parts, words
from tests.conformance.family import Family, decoder


def build(folder: Path) -> None:
    known = words()
    config = Qwen2_5OmniThinkerConfig(
        vision_config=TOWER,
        audio_config={**SOUND, "output_dim": 32},
        text_config=decoder(known, rope_parameters=MROPE),
        audio_end_token_id=known.convert_tokens_to_ids("<|audio_end|>"),
        **ids(known, "index"),
    )
    Qwen2_5OmniThinkerForConditionalGeneration(config).save_pretrained(folder)
    Qwen2_5OmniProcessor(*parts(known)).save_pretrained(folder)


FAMILIES = [Family("qwen2_5_omni_thinker", build, prompt("image"), size=(48, 32))]
