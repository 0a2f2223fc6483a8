"""V2Drop: the tokens that a layer has changed most (arXiv 2509.01552). Reads no attention weights.

    v_n = | h_k[n] - h_(k-1)[n] |     h_k: the states that enter decoder layer k
    in front of each of `layers` keep the largest v_n of each image, in raster order, at their original positions

The published schedule for LLaVA-1.5 is a half in front of layer 3, a half of these in front of 17, and one token in front of 22: 288, 144
and 1 of 576, which is 203 on average over 32 layers. For Qwen2-VL: layers=3-16-22, keep=0.25-0.05-1. Schedules of other models are not
published.

Where this differs from the authors' code: its share 0, which leaves one token, is written 1 here, the number; shares are rounded half up
(theirs down). Every image of every row is ranked on its own; theirs takes 576 tokens at a fixed place in any prompt longer than that.
What a model adds to the states in front of a layer (DeepStack) has entered it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from foveate.contract import FromLayer, Site, States, View
from foveate.reducers.common import check_entries, cutting_layers, numbers, spelled, states
from foveate.reducers.ranker import Ranker
from foveate.tokens import budget


@dataclass(frozen=True)
class V2Drop(Ranker):
    """Keeps `keep` of each image's arriving tokens in front of each decoder layer of `layers`.

    keep    one entry a layer, "0.5-0.5-1" or (0.5, 0.5, 1): shares of what arrives, or numbers of tokens; one entry holds at each
    layers  indices (0-based, at least 1, ascending): "3-17-22" or (3, 17, 22)
    """

    name: ClassVar[str] = "v2drop"
    paper: ClassVar[str] = "2509.01552"
    looks_at: ClassVar[frozenset[str]] = frozenset({"text", "states"})
    examples: ClassVar[tuple[str, ...]] = ("v2drop:keep=0.5,layers=2", "v2drop:keep=0.5-3,layers=1-3")
    keeps_all: ClassVar[tuple[str, ...]] = ("v2drop:keep=1.0,layers=1-3",)
    keep: float | int | str | Sequence[float | int] = "0.5-0.5-1"
    layers: int | str | Sequence[int] = "3-17-22"

    def check(self) -> None:
        super().check()
        check_entries(self.name, self.keep, numbers(self.name, "keep", self.keep), self._layers)

    def canonical(self) -> dict[str, Any]:
        return {"keep": spelled(numbers(self.name, "keep", self.keep)), "layers": spelled(self._layers)}

    @property
    def _layers(self) -> list[int]:
        return cutting_layers(self.name, self.layers)

    def sites(self, layers: int) -> list[Site]:
        return [FromLayer(k, (States(k - 1),)) for k in self._layers]

    def score(self, view: View, stage: int = 0) -> Tensor:
        before: Tensor = view.signal(States(self._layers[stage] - 1))
        return (states(self.name, view).detach().float() - before).norm(dim=-1)

    def left(self, arriving: int, original: int, stage: int = 0) -> int:
        entries = numbers(self.name, "keep", self.keep)
        return budget(entries[min(stage, len(entries) - 1)], arriving)
