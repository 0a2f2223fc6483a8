"""Random selection: the baseline that every scored method has to beat, and the cheapest way to teach a model that tokens can be missing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from foveate.contract import BeforeLM, Cut, FromLayer, Noise, Site, View
from foveate.reducers.base import Reducer
from foveate.reducers.common import integers
from foveate.tokens import TokenMap, budget, top


@dataclass(frozen=True)
class Random(Reducer):
    """Keeps a random `keep` of each image's tokens, in raster order, in front of decoder layer `layer` (0: before the LM).

    The choice is a hash of `seed` and the image's content, so that it does not depend on the batch.
    """

    name: ClassVar[str] = "random"
    paper: ClassVar[str] = "-"
    keep: float | int = 0.25
    layer: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        budget(self.keep, 1)
        integers(self, layer=0, seed=0)

    def sites(self, layers: int) -> list[Site]:
        return [FromLayer(self.layer, (Noise(self.seed),)) if self.layer else BeforeLM((Noise(self.seed),))]

    def reduce(self, view: View, stage: int = 0) -> Cut:
        return Cut(TokenMap.keep(view.layout, top(view.layout, view.signal(Noise(self.seed)), self.keep)))

    def count(self, arriving: int, original: int, stage: int = 0) -> int:
        return budget(self.keep, arriving)
