"""YOPO, "Treat Visual Tokens as Text?": visual tokens attend to their neighbours in the picture, and to text (arXiv 2410.06169).

near(i, j) = |row_i - row_j| <= (w - 1) / 2  and  |column_i - column_j| <= (w - 1) / 2        in one crop, w = 5

A visual token sees the visual tokens that are near, those that come later too (`causal=true`: not them), and all text in front of it; text
sees everything in front of it. Of the 576² = 331,776 pairs of a raster of 24 × 24 that leaves 114² = 12,996, 3.9 %: of a token in a corner
9, on an edge 15, elsewhere 25.

This is one of the paper's four cuts, the one that says who sees whom. Of the others (heads that do not look at the picture, a part of the
feed-forward network for visual tokens, no picture at all in deep layers) the last is `vtw:layer=0.5`: text that sees no visual token from a
layer on says what it says without any from there on (in a softmax over what is left, which theirs leaves as it was). The first two cut
inside of layers and are not here. The authors simulate all four by masks and save nothing; this is a mask too. LLaVA needs fine-tuning
under it, InternVL2 and Qwen2-VL did without.

Where this differs from the authors' code: any raster, images, crops and prompts in place of 576 tokens behind 35 of text. Tokens of other
images and crops are not near, newlines between patches are text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foveate.contract import View, Visible, Workload
from foveate.errors import FoveateError, NotApplicable, Reason
from foveate.reducers.common import choose, integers
from foveate.reducers.seeing import Seeing
from foveate.tokens import Layout


@dataclass(frozen=True)
class YOPO(Seeing):
    """Lets visual tokens attend to their neighbours in the picture alone, and to text.

    window  an odd number of rows and columns, 1: a token alone; 0: as large as the picture
    causal  whether those that come later in the sequence are hidden inside the window too, as the model has it
    """

    name: ClassVar[str] = "yopo"
    paper: ClassVar[str] = "2410.06169"
    examples: ClassVar[tuple[str, ...]] = ("yopo:window=3", "yopo:window=5,causal=true,layer=1")
    keeps_all: ClassVar[tuple[str, ...]] = ("yopo:window=0,causal=true",)
    window: int = 5
    causal: bool = False

    def check(self) -> None:
        super().check()
        integers(self, window=0)
        choose(self, causal=(True, False))
        if self.window and self.window % 2 == 0:
            raise FoveateError(
                f"yopo: window={self.window} is not possible; give an odd number, such as {self.window + 1}, or 0 for no window"
            )

    def reduce(self, view: View, stage: int = 0) -> Visible:
        layout = view.layout
        astray = layout.visual & (layout.place[..., 3:] < 0).any(-1)
        if self.window and bool(astray.any()):
            raise NotApplicable(
                Reason.NO_RASTER, f"yopo: the tokens of image {int(layout.image[astray][0])} do not lie in a raster, so none has neighbours"
            )
        return Visible(NearOrText(self.window), None if self.causal else Near(self.window))

    def unseen(self, sizes: Workload, stage: int = 0) -> int:
        if not self.window:
            return 0
        known = all(image.grids for image in sizes.images)
        seen = sum(near_pairs(rows, self.window) * near_pairs(columns, self.window) for i in sizes.images for rows, columns in i.grids)
        return max(0, sum(sizes.arriving) ** 2 - seen) if known else 0


@dataclass(frozen=True)
class Near:
    """(B, M, K) bool: pairs of visual tokens of one crop within a window; 0: within the image."""

    window: int

    def __call__(self, query: Layout, key: Layout) -> Tensor:
        found = query.visual[..., None] & key.visual[:, None]
        for part in range(3 if self.window else 1):  # image, crop, frame
            found = found & (query.place[..., None, part] == key.place[:, None, :, part])
        for part in (3, 4) if self.window else ():
            found = found & ((query.place[..., None, part] - key.place[:, None, :, part]).abs() <= self.window // 2)
        return found


@dataclass(frozen=True)
class NearOrText:
    """(B, M, K) bool: pairs of which one is text, and those of visual tokens that are near; all pairs without a window."""

    window: int

    def __call__(self, query: Layout, key: Layout) -> Tensor:
        far = query.visual[..., None] & key.visual[:, None]
        return ~far | Near(self.window)(query, key) if self.window else torch.ones_like(far)


def near_pairs(cells: int, window: int) -> int:
    """Pairs of `cells` cells in a line that are at most (window - 1) / 2 apart, each with itself among them."""
    reach = min(window // 2, cells - 1)
    return cells * (2 * reach + 1) - reach * (reach + 1)
