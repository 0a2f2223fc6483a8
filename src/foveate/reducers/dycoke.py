"""DyCoke, stage 1: of every second frame the tokens that differ from the frame before (arXiv 2411.15024). The paper calls it merging;
nothing is averaged.

    frames 0, 2, 4, … are references; of frame f = 1, 3, 5, … stay the k = floor((1 - drop) P) tokens least like (cosine, same place)
    frame f - 1; then of frames f = 2, 6, 10, … with f - 2 < F - 4 the k least like frame f - 2

About (1 + 3 (1 - drop)) / 4 of the tokens stay, 47.5 % at drop=0.7; below a quarter it cannot go. No text, no attention.

Where this differs from the authors' code: tokens stay in raster order (theirs orders a compared frame by likeness); clips of fewer than
five frames and of an odd number are served (theirs fails, and loses the last frame); cosines are rounded to six decimals, so that equal
ones tie and the first stays. As in theirs, the last group of four keeps its third frame whole. Stage 2, which hides entries of the cache
while it decodes, is not built.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

from foveate.contract import Cut, View
from foveate.errors import FoveateError
from foveate.reducers.common import meant, states
from foveate.reducers.frames import OverFrames, best, clips, unlike
from foveate.tokens import TokenMap


@dataclass(frozen=True)
class DyCoke(OverFrames):
    """Drops the share `drop` of each compared frame. scope: see `foveate.reducers.frames`."""

    name: ClassVar[str] = "dycoke"
    paper: ClassVar[str] = "2411.15024"
    amounts: ClassVar[tuple[str, ...]] = ("drop",)
    looks_at: ClassVar[frozenset[str]] = frozenset({"states"})
    examples: ClassVar[tuple[str, ...]] = ("dycoke:drop=0.5",)
    keeps_all: ClassVar[tuple[str, ...]] = ("dycoke:drop=0.0",)
    drop: float = 0.7
    scope: str = "image"
    positions: str = field(default="renumber", kw_only=True)

    def check(self) -> None:
        super().check()
        if type(self.drop) is not float or not 0.0 <= self.drop <= 1.0:
            raise FoveateError(f"dycoke: drop={self.drop!r} is not possible; give a share in [0, 1] as a float")

    def at(self, keep: float) -> Self:
        if not 0.25 <= keep <= 1.0:
            raise FoveateError(f"dycoke keeps at least a quarter of the tokens, so it cannot be set to keep={keep:g}")
        return replace(self, drop=round((1 - keep) * 4 / 3, 6))

    def left(self, frames: Sequence[int]) -> int:
        whole = set(range(len(frames))) - dict(compared(len(frames))).keys()
        return sum(tokens if f in whole else self._kept(tokens) for f, tokens in enumerate(frames))

    def _kept(self, tokens: int) -> int:
        return int((1 - meant(self.drop)) * tokens)

    def reduce(self, view: View, stage: int = 0) -> Cut:
        x, kept = states(self.name, view).detach().flatten(0, 1), view.layout.visual.flatten().clone()
        for table in clips(view.layout, self.scope):
            for f, other in compared(len(table)):
                there = table[f] >= 0
                slots = table[f][there]
                kept[slots] = False
                kept[slots[best(unlike(x, slots, table[other][there]), self._kept(len(slots)))]] = True
        return Cut(TokenMap.keep(view.layout, kept.view(view.layout.shape)))


def compared(frames: int) -> list[tuple[int, int]]:
    """(frame, the one that it is compared with)."""
    return [(f, f - 1) for f in range(1, frames, 2)] + [(f, f - 2) for f in range(2, frames, 4) if f - 2 < frames - 4]
