"""LLaVA-OneVision: any resolution with up to 6 x 6 tiles and at most nine views' tokens (Li et al., arXiv 2408.03326, "anyres_max_9")."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from foveate.tilings.anyres import AnyRes
from foveate.tilings.base import Sight


@dataclass(frozen=True)
class OneVision(AnyRes):
    """As anyres, with 36 grids and a map that is scaled down to the tokens of `limit` views."""

    name: ClassVar[str] = "onevision"
    paper: ClassVar[str] = "2408.03326"
    sight: ClassVar[Sight] = Sight(384)  # 27 x 27 patches
    grids: str = "1x1..6x6"
    limit: int = 9
