"""FewerFrames: whole frames, evenly spaced; the others go. A baseline without a paper of its own: what a clip of fewer frames would be,
but that the tower sees them all.

K of F frames stay, those in the middle of K equal parts of the clip.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from foveate.contract import Cut, View
from foveate.reducers.frames import OverFrames, clips, spaced
from foveate.tokens import TokenMap, budget


@dataclass(frozen=True)
class FewerFrames(OverFrames):
    """Keeps `keep` (share or number) of each clip's frames, whole. scope: see `foveate.reducers.frames`."""

    name: ClassVar[str] = "fewerframes"
    paper: ClassVar[str] = "-"
    examples: ClassVar[tuple[str, ...]] = ("fewerframes:keep=0.5",)
    keeps_all: ClassVar[tuple[str, ...]] = ("fewerframes:keep=1.0",)
    keep: float | int = 0.25
    scope: str = "image"
    positions: str = field(default="renumber", kw_only=True)

    def check(self) -> None:
        super().check()
        budget(self.keep, 1)

    def left(self, frames: Sequence[int]) -> int:
        return sum(frames[f] for f in spaced(len(frames), budget(self.keep, len(frames))))

    def reduce(self, view: View, stage: int = 0) -> Cut:
        kept = torch.zeros_like(view.layout.visual).flatten()
        for table in clips(view.layout, self.scope):
            slots = table[spaced(len(table), budget(self.keep, len(table)))]
            kept[slots[slots >= 0]] = True
        return Cut(TokenMap.keep(view.layout, kept.view(view.layout.shape)))
