"""A model that shares no name with the library's families, read by a reader of its user's."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

import foveate
from foveate import FoveateError
from foveate.anatomy import Anatomy, forget_reader, register_reader

PICTURE, PATCHES = 90, 16


class Postcard(nn.Module):
    """Looks at pictures in a way of its own and writes them into the sequence by hand."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        text = LlamaConfig(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64, vocab_size=99)
        self.brain = LlamaModel(text)
        self.eyes = nn.Conv2d(3, 32, 8, 8)
        self.mouth = nn.Linear(32, 99)
        self.config = SimpleNamespace(model_type="postcard", text=text)

    def look(self, pictures: Tensor) -> list[Tensor]:
        return list(self.eyes(pictures).flatten(2).transpose(1, 2))

    def forward(self, input_ids: Tensor, pictures: Tensor | None = None, attention_mask: Tensor | None = None, **more: Any) -> Tensor:
        states = self.brain.embed_tokens(input_ids)
        if pictures is not None:
            states = states.masked_scatter((input_ids == PICTURE)[..., None], torch.cat(self.look(pictures)))
        out: Tensor = self.mouth(self.brain(inputs_embeds=states, attention_mask=attention_mask, **more).last_hidden_state)
        return out


class PostcardAnatomy(Anatomy):
    encodings = {"look": "image"}

    def rasters(self, given: dict[str, Any]) -> list[tuple[int, int]]:
        return [(picture.shape[-2] // 8, picture.shape[-1] // 8) for picture in given["pictures"]]

    def placeholders(self, input_ids: Tensor | None, inputs_embeds: Tensor) -> Tensor:
        assert input_ids is not None
        return input_ids == PICTURE


def reader(model: nn.Module) -> Anatomy | None:
    return PostcardAnatomy(model, model.brain, model.brain.layers) if isinstance(model, Postcard) else None


@pytest.fixture
def known() -> Iterator[None]:
    register_reader(reader)
    yield
    forget_reader(reader)


def call(rows: int = 1) -> dict[str, Tensor]:
    ids = torch.tensor([[5, 6] + [PICTURE] * PATCHES + [1, 2, 3]] * rows)
    return {"input_ids": ids, "pictures": torch.randn(rows, 3, 32, 32, generator=torch.Generator().manual_seed(1))}


def test_without_its_reader_the_error_says_what_to_do() -> None:
    with pytest.raises(FoveateError, match="register_reader"):
        foveate.attach(Postcard(), "divprune:keep=0.5")


@pytest.mark.parametrize("reducer", ["divprune:keep=0.5", "random:keep=0.5", "fastv:keep=0.5,layer=2", "vcc:layer=2,stride=2"])
def test_a_model_of_ones_own(known: None, reducer: str) -> None:
    model = Postcard().eval()
    with torch.no_grad():
        bare = model(**call(2))
        with foveate.attach(model, "random:keep=1.0", shortcuts=False):
            assert torch.equal(model(**call(2)), bare)
        with foveate.attach(model, reducer) as run:
            together = model(**call(2))
            assert run.last.visual_tokens[-1] == 2 * PATCHES // 2
            one = call(2)
            torch.testing.assert_close(model(one["input_ids"][:1], one["pictures"][:1]), together[:1])
            rows = run.last.entered.place[0, 2:, 3:][:PATCHES].tolist()
            assert rows == [[r, c] for r in range(4) for c in range(4)]
        assert torch.equal(model(**call(2)), bare)


def test_a_tower_without_attention_is_told(known: None) -> None:
    with pytest.raises(FoveateError, match="no vision tower by a known name"):
        foveate.attach(Postcard(), "fastervlm:keep=0.5")
