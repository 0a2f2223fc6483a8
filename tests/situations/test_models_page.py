"""docs/models.md speaks of every image-text model of the library, and models that cannot be served say why."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

import foveate
from foveate.anatomy import TESTED

PAGE = (Path(__file__).parent.parent.parent / "docs" / "models.md").read_text(encoding="utf-8")


def named(heading: str) -> list[str]:
    """The architectures of a section's table or list, each where it is named first."""
    section = re.split(r"^## ", PAGE, flags=re.MULTILINE)
    (text,) = [part for part in section if part.startswith(heading)]
    rows = [line for line in text.splitlines() if line.startswith("| ")] or [text.partition(". Nobody")[0]]
    return [name for row in rows for name in re.findall(r"`([\w.-]+)`", row)]


def test_every_model_of_the_library_is_spoken_of_once() -> None:
    tested, refused, untried = named("Tested"), named("Not served"), named("Not tested")
    assert sorted(tested) == sorted(TESTED)
    assert len({*tested, *refused, *untried}) == len(tested) + len(refused) + len(untried)
    assert {*tested, *refused, *untried} == {*MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, "foveate"}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("florence2", "reads pictures with an encoder and answers with a decoder that looks at it from outside"),
        ("mllama", "not a vision-language model that interleaves visual tokens with text, or its family needs a reader of its own"),
        ("git", "not a vision-language model that interleaves visual tokens with text, or its family needs a reader of its own"),
    ],
)
def test_what_cannot_be_served_says_why(name: str, reason: str) -> None:
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(name))
    with pytest.raises(foveate.FoveateError, match=reason):
        foveate.attach(model, "random:keep=0.5")
