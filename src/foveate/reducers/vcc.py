"""Visual Context Compressor: average pooling of visual tokens inside the language model (LLaVolta, arXiv 2406.20092).

    h  (n tokens) --K layers--> mean of every S consecutive visual states --other layers--> (n - L + L // S tokens)

Groups are runs of `stride` tokens in raster order inside one image; the last L mod S tokens are dropped. Text keeps its
positions; a pooled token takes the truncated mean of its group's.

Where this differs from the authors' code: the mask follows the survivors instead of being cut to length (theirs is wrong
under left padding); position means are exact integers (theirs are float16, wrong from position 1024 on); rows without an
image stay in the batch; images are pooled each on its own at any batch size; and labels need no gathering, since the
outputs keep the caller's length.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

from foveate.contract import Cut, FromLayer, Site, View, Workload
from foveate.reducers.base import Reducer
from foveate.reducers.common import integers, nearest_stride
from foveate.tokens import TokenMap


@dataclass(frozen=True)
class VCC(Reducer):
    """Pools visual tokens by `stride` in front of decoder layer index `layer` (0-based).

    A layer that the model does not have never pools, and stride 1 changes nothing: both are the paper's "no compression".
    """

    name: ClassVar[str] = "vcc"
    paper: ClassVar[str] = "2406.20092"
    beyond: ClassVar[bool] = True
    amounts: ClassVar[tuple[str, ...]] = ("stride",)
    examples: ClassVar[tuple[str, ...]] = (
        "vcc:layer=2,stride=2",
        "vcc:layer=0,stride=4",
        "vcc:layer=2,stride=3",
        "vcc:layer=0,stride=8,positions=renumber",
        "vcc:layer=1,stride=2,positions=renumber+vcc:layer=3,stride=4,positions=renumber",
        "vcc:layer=1,stride=2+vcc:layer=3,stride=4",
    )
    # No model has a layer 999.
    keeps_all: ClassVar[tuple[str, ...]] = ("vcc:layer=2,stride=1", "vcc:layer=0,stride=1", "vcc:layer=999,stride=8")
    layer: int = 2
    stride: int = 8

    def check(self) -> None:
        super().check()
        integers(self, layer=0, stride=1)

    def at(self, keep: float) -> Self:
        """Of the strides that keep 1/1, 1/2, 1/3, … the nearest to 1 / `keep`."""
        return replace(self, stride=nearest_stride(self.name, keep, power=1))

    def sites(self, layers: int) -> list[Site]:
        return [FromLayer(self.layer)]

    def reduce(self, view: View, stage: int = 0) -> Cut:
        return Cut(TokenMap.pool(view.layout, self.stride))

    def count(self, work: Workload, stage: int = 0) -> list[int]:
        return [arriving // self.stride for arriving in work.arriving]
