"""Positions: an argument `image_position_ids` or `video_position_ids` (crops or frames, patches, 2) says the column and row of each patch,
-1 where there is none.

Gemma 4. Square blocks of patches are pooled, of `pooling_kernel_size` patches a side; `num_frames_per_video` tells videos apart.
"""

from __future__ import annotations

from typing import Any

from foveate.anatomy.media import Media
from foveate.anatomy.raster import Laid, places


def laid(media: Media) -> list[Laid] | None:
    positions = media.given.get(f"{media.modality}_position_ids")
    if positions is None:
        return None
    config: Any = media.anatomy.core.config
    side = int(getattr(config.vision_config, "pooling_kernel_size", 1))
    given = media.given.get("num_frames_per_video")
    frames = [1] * len(media.features) if given is None else [int(n) for n in given]
    found, start = [], 0
    for length, count in zip(media.lengths, frames, strict=True):
        columns, rows = ((positions[start].amax(0) + 1) // side).tolist()
        known = length == rows * columns * count
        found.append(places(length, frames=count if known else 1, shape=(rows, columns), raster=known, device=media.device))
        start += count
    return found
