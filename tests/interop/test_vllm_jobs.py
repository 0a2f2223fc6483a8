"""`foveate generate --engine vllm` answers a file as transformers does. Needs the environment that `make serve-test` builds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoProcessor

from foveate.batch import Done, Job, generate
from tests.conformance.family import picture
from tests.interop.engine import LENGTH, alone
from tests.interop.served import MODELS

pytest.importorskip("vllm")

OPTIONS = {"enforce_eager": True, "max_model_len": LENGTH, "max_num_batched_tokens": 48, "max_num_seqs": 8, "block_size": 32}


def test_answers_are_those_of_transformers(tmp_path: Path) -> None:
    """A file with two images in a row, none in another, and one that is missing."""
    torch.manual_seed(0)
    model = tmp_path / "llava"
    model.mkdir()
    MODELS["llava"].build(model)
    processor = AutoProcessor.from_pretrained(model)
    processor.chat_template = "{% for message in messages %}<s>{{ message['content'] }}{% endfor %}"
    processor.save_pretrained(model)
    for number in range(3):
        picture((64, 48), number).save(tmp_path / f"{number}.png")
    rows: list[dict[str, Any]] = [
        {"image": f"{n % 3}.png", "question": question} for n, question in enumerate(["what is it", "the cat", "a"])
    ]
    rows += [
        {"images": ["0.png", "1.png"], "question": "which one"},
        {"question": "small or big"},
        {"image": "none.png", "question": "what"},
    ]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    job = Job(str(tmp_path / "data.json"), str(model), "divprune:keep=0.25", max_new_tokens=12, batch_size=4)
    one = generate(job, tmp_path / "one", progress=False)
    served: Done = alone(_served, job, tmp_path / "vllm")
    assert one is not None
    assert served.path.read_bytes() == one.path.read_bytes()
    assert [name for name, _ in served.failed] == ["row 5"]


def _served(job: Job, out: Path) -> Done | None:
    return generate(job, out, engine="vllm", options=OPTIONS, progress=False)
