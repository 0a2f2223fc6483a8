"""EVS: efficient video sampling, the tokens that changed since the frame before (arXiv 2510.14624).

    score of the first frame's tokens: above all others
    score of place p in frame f: 1 - cos(x[f, p], x[f - 1, p])     x: the states in front of the language model
    keep the T highest over the whole clip; T is never less than the first frame has

No text, no attention. On models that make one token grid of two frames (Qwen-VL), a frame is such a pair.

Where this differs from the code shipped in vLLM and transformers: T is rounded half up; cosines are rounded to six decimals, so that of
places that did not change the earlier go first, whatever the rounding; where a frame lacks a place, it is compared with the nearest frame
before that has it. Survivors keep their positions, and so does the text that follows (in one of vLLM's paths it moves back into the
video). A published review describes the paper's own rule as one on pixels; this is the rule of the code. A picture is one frame, which
stays whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from foveate.contract import Cut, View
from foveate.reducers.common import states
from foveate.reducers.frames import OverFrames, best, clips, earlier, unlike
from foveate.tokens import TokenMap, budget


@dataclass(frozen=True)
class EVS(OverFrames):
    """Keeps `keep` (share or number) of each clip's tokens, the first frame among them. scope: see `foveate.reducers.frames`."""

    name: ClassVar[str] = "evs"
    paper: ClassVar[str] = "2510.14624"
    looks_at: ClassVar[frozenset[str]] = frozenset({"states"})
    examples: ClassVar[tuple[str, ...]] = ("evs:keep=0.5",)
    keeps_all: ClassVar[tuple[str, ...]] = ("evs:keep=1.0",)
    keep: float | int = 0.25
    scope: str = "image"

    def check(self) -> None:
        super().check()
        budget(self.keep, 1)

    def left(self, frames: Sequence[int]) -> int:
        return max(frames[0], budget(self.keep, sum(frames))) if frames else 0

    def reduce(self, view: View, stage: int = 0) -> Cut:
        x = states(self.name, view).detach().flatten(0, 1)
        kept = torch.zeros_like(view.layout.visual).flatten()
        for table in clips(view.layout, self.scope):
            there = table >= 0
            change = unlike(x, table, earlier(table))
            change[0] = float("inf")
            slots = table[there]
            kept[slots[best(change[there], self.left(there.sum(1).tolist()))]] = True
        return Cut(TokenMap.keep(view.layout, kept.view(view.layout.shape)))
