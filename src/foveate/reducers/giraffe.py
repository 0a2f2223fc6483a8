"""Giraffe: of a group of frames the first alone is sharp, and for long prompts the rotary embedding is stretched (arXiv 2412.12735).

hybrid resolution    frames in groups of `group`; a group's first frame has m tokens (`high`), each of the others m / ratio:
                     (N / group) (1 + (group - 1) / ratio) m tokens of N frames; of 8 frames 960 at (4, 240, 3)
M-RoPE++, `s`        prompts are s = L' / L times as long as those that the model was trained on; θ_d: frequencies of the rotary embedding
    time             θ_d
    height           θ_d (1 / s + (1 - 1 / s) (n - k) / n)      k = 0 … n - 1: the rank of d among the n frequencies of this axis
    width            θ_d / s

s = 1 is as ever. With the three axes one after the other, as in Qwen2-VL, the height's factor goes on from the time's 1 and ends where the
width's 1 / s begins. Samples with images turn so, text and answer included, from the first token on: a conversation whose first turn is
cached without one cannot go on so, and is refused, as is a model whose tokens have no time, row and column. The authors train with it.

Frames of fewer tokens are means here: the frame's raster in m / ratio parts as equal as whole tokens allow, each at the place of the token
in its middle (along the sequence, where there is no full raster). So the tower sees all of every frame. How the authors' frames become
coarse is unverified, and where their tokens stand; frames that are made small before the tower would have a grid of fewer places. A frame
is what the model calls so (of Qwen2-VL two pictures); which of the two the paper's m counts in is unverified too. The defaults are the
paper's, with m as many tokens as a frame has; `high=240` is its number. Half a token rounds up, and one always stays.

Their code could not be read. Unverified: that the height's ramp goes by the rank of a frequency, as here, and not by how often it turns
within L, as YaRN's does, and whether anything scales attention beside it (nothing does here). Where the three axes take turns (Qwen3-VL),
the rule goes by axis: that is this library's reading, since the paper knows no such model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from math import floor
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from foveate.contract import Cut, View
from foveate.errors import FoveateError
from foveate.reducers.common import integers, meant
from foveate.reducers.frames import Edges, OverFrames, clips, mixed, selected, spaced
from foveate.reducers.uniform import subgrid
from foveate.tokens import budget

MOST = 1_000_000  # of s and ratio


@dataclass(frozen=True)
class Giraffe(OverFrames):
    """Leaves the first of each `group` frames of a clip sharp and makes the others coarser; `s` stretches the rotary embedding.

    high   tokens of a group's first frame, a share of them or a number
    ratio  how many times as many these are as those of each other frame
    s      how many times as long the prompts are as those that the model was trained on
    scope  see `foveate.reducers.frames`
    """

    name: ClassVar[str] = "giraffe"
    paper: ClassVar[str] = "2412.12735"
    amounts: ClassVar[tuple[str, ...]] = ("high", "ratio")
    examples: ClassVar[tuple[str, ...]] = ("giraffe:high=0.5", "giraffe:high=6,group=2")
    keeps_all: ClassVar[tuple[str, ...]] = ("giraffe:ratio=1.0",)
    group: int = 4
    high: float | int = 1.0
    ratio: float = 3.0
    s: float = 1.0
    scope: str = "image"
    positions: str = field(default="renumber", kw_only=True)

    def check(self) -> None:
        super().check()
        integers(self, group=1)
        number = type(self.high) is int and self.high >= 1
        if not number and not (type(self.high) is float and 0.0 < self.high <= 1.0):
            raise FoveateError(
                f"giraffe: high={self.high!r} is not possible; give a share of a frame's tokens in (0, 1] as a float, or a number >= 1"
            )
        for option in ("ratio", "s"):
            value: Any = getattr(self, option)
            if type(value) not in (int, float) or not 1 <= value <= MOST:
                raise FoveateError(f"giraffe: {option}={value!r} is not possible; give a number from 1 to {MOST}, such as {option}=2.0")

    def canonical(self) -> dict[str, Any]:
        return {"ratio": float(self.ratio), "s": float(self.s)}

    @property
    def between(self) -> bool:
        return self.s != 1

    def at(self, keep: float) -> Self:
        """With sharp frames of fewer tokens, or, for more than sharp frames of all would leave, with the others less coarse."""
        high = keep * self.group / (1 + (self.group - 1) / self.ratio)
        if high <= 1:
            return replace(self, high=min(1.0, round(high, 6)))
        return replace(self, high=1.0, ratio=round((self.group - 1) / (keep * self.group - 1), 6))

    def left(self, frames: Sequence[int]) -> int:
        return sum(self._left(frame, tokens) for frame, tokens in enumerate(frames))

    def _left(self, frame: int, tokens: int) -> int:
        high = budget(self.high, tokens)
        return high if frame % self.group == 0 else max(1, floor(high / meant(self.ratio) + Fraction(1, 2)))

    def reduce(self, view: View, stage: int = 0) -> Cut:
        place, edges = view.layout.place.flatten(0, 1), []
        for table in clips(view.layout, self.scope):
            for frame, row in enumerate(table):
                slots = row[row >= 0]
                edges.append(_coarser(slots, place[slots, 3:], self._left(frame, len(slots))))
        return Cut(mixed(view.layout, edges), stretch=None if self.s == 1 else Stretched(self.s))


def _coarser(slots: Tensor, cells_n2: Tensor, tokens: int) -> Edges:
    """The edges of a frame's slots into so many of them."""
    if tokens == len(slots):
        return selected(slots)
    home, middle = parts(cells_n2, tokens)
    return slots[middle[home]], slots, 1 / home.bincount(minlength=tokens)[home].double()


def parts(cells_n2: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """A frame in so many parts, as equal as can be: the part (n,) int64 that each of its tokens lies in, and the token (tokens,) in the
    middle of each part. cells: rows and columns of the frame's tokens, in raster order; where they are no full raster, it is cut along
    the sequence."""
    n, device = len(cells_n2), cells_n2.device
    R, C = (len(axis.unique()) for axis in cells_n2.unbind(1))
    if n != R * C or len(cells_n2.unique(dim=0)) < n or int(cells_n2.min()) < 0:
        return (2 * torch.arange(n, device=device) + 1) * tokens // (2 * n), torch.tensor(spaced(n, tokens), device=device)
    middle = subgrid(R, C, tokens)
    lengths = torch.tensor([row for row, _ in middle], device=device).unique_consecutive(return_counts=True)[1]
    band = (2 * torch.arange(R, device=device) + 1) * len(lengths) // (2 * R)
    across = (2 * torch.arange(C, device=device) + 1) * lengths[band][:, None] // (2 * C)
    home = (lengths.cumsum(0) - lengths)[band][:, None] + across
    return home.flatten(), torch.tensor([row * C + column for row, column in middle], device=device)


@dataclass(frozen=True)
class Stretched:
    """M-RoPE++'s factors of the frequencies, by the axis of each."""

    s: float

    def __call__(self, axis_F: Tensor) -> Tensor:
        factor = torch.ones(len(axis_F), dtype=torch.float64, device=axis_F.device)
        height = (axis_F == 1).nonzero()[:, 0]
        factor[height] = 1 - (1 - 1 / self.s) * torch.arange(len(height), dtype=torch.float64, device=axis_F.device) / max(1, len(height))
        return factor.masked_fill(axis_F == 2, 1 / self.s)
