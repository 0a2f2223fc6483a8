"""NVLM's tile tags: InternVL's grid of at most six tiles, with a text before the tokens of each (Dai et al., arXiv 2409.11402).

The tags are ordinary text of several tokens, no new vocabulary: "<tile_1>" to "<tile_6>", and one before the overview, which the paper
writes "<tile_global>" and the released code, as here unless told, "<tile_global_thumbnail>". An image of one tile has the latter alone. The
pair of words around the whole image belongs to the prompt's template. Decoder-only (NVLM-D): nothing is cross-attended to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from foveate.errors import FoveateError
from foveate.tilings.base import Sight
from foveate.tilings.internvl import InternVL
from foveate.tokens import Block, ImagePlan, Tag


@dataclass(frozen=True)
class NVLM(InternVL):
    """As internvl, with "<`tile`_1>" before the first tile and so on, and "<`tile`_`whole`>" before the overview."""

    name: ClassVar[str] = "nvlm"
    paper: ClassVar[str] = "2409.11402"
    sight: ClassVar[Sight] = Sight(448, merge=2)
    tiles: int = 6
    tile: str = "tile"
    whole: str = "global_thumbnail"

    def check(self) -> None:
        super().check()
        for option in ("tile", "whole"):
            value = getattr(self, option)
            if not isinstance(value, str) or not value.isidentifier():
                raise FoveateError(f"nvlm: {option}={value!r} is not possible; give a word of letters, digits and _")

    def lay(self, width: int, height: int, most: int | None, sight: Sight) -> ImagePlan:
        plan = super().lay(width, height, most, sight)
        names = [self.whole if crop.kind == "overview" else str(i + 1) for i, crop in enumerate(plan.crops)]
        parts = [part for i, name in enumerate(names) for part in (Tag(f"<{self.tile}_{name}>"), Block(i))]
        return ImagePlan.laid((width, height), plan.crops, tuple(parts))
