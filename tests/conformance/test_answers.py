"""What the harness adapter says of families whose processors want their images in different ways: as with prompts written out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from foveate.engine.attach import attach
from foveate.integrations.lmms_eval.answering import answer, conversation, generation, question
from tests.conformance.family import families, picture

CHOSEN = ("llava", "llava_next", "qwen2_5_vl", "gemma3", "internvl", "smolvlm", "lfm2_vl", "foveate")
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}MARK{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)


@pytest.mark.parametrize("reducer", ["none", "random:keep=0.5"])
@pytest.mark.parametrize("name", CHOSEN)
def test_answers_are_those_of_prompts_by_hand(name: str, reducer: str, tmp_path: Path) -> None:
    family = families()[name]
    model, processor = family.load(tmp_path)
    processor.chat_template = TEMPLATE.replace("MARK", family.prompt(1, ""))
    rows = family.rows()
    pictures = [[picture(family.size, row.seed * 10 + i) for i in range(row.pictures)] for row in rows]
    asked = [conversation(question(row.words, shown)) for row, shown in zip(rows, pictures, strict=True)]
    options = generation({}, 5)
    with torch.inference_mode(), attach(model, reducer) as run:
        found = answer(model, processor, run, asked[:2], options) + answer(model, processor, run, asked[2:], options)
        for row, one in zip(rows, found, strict=True):
            inputs = family.inputs(processor, [row])
            ids = model.generate(**inputs, max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=2)
            assert one.text == processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
            whole = inputs["input_ids"].shape[1]
            if reducer == "none":
                assert one.input_tokens == whole
            else:
                assert (one.input_tokens < whole) == bool(row.pictures)
            assert bool(one.visual_tokens) == bool(row.pictures)
