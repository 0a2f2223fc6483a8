"""Random selection: the baseline that every scored method has to beat, and the cheapest way to teach a model that tokens can be missing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from foveate.contract import Noise, Site, View
from foveate.reducers.common import in_front_of, integers
from foveate.reducers.ranker import Ranker


@dataclass(frozen=True)
class Random(Ranker):
    """Keeps a random `keep` of each image's tokens, in raster order, in front of decoder layer `layer` (0: before the LM).

    The choice is a hash of `seed` and the image's content, so that it does not depend on the batch.
    """

    name: ClassVar[str] = "random"
    paper: ClassVar[str] = "-"
    examples: ClassVar[tuple[str, ...]] = ("random:keep=0.5", "random:keep=0.3,positions=renumber")
    keeps_all: ClassVar[tuple[str, ...]] = ("random:keep=1.0",)
    keep: float | int = 0.25
    layer: int = 0
    seed: int = 0

    def check(self) -> None:
        super().check()
        integers(self, layer=0, seed=0)

    def sites(self, layers: int) -> list[Site]:
        return [in_front_of(self.layer, Noise(self.seed))]

    def score(self, view: View, stage: int = 0) -> Tensor:
        scores: Tensor = view.signal(Noise(self.seed))
        return scores
