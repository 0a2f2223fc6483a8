"""Kinds and places of tokens that lie in rasters: what the readings of all families are made of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from foveate.tokens import PLACE, Kind


class Laid(NamedTuple):
    """What L tokens are, and where they lie in their picture.

    kind   (L,) int64, a `Kind`
    place  (L, 4) int64: crop, frame, row, column in it, -1 where that is not known
    """

    kind: Tensor
    place: Tensor

    @property
    def size(self) -> Tensor:
        """(2,) rows and columns of a crop."""
        return self.place[:, 2:].amax(0) + 1


def places(
    length: int,
    *,
    crops: int = 1,
    frames: int = 1,
    shape: tuple[int, int] | None = None,
    before: Sequence[Kind] = (),
    newline: bool = False,
    raster: bool = True,
    device: torch.device | None = None,
) -> Laid:
    """`length` tokens of an item: `crops` tiles or `frames` one after the other, each a raster of the proportions of `shape` (rows,
    columns; a square without it), each behind tokens of the kinds `before`; one newline token at the very end with `newline`; without
    `raster` nothing is said of rows and columns."""
    parts = max(1, crops * frames)
    each = (length - newline) // parts
    first = len(before)
    kind = torch.full((length,), int(Kind.PATCH), dtype=torch.int64, device=device)
    place = torch.full((length, len(PLACE) - 1), -1, dtype=torch.int64, device=device)
    index = torch.arange(each * parts, device=device)
    part, rank = index // max(each, 1), index % max(each, 1)
    if crops > 1:
        place[: len(index), 0] = part
    if frames > 1:
        place[: len(index), 1] = part
    columns = _columns(each - first, shape) if raster else 0
    if columns:
        place[: len(index), 2] = torch.where(rank >= first, (rank - first) // columns, -1)
        place[: len(index), 3] = torch.where(rank >= first, (rank - first) % columns, -1)
    for i, own in enumerate(before):
        kind[: len(index)] = torch.where(rank == i, int(own), kind[: len(index)])
    if newline:
        kind[-1] = int(Kind.NEWLINE)
    return Laid(kind, place)


def _columns(length: int, shape: tuple[int, int] | None) -> int:
    """Columns of a raster of `length` tokens with the proportions of `shape`; 0 if there is none."""
    if length < 1:
        return 0
    rows, columns = shape or (1, 1)
    high, wide = round(math.sqrt(length * rows / columns)), round(math.sqrt(length * columns / rows))
    return wide if high * wide == length else 0
