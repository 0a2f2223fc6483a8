"""PixelPrune: blocks of pixels that their neighbours foretell never enter the vision tower (arXiv 2604.00886).

    X       the pixels of the patches that become one token; A the block to its left, B above it, C above A
    a ~ b   the largest difference of two blocks' values is at most `tau`
    foretold  in the first row: A; in the first column: B; else B where C ~ A and not C ~ B, and A where not so
    X stays unless it is ~ what is foretold; the first block always stays

With tau = 0 what goes is an exact repetition. With more a block that went counts, for those after it, as what was foretold of it: so no
block that goes is farther than `tau` from the one that it stands for; with `anchored=false` its own values count, and errors may add up.
How many tokens stay depends on the picture: many of a page or a screen are equal, few of a photograph. No question, no model.

Blocks go in front of the tower's first block, so that neither the tower nor the language model runs on them; all else keeps its place.

Where this differs from the authors' code: `tau` is in values as the processor has made them, of which the difference of black and white is
2 in Qwen3-VL and about 3.7 in models with CLIP's statistics (theirs undoes that, so it is 1); of a video each frame (or pair of them, where
two are one patch) is a picture of its own (theirs refuses videos); the two scans that compare with the last block that stayed are not here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foveate.contract import Cut, InEncoder, Pixels, Site, View, Workload
from foveate.errors import FoveateError, NotApplicable, Reason
from foveate.reducers.base import Reducer
from foveate.reducers.common import choose, groups
from foveate.tokens import TokenMap


@dataclass(frozen=True)
class PixelPrune(Reducer):
    """Drops blocks of pixels that are as their neighbours foretell, before the vision tower.

    tau: the largest difference that counts as none; at -1.0 everything stays.
    distance: of two blocks, the "max", the "mean" or the root mean square ("rms") of their values' differences.
    """

    name: ClassVar[str] = "pixelprune"
    paper: ClassVar[str] = "2604.00886"
    looks_at: ClassVar[frozenset[str]] = frozenset({"pixels"})
    amounts: ClassVar[tuple[str, ...]] = ()
    examples: ClassVar[tuple[str, ...]] = ("pixelprune:tau=0.7,distance=mean", "pixelprune", "pixelprune:tau=0.5,anchored=false")
    keeps_all: ClassVar[tuple[str, ...]] = ("pixelprune:tau=-1.0",)
    tau: float = 0.0
    distance: str = "max"
    anchored: bool = True

    def check(self) -> None:
        super().check()
        if type(self.tau) is not float or not (self.tau == -1.0 or 0.0 <= self.tau < float("inf")):
            raise FoveateError(f"{self.name}: tau={self.tau!r} is not possible; give a difference of pixels >= 0, such as tau=0.1, or -1.0")
        choose(self, distance=("max", "mean", "rms"), anchored=(True, False))

    def sites(self, layers: int) -> list[Site]:
        return [InEncoder(0, (Pixels(),))]

    def reduce(self, view: View, stage: int = 0) -> Cut:
        layout, pixels = view.layout, view.signal(Pixels()).flatten(0, 1)
        kept, cells = torch.zeros_like(layout.visual).flatten(), layout.place.flatten(0, 1)[:, 3:]
        for slots in groups(layout, "image"):
            rows, columns = (cells[slots].amax(0) + 1).tolist()
            if rows * columns != len(slots):
                raise NotApplicable(
                    Reason.NO_RASTER, f"{self.name}: {len(slots)} blocks of a picture lie in no full raster; let it act before others"
                )
            order = slots[(cells[slots] * cells.new_tensor([columns, 1])).sum(1).argsort()]
            kept[order] = self.kept(pixels[order].view(rows, columns, -1)).flatten()
        return Cut(TokenMap.keep(layout, kept.view(layout.shape)))

    def kept(self, blocks_RCv: Tensor) -> Tensor:
        """(R, C) bool: which blocks of a raster stay."""
        R, C = blocks_RCv.shape[:2]
        known = blocks_RCv.clone()  # of a block that went, what was foretold of it
        kept = torch.ones((R, C), dtype=torch.bool, device=known.device)
        for diagonal in range(1, R + C - 1):  # all that a block looks at lies on the two before its own
            row = torch.arange(max(0, diagonal - C + 1), min(R, diagonal + 1), device=known.device)
            column = diagonal - row
            left, above = known[row, (column - 1).clamp(min=0)], known[(row - 1).clamp(min=0), column]
            corner = known[(row - 1).clamp(min=0), (column - 1).clamp(min=0)]
            by_above = self._alike(corner, left) & ~self._alike(corner, above)
            by_above = torch.where(row == 0, False, torch.where(column == 0, True, by_above))
            foretold = torch.where(by_above[:, None], above, left)
            stays = ~self._alike(blocks_RCv[row, column], foretold)
            kept[row, column] = stays
            if self.anchored:
                known[row, column] = torch.where(stays[:, None], known[row, column], foretold)
        return kept

    def _alike(self, a_Nv: Tensor, b_Nv: Tensor) -> Tensor:
        difference = (a_Nv - b_Nv).abs()
        if self.distance == "max":
            return difference.amax(1) <= self.tau
        return (difference.mean(1) if self.distance == "mean" else difference.square().mean(1).sqrt()) <= self.tau

    def count(self, work: Workload, stage: int = 0) -> list[int]:
        return list(work.arriving)

    def exact(self, work: Workload) -> bool:
        return self.tau < 0
