"""Evenly spaced selection: every image keeps a coarser grid of its tokens. A baseline without a paper of its own.

The rule for T of R x C tokens: r rows, as near to sqrt(T R / C) as T <= r C allows, at the centres of r equal bands; T is dealt out evenly
among them, and a row's share stands at the centres of equal parts of it. With T = R C / 4 that is every second row and column. An image
of several crops or frames deals T out to them by their sizes; one without a (full) grid is spaced along the sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil, sqrt
from typing import ClassVar

import torch

from foveate.contract import Cut, Site, View, Workload
from foveate.reducers.base import Reducer
from foveate.reducers.common import OF, choose, in_front_of, integers, leaving
from foveate.tokens import TokenMap, budget


@dataclass(frozen=True)
class Uniform(Reducer):
    """Keeps `keep` of each image's tokens, evenly spaced, in front of decoder layer `layer` (0: before the LM). Looks at places only.

    of: what `keep` is a share of: "arriving" tokens or the "original" ones, counted in front of the first layer.
    """

    name: ClassVar[str] = "uniform"
    paper: ClassVar[str] = "-"
    examples: ClassVar[tuple[str, ...]] = ("uniform:keep=0.5",)
    keeps_all: ClassVar[tuple[str, ...]] = ("uniform:keep=1.0",)
    keep: float | int = 0.25
    layer: int = 0
    of: str = "arriving"
    positions: str = field(default="renumber", kw_only=True)

    def check(self) -> None:
        super().check()
        budget(self.keep, 1)
        integers(self, layer=0)
        choose(self, of=OF)

    def sites(self, layers: int) -> list[Site]:
        return [in_front_of(self.layer)]

    def reduce(self, view: View, stage: int = 0) -> Cut:
        layout = view.layout
        rows, slots = layout.visual.nonzero(as_tuple=True)
        place, number = layout.place[rows, slots].tolist(), leaving(view, self._left)[rows, slots].tolist()
        images: dict[int, dict[tuple[int, int], list[int]]] = {}
        for at, (image, crop, frame, _, _) in enumerate(place):
            images.setdefault(image, {}).setdefault((crop, frame), []).append(at)
        chosen = []
        for grids in images.values():
            arriving = sum(map(len, grids.values()))
            left = number[next(iter(grids.values()))[0]]
            before = dealt = 0
            for grid in grids.values():
                before += len(grid)
                share, dealt = left * before // arriving - dealt, left * before // arriving
                chosen += [grid[i] for i in _spaced([(place[at][3], place[at][4]) for at in grid], share)]
        picked = torch.tensor(chosen, dtype=torch.int64, device=slots.device)
        kept = torch.zeros_like(layout.visual)
        kept[rows[picked], slots[picked]] = True
        return Cut(TokenMap.keep(layout, kept))

    def count(self, work: Workload, stage: int = 0) -> list[int]:
        return work.leaving(self._left)

    def _left(self, arriving: int, original: int) -> int:
        return min(arriving, budget(self.keep, original if self.of == "original" else arriving))


def subgrid(rows: int, columns: int, tokens: int) -> list[tuple[int, int]]:
    """The (row, column) of `tokens` evenly spaced places of a grid, in raster order."""
    if tokens == 0:
        return []
    r = min(max(int(sqrt(tokens * rows / columns) + 0.5), ceil(tokens / columns), 1), rows, tokens)
    shares = [(i + 1) * tokens // r - i * tokens // r for i in range(r)]
    return [(row, column) for row, share in zip(_centres(rows, r), shares, strict=True) for column in _centres(columns, share)]


def _centres(length: int, parts: int) -> list[int]:
    return [(2 * i + 1) * length // (2 * parts) for i in range(parts)]


def _spaced(cells: list[tuple[int, int]], tokens: int) -> list[int]:
    """Which of the cells (row, column; -1 unknown), given in sequence order, are kept."""
    rows, columns = (sorted({cell[axis] for cell in cells}) for axis in (0, 1))
    full = len(set(cells)) == len(cells) == len(rows) * len(columns) and min(rows) >= 0 and min(columns) >= 0
    if not full:
        return _centres(len(cells), tokens)
    at = {cell: i for i, cell in enumerate(cells)}
    return [at[rows[row], columns[column]] for row, column in subgrid(len(rows), len(columns), tokens)]
