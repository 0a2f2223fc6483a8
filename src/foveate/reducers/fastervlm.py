"""FasterVLM: the patches that the vision tower's [CLS] token attends to (arXiv 2412.01818 v1).

    s_n = mean over heads of the attention [CLS] -> patch n in the layer whose output feeds the projector
    keep the T largest s_n of each tile, in raster order; nothing is mixed

The text is not looked at and [CLS] itself is not passed on. `keep` is per tile ("crop"), as in the paper's tables for tiled
models; an image without tiles is one tile. In a tower without [CLS] the score is the attention received (see `ClsAttention`).

- `site="lm"` (the paper's): in front of the language model.
- `site="tower"` (ours): in front of the tower's next block, so that the blocks after `layer` run on the patches that stay. `layer` counts
  from the first block then, and has to have one after it.

Where this differs from the authors' code: nothing is known in the rule. Their code gives tiled images no newline tokens; here
newline tokens, where a model has them, stay. Their code takes all attention maps from an eager tower; one row is enough.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from foveate.contract import BeforeLM, ClsAttention, InEncoder, Site, View
from foveate.errors import FoveateError
from foveate.reducers.common import choose, integers
from foveate.reducers.ranker import Ranker


@dataclass(frozen=True)
class FasterVLM(Ranker):
    """Keeps the `keep` (share or number) patches of each tile with the highest [CLS] attention in tower block `layer`.

    scope: what `keep` counts in, "crop" (tile, the paper's), "image" or "frame".
    site: "lm" or "tower", where each crop (or frame) is by itself, and `scope` cannot be chosen.
    """

    name: ClassVar[str] = "fastervlm"
    paper: ClassVar[str] = "2412.01818"
    looks_at: ClassVar[frozenset[str]] = frozenset({"tower"})
    examples: ClassVar[tuple[str, ...]] = ("fastervlm:keep=0.5",)
    keeps_all: ClassVar[tuple[str, ...]] = ("fastervlm:keep=1.0",)
    multiplies: ClassVar[tuple[str, ...]] = ("fastervlm:keep=0.5", "fastervlm:keep=0.5,layer=1,site=tower")
    keep: float | int = 0.25
    layer: int = -2
    scope: str = "crop"
    site: str = "lm"
    positions: str = field(default="renumber", kw_only=True)

    def check(self) -> None:
        super().check()
        integers(self, layer=None)
        choose(self, scope=("crop", "image", "frame"), site=("lm", "tower"))
        if self.site == "tower" and self.scope != "crop":
            raise FoveateError(
                f'{self.name}: scope="{self.scope}" is not possible at site="tower", where each crop is by itself; leave it out'
            )
        if self.site == "tower" and self.layer < 0:
            raise FoveateError(
                f'{self.name}: layer={self.layer} is not possible at site="tower"; count the blocks from the first one, as in layer=7'
            )

    def sites(self, layers: int) -> list[Site]:
        if self.site == "tower":
            return [InEncoder(self.layer + 1, (ClsAttention(self.layer),))]
        return [BeforeLM((ClsAttention(self.layer),))]

    def score(self, view: View, stage: int = 0) -> Tensor:
        scores: Tensor = view.signal(ClsAttention(self.layer))
        return scores
