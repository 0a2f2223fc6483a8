"""Marks: the tower itself puts a mark in front of each picture, a newline after each row of tokens, and a mark after the picture.

HunYuan VL. Parameters of the tower are named after them.
"""

from __future__ import annotations

import torch
from torch import nn

from foveate.anatomy.raster import Laid
from foveate.tokens import PLACE, Kind


def marks(tower: nn.Module) -> tuple[bool, bool, bool]:
    """Whether there are marks in front, newlines, marks at the end."""
    named = {name.rpartition(".")[2] for name, _ in tower.named_parameters()}
    return "image_begin" in named, "image_newline" in named, "image_end" in named


def marked(shape: tuple[int, int], begin: bool, newline: bool, end: bool, device: torch.device | None = None) -> Laid:
    """A raster of (rows, columns) with a newline after every row, and a mark at either end; marks are newlines too."""
    rows, columns = shape
    raster = torch.nn.functional.pad(torch.arange(rows * columns, device=device).view(rows, columns), (0, int(newline)), value=-1)
    rank = torch.nn.functional.pad(raster.flatten(), (int(begin), int(end)), value=-1)
    kind = torch.where(rank >= 0, int(Kind.PATCH), int(Kind.NEWLINE))
    place = torch.full((len(rank), len(PLACE) - 1), -1, dtype=torch.int64, device=device)
    place[:, 2] = torch.where(rank >= 0, rank // columns, -1)
    place[:, 3] = torch.where(rank >= 0, rank % columns, -1)
    return Laid(kind, place)
