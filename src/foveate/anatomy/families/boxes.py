"""Boxes: the bridge itself says from which box of patches it makes each token.

Foveate's own models. Where an image has fewer tokens than the bridge can make, they are the first of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from foveate.anatomy.media import Boxes, Media
from foveate.anatomy.raster import Laid
from foveate.tokens import PLACE, Kind, raster


def boxes(core: nn.Module, pixels: Tensor) -> Boxes | None:
    bridge: Any = getattr(core, "bridge", None)
    if not hasattr(bridge, "boxes"):
        return None
    config: Any = core.config
    grid = config.patch_grid(*pixels.shape[-2:])
    return bridge.boxes(grid), grid


def laid(media: Media) -> list[Laid] | None:
    return None if media.boxes is None else [over_boxes(media.boxes[0][:n], media.device) for n in media.lengths]


def over_boxes(boxes: Sequence[tuple[int, int, int, int]], device: torch.device) -> Laid:
    """One token a box: a raster if the boxes are one."""
    kind = torch.full((len(boxes),), int(Kind.PATCH), dtype=torch.int64, device=device)
    place = torch.full((len(boxes), len(PLACE) - 1), -1, dtype=torch.int64, device=device)
    if (cells := raster(boxes)) is not None:
        place[:, 2:] = torch.cartesian_prod(*(torch.arange(side, device=device) for side in cells))
    return Laid(kind, place)
