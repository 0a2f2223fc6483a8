"""How the engine asks a policy: in float32, whatever the model runs in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

import foveate
from foveate.cache_policies.base import Keeping
from foveate.contract import CacheView
from tests.tiny import LAYERS, ROWS, Batch, llava


@dataclass(frozen=True)
class Watching(Keeping):
    """Keeps the first tokens, and notes whether autocast is on while it scores."""

    name: ClassVar[str] = "watching"
    seen: ClassVar[list[bool]] = []

    def score(self, view: CacheView) -> Tensor:
        self.seen.append(torch.is_autocast_enabled("cpu"))
        return -view.place.float()


def test_scores_are_float32_under_autocast_too() -> None:
    Watching.seen.clear()
    model = llava()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), foveate.attach(model, cache=Watching(keep=0.5)):
        model(**Batch(ROWS[:1]).singles[0], use_cache=True)
        assert torch.is_autocast_enabled("cpu")
    assert Watching.seen == [False] * LAYERS
