"""Grids: an argument `*grid_thw` says of each item how many frames, rows and columns of patches it has.

Qwen2-VL and its line, GLM-4V and its line, Ernie 4.5 VL, EXAONE 4.5, PaddleOCR-VL, HunYuan VL, VideoLLaMA 3. A square block of patches
becomes a token, of `spatial_merge_size` patches a side in the vision configuration, or of `*merge_sizes` for each item apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from foveate.anatomy.families import windows
from foveate.anatomy.families.marks import marked
from foveate.anatomy.media import Media, Patches
from foveate.anatomy.raster import Laid, places
from foveate.anatomy.units import Crops
from foveate.errors import NotApplicable, Reason

if TYPE_CHECKING:
    from foveate.anatomy.reading import Anatomy


def grids_of(media: Media) -> Tensor | None:
    """(items, 3) int64."""
    found: Tensor | None = media.named("grid_thw")
    return found


def merge(core: nn.Module) -> int | None:
    """Sides of the block of patches that becomes one token, where the vision configuration says so."""
    config = getattr(getattr(core, "config", None), "vision_config", None)
    side = getattr(config, "spatial_merge_size", None)
    return None if side is None else int(side)


def grouped(tower: nn.Module) -> bool:
    """Whether the tower orders its patches so that those of one token stand side by side."""
    return hasattr(tower, "spatial_merge_size")


def laid(media: Media) -> list[Laid] | None:
    grids, lengths = grids_of(media), media.lengths
    if grids is None or len(grids) != len(lengths):
        return None
    return [_in_grid(media, i, n, grid) for i, (n, grid) in enumerate(zip(lengths, grids.tolist(), strict=True))]


def _in_grid(media: Media, item: int, length: int, grid: tuple[int, int, int]) -> Laid:
    """Frames may have been merged as well, or the tower adds marks."""
    t, h, w = grid
    side = _side(media, item) or max(1, math.isqrt(t * h * w // max(1, length)))
    rows, columns = h // side, w // side
    frames, rest = divmod(length, rows * columns) if rows * columns else (0, 1)
    if frames and not rest and t % frames == 0:
        return places(length, frames=frames, shape=(rows, columns), device=media.device)
    begin, newline, end = media.anatomy.marks
    if length == begin + rows * (columns + newline) + end:
        return marked((rows, columns), begin, newline, end, media.device)
    return places(length, raster=False, device=media.device)


def _side(media: Media, item: int) -> int | None:
    sizes = media.named("merge_sizes")
    return media.anatomy.merge if sizes is None else int(sizes[item])


def patches(media: Media) -> Patches | None:
    """NotApplicable where blocks of one call differ in size."""
    grids = grids_of(media)
    if grids is None:
        return None
    order = media.anatomy.window_order(grids)
    sides = {_side(media, i) for i in range(len(grids))}
    if len(sides) > 1:
        raise NotApplicable(
            Reason.UNKNOWN_PATCHES, "images of one call whose tokens are made of more and of fewer patches: encode them apart"
        )
    side = next(iter(sides), None)
    together = media.anatomy.grouped or any(name.endswith("merge_sizes") for name in media.given)
    return Patches(int(grids[:, 0].sum()), side**2 if side and together else 0, order, media.boxes)


def crops(anatomy: Anatomy, tower: nn.Module, given: dict[str, Any], shape: Sequence[int]) -> Crops | None:
    """Those of a call of a tower that is given grids: each frame is one. NotApplicable where blocks of one call differ in size, or the
    grids are not those of the tower's slots."""
    grids = next((value for name, value in given.items() if name.endswith("grid_thw") and value is not None), None)
    if grids is None:
        return None
    sizes = given.get("merge_sizes")
    sides = {anatomy.merge or 1} if sizes is None else {int(size) for size in sizes}
    if len(sides) > 1:
        raise NotApplicable(
            Reason.UNKNOWN_PATCHES, "images of one call whose tokens are made of more and of fewer patches: encode them apart"
        )
    side, frames = sides.pop(), [(h, w) for t, h, w in grids.tolist() for _ in range(t)]
    slots = sum(h * w for h, w in frames)
    if tuple(shape) not in ((slots,), (1, slots)) or any(h % side or w % side for h, w in frames):
        raise NotApplicable(
            Reason.UNKNOWN_PATCHES,
            f"{type(tower).__name__} was given grids {grids.tolist()} and has states of {tuple(shape)}: which of them are of which patches "
            "is not known",
        )
    together = grouped(tower) or sizes is not None
    order = windows.order(tower, grids)
    return Crops([(h // side, w // side) for h, w in frames], side, packed=True, grouped=together, order=order)


def pixels_of(media: Media, pixels: Any) -> list[Tensor] | None:
    """Of each item its patches, which follow one another in one tensor."""
    grids = grids_of(media)
    return None if grids is None else list(torch.split(pixels, grids.prod(-1).tolist()))
