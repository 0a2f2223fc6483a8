"""Two-dimensional average pooling of each image's grid of tokens: a baseline without a paper of its own.

    (R, C) tokens --mean of every stride x stride cell--> (R // stride, C // stride) tokens; remaining rows and columns are dropped

A pooled token stands where the centre of its cell stood (the upper left of the four, if stride is even), with that token's position.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import isqrt
from typing import ClassVar, Self

import torch

from foveate.contract import Cut, Site, View, Workload
from foveate.errors import FoveateError, NotApplicable, Reason
from foveate.reducers.base import Reducer
from foveate.reducers.common import in_front_of, integers, into, nearest_stride
from foveate.tokens import PLACE, TokenMap

GRID = [PLACE.index("image"), PLACE.index("crop"), PLACE.index("frame")]
CELL = [PLACE.index("row"), PLACE.index("column")]


@dataclass(frozen=True)
class AvgPool2d(Reducer):
    """Pools every crop and frame of each image by `stride` in both directions, in front of decoder layer `layer` (0: before the LM)."""

    name: ClassVar[str] = "avgpool2d"
    paper: ClassVar[str] = "-"
    amounts: ClassVar[tuple[str, ...]] = ("stride",)
    examples: ClassVar[tuple[str, ...]] = ("avgpool2d:stride=2",)
    keeps_all: ClassVar[tuple[str, ...]] = ("avgpool2d:stride=1",)
    stride: int = 2
    layer: int = 0
    positions: str = field(default="renumber", kw_only=True)

    def check(self) -> None:
        super().check()
        integers(self, layer=0, stride=1)

    def at(self, keep: float) -> Self:
        """Of the strides that keep 1/1, 1/4, 1/9, … the nearest to the root of 1 / `keep`."""
        return replace(self, stride=nearest_stride(self.name, keep, power=2))

    def sites(self, layers: int) -> list[Site]:
        return [in_front_of(self.layer)]

    def reduce(self, view: View, stage: int = 0) -> Cut:
        layout, s = view.layout, self.stride
        if s == 1:
            return Cut(TokenMap.identity(layout))
        rows, slots = layout.visual.nonzero(as_tuple=True)
        place = layout.place[rows, slots]
        home = torch.full(layout.shape, -1, dtype=torch.int64, device=slots.device)
        for grid in torch.unique(place[:, GRID], dim=0):
            here = (place[:, GRID] == grid).all(1)
            row, column = (torch.unique(place[here, axis], return_inverse=True) for axis in CELL)
            R, C = row[0].numel(), column[0].numel()
            table = torch.full((R, C), -1, dtype=torch.int64, device=slots.device)
            table[row[1], column[1]] = slots[here]
            if int(place[here][:, CELL].min()) < 0 or int(here.sum()) != R * C or int(table.min()) < 0:
                raise NotApplicable(
                    Reason.NO_RASTER,
                    f"avgpool2d: the {int(here.sum())} tokens of image {int(grid[0])} are no full grid of rows and columns; put it before "
                    "other reducers, on a model whose tokens are a raster (View.of(…, grid=…)), or use vcc, which pools in sequence order",
                )
            if min(R, C) < s:
                raise FoveateError(
                    f"avgpool2d: stride {s} is larger than the {R} x {C} tokens of an image: nothing would be left of it; "
                    f"choose a stride of at most {min(R, C)}"
                )
            table = table[: R // s * s, : C // s * s].view(R // s, s, C // s, s).transpose(1, 2).reshape(-1, s * s)
            home[rows[here][0], table] = table[:, (s - 1) // 2 * (s + 1), None]  # the middle of each cell
        weight = torch.where(layout.visual, 1.0 / (s * s), 1.0).to(torch.float64)
        return Cut(into(layout, home, weight))

    def count(self, work: Workload, stage: int = 0) -> list[int]:
        """Where the grids are not known, or an earlier method has changed them: as if they were squares."""
        left = []
        for image, arriving in zip(work.images, work.arriving, strict=True):
            side = isqrt(arriving)
            square = ((side, side),) if side * side == arriving else ()
            grids = image.grids if arriving == image.tokens and image.grids else square
            cells = [(rows // self.stride) * (columns // self.stride) for rows, columns in grids]
            left.append(sum(cells) if cells else arriving // self.stride**2)
        return left

    def exact(self, work: Workload) -> bool:
        """Where the grids are known."""
        return all(image.grids and arriving == image.tokens for image, arriving in zip(work.images, work.arriving, strict=True))
