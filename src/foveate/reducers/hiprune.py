"""HiPrune: anchors and their neighbours by attention in a middle block of the tower, the rest by that in a deep one (arXiv 2508.00553).

    a_n, d_n = attention that patch n receives from all patches, mean over heads, in tower block `object` (a) and `layer` (d)
    anchors    the round(T alpha / 5) largest a_n of the tile
    buffers    the four neighbours of each anchor in the grid
    registers  the largest d_n of the others, until there are T

In raster order; nothing is mixed. No text, no [CLS].

Where this differs from the authors' code: a neighbour is one in the grid of the same tile (their index plus or minus 1 wraps to the next
row); of patches that are no raster none are neighbours. Where anchors and buffers are more than T, the anchors come first, then the
buffers with the largest d_n. round is half up. Newline tokens, where a model has them, stay.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from foveate.contract import BeforeLM, ReceivedAttention, Site, View
from foveate.reducers.common import choose, groups, integers, leaving, meant, shares
from foveate.reducers.ranker import Ranker
from foveate.tokens import top


@dataclass(frozen=True)
class HiPrune(Ranker):
    """Keeps `keep` of each tile's patches, of which the share `alpha` are anchors and buffers.

    object: tower block of the anchors, by default CLIP-L's (16 in Qwen's towers); layer: that of the rest, -2 is the last but one.
    scope: what `keep` counts in, "crop" (tile, the code's), "image" or "frame".
    """

    name: ClassVar[str] = "hiprune"
    paper: ClassVar[str] = "2508.00553"
    looks_at: ClassVar[frozenset[str]] = frozenset({"tower"})
    examples: ClassVar[tuple[str, ...]] = ("hiprune:keep=0.5,alpha=0.6,object=-1",)
    keeps_all: ClassVar[tuple[str, ...]] = ("hiprune:keep=1.0,object=-1",)
    multiplies: ClassVar[tuple[str, ...]] = ("hiprune:keep=0.5,object=-1",)
    keep: float | int = 0.25
    alpha: float = 0.1
    object: int = 9
    layer: int = -2
    scope: str = "crop"
    positions: str = field(default="renumber", kw_only=True)

    def check(self) -> None:
        super().check()
        shares(self, "alpha")
        integers(self, object=None, layer=None)
        choose(self, scope=("crop", "image", "frame"))

    def sites(self, layers: int) -> list[Site]:
        return [BeforeLM((ReceivedAttention(self.object), ReceivedAttention(self.layer)))]

    def score(self, view: View, stage: int = 0) -> Tensor:
        layout, deep = view.layout, view.signal(ReceivedAttention(self.layer))
        number = leaving(view, lambda arriving, original: self._anchors(self.left(arriving, original)), self.scope)
        anchor = top(layout, view.signal(ReceivedAttention(self.object)), 1.0, scope=self.scope, original_BN=number)
        buffer = torch.zeros_like(anchor).flatten()
        for slots in groups(layout, "image"):
            place, of = layout.place.flatten(0, 1)[slots, None], layout.place.flatten(0, 1)[slots[anchor.flatten()[slots]]]
            beside = (place[..., 3:] - of[:, 3:]).abs().sum(-1) == 1
            buffer[slots] = (beside & (place[..., :3] == of[:, :3]).all(-1)).any(1)
        # Attention is at most 1.
        return torch.where(anchor, float("inf"), torch.where(buffer.view_as(anchor), 2 + deep, deep))

    def _anchors(self, left: int) -> int:
        return int(meant(self.alpha) * left / 5 + meant(0.5))
