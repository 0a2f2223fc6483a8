"""Pooling: an argument `*token_pooling` (tokens, patches) says of each token which of the tower's patches it is made of, -1 where there are
no more, and an argument `*_grids` how an item's tokens lie.

Molmo 2. A picture is a small view of the whole (crop 0) and one raster over all of its overlapping crops (crop 1); a video is frames.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.anatomy.media import Media, Patches
from foveate.anatomy.raster import Laid, places


def laid(media: Media) -> list[Laid] | None:
    grids = media.given.get(f"{media.modality}_grids")
    if _pooling(media) is None or grids is None:
        return None
    return [_in_grids(media, length, grid) for length, grid in zip(media.lengths, grids.tolist(), strict=True)]


def _in_grids(media: Media, length: int, grid: list[int]) -> Laid:
    if len(grid) == 3:
        return places(length, frames=grid[0], shape=(grid[1], grid[2]), device=media.device)
    parts = [places(r * c, shape=(r, c), device=media.device) for r, c in (grid[:2], grid[2:]) if r * c]
    for crop, part in enumerate(parts):
        part.place[:, 0] = crop
    return Laid(torch.cat([part.kind for part in parts]), torch.cat([part.place for part in parts]))


def patches(media: Media) -> Patches | None:
    pooling = _pooling(media)
    return None if pooling is None else Patches(pooled=pooling[(pooling >= 0).any(1)])


def _pooling(media: Media) -> Tensor | None:
    found: Tensor | None = media.named("token_pooling")
    return found
