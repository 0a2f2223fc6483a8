"""Units: the patches of a tower that become one token together, crop by crop, and where they stand among the states of its blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from foveate.anatomy.tower import Extras, columns_of, extras_of
from foveate.errors import NotApplicable, Reason
from foveate.tokens import PLACE, Kind, Layout

NONE = Extras()


@dataclass(frozen=True)
class Crops:
    """How the crops of one call of a tower lie.

    grids    of each crop the (rows, columns) of its units; (units, 0) where they lie in no raster that is known
    side     patches of a unit a side
    extras   the tokens in front of each crop's patches
    packed   whether the slots of all crops are one row, (slots, width), rather than (crops, slots, width)
    grouped  whether the patches of one unit stand side by side in the tower, rather than as they lie in the picture
    order    (units,) int64 where the tower has put each unit (windows); None: in their order
    """

    grids: Sequence[tuple[int, int]]
    side: int
    extras: Extras = NONE
    packed: bool = False
    grouped: bool = False
    order: Tensor | None = None

    @property
    def lengths(self) -> list[int]:
        """Units of each crop."""
        return [rows * columns if columns else rows for rows, columns in self.grids]

    @property
    def patches(self) -> list[int]:
        """Patches of each crop."""
        return [length * self.side**2 for length in self.lengths]


@dataclass(frozen=True)
class Units:
    """The units of each crop, C x U of g patches each, behind the tower's own tokens, which are units of one slot. -1: there is none.

    layout  (C, U): each a slot of it
    slot    (C, U, g) int64: which slots of the blocks' states they take, counted through all crops
    patch   (C, U, g) int64: their patches among the pixels, counted likewise
    """

    layout: Layout
    slot: Tensor
    patch: Tensor

    @classmethod
    def of(cls, crops: Crops, device: torch.device) -> Units:
        slots, patches, cells, start, seen = [], [], [], 0, 0
        for (rows, columns), length in zip(crops.grids, crops.lengths, strict=True):
            within = _blocks(rows, columns, length, 1 if crops.grouped else crops.side).view(length, -1)
            stands = within
            if crops.grouped:
                within = stands = torch.arange(length * crops.side**2).view(length, -1)
            rank = torch.arange(length)
            if crops.order is not None:
                rank = crops.order[seen : seen + length].cpu() - seen
                within = within[rank]
            cells.append(torch.stack([rank // columns, rank % columns], 1) if columns else torch.full((length, 2), -1))
            patches.append(within + seen * crops.side**2)
            slots.append(stands + start + crops.extras.number)
            start, seen = start + crops.extras.number + within.numel(), seen + length
        slot, patch, cell = (pad_sequence(parts, True, -1) for parts in (slots, patches, cells))
        return cls._behind(crops, slot.to(device), patch.to(device), cell.to(device))

    @classmethod
    def _behind(cls, crops: Crops, slot: Tensor, patch: Tensor, cell: Tensor) -> Units:
        """With the tower's own tokens in front."""
        own, C = crops.extras.number, len(slot)
        slot, patch, cell = (torch.nn.functional.pad(part, (0, 0, own, 0), value=-1) for part in (slot, patch, cell))
        slot[:, :own, 0] = slot[:, own : own + 1, :].amin(-1) - own + torch.arange(own, device=slot.device)
        valid = (slot >= 0).any(-1)
        kind = torch.where(valid, int(Kind.PATCH), int(Kind.TEXT))
        kind[:, :own] = int(Kind.REGISTER)
        kind[:, : int(crops.extras.cls)] = int(Kind.CLS)
        visual = kind == Kind.PATCH
        place = torch.full((*kind.shape, len(PLACE)), -1, dtype=torch.int64, device=slot.device)
        place[..., 0] = torch.where(visual, torch.arange(C, device=slot.device)[:, None], -1)
        place[..., 3:] = cell
        position = torch.arange(kind.shape[1], device=slot.device).expand(C, -1)
        return cls(Layout(kind, valid, position, place, visual.to(torch.float32)), slot, patch)


def _blocks(rows: int, columns: int, length: int, side: int) -> Tensor:
    """(units, side^2) the patches of each block of a raster of rows x columns blocks."""
    if side == 1:
        return torch.arange(length)[:, None]
    whole = torch.arange(length * side**2).view(rows, side, columns, side)
    return whole.transpose(1, 2).reshape(length, side**2)


def in_rows(tower: nn.Module, side: int, pixels: Tensor | None, shape: Sequence[int]) -> Crops:
    """The crops of a tower that holds each in a row of its own; `shape` is that of its blocks' states, without their width. NotApplicable
    where it does not, and where its patches lie in no raster of blocks."""
    name, extras = type(tower).__name__, extras_of(tower)
    if len(shape) != 2:
        raise NotApplicable(Reason.NOT_BY_PATCH, f"{name} does not hold its patches as (crops, patches, width)")
    patches = shape[1] - extras.number
    columns = columns_of(tower, patches, pixels)
    rows = patches // columns if columns else patches
    if side > 1 and (not columns or columns % side or rows % side):
        raise NotApplicable(
            Reason.NO_RASTER,
            f"{name}: the {patches} patches of a crop are no raster of blocks of {side} x {side}, which become one token each; act before "
            "the LM",
        )
    return Crops([(rows // side if columns else rows, columns // side)] * shape[0], side, extras)
