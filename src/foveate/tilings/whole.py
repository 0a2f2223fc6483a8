"""No tiling: the image is seen once, as LLaVA-1.5 does (Liu et al., arXiv 2310.03744), which pads it to a square first.

Its code pads with the processor's mean colour in the image's own size and resizes afterwards; here the image is resized first and padded
with a grey, which differs at the edge between the two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from foveate.errors import FoveateError
from foveate.tilings.base import Sight, Tiling
from foveate.tilings.common import overview, padded, square
from foveate.tokens import Block, ImagePlan


@dataclass(frozen=True)
class Whole(Tiling):
    """One view, resized to a square; with `pad` it keeps its shape and is padded to one."""

    name: ClassVar[str] = "whole"
    paper: ClassVar[str] = "2310.03744"
    sight: ClassVar[Sight] = Sight(336)
    pad: bool = False

    def check(self) -> None:
        if type(self.pad) is not bool:
            raise FoveateError(f"whole: pad={self.pad!r} is not possible; give true or false")

    def lay(self, width: int, height: int, most: int | None, sight: Sight) -> ImagePlan:
        view = square(padded(width, height, (1, 1), sight, fill=122), (0, 0), sight, "overview") if self.pad else overview(sight)
        return ImagePlan.laid((width, height), (view,), (Block(0),))
