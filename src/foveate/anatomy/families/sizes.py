"""Sizes: an argument says how high and wide each item is, `spatial_shapes` or `target_sizes` in patches or `image_sizes` in pixels.

LFM2-VL (patches, of which `downsample_factor` a side become a token), MiniCPM-V and MiniCPM-OCR (patches; a picture and its slices are
items of their own, as are the frames of a video), Mistral 3 and LightOnOCR (pixels, `spatial_merge_size`).
"""

from __future__ import annotations

from typing import Any

from foveate.anatomy.media import Media
from foveate.anatomy.raster import Laid, places

_IN_PIXELS = "image_sizes"
_SIZES = ("spatial_shapes", _IN_PIXELS, "target_sizes", "target_sizes_videos")


def laid(media: Media) -> list[Laid] | None:
    name = next((name for name in _SIZES if media.given.get(name) is not None), None)
    if name is None or len(media.given[name]) != len(media.features):
        return None
    shapes = [
        _cells(media, n, int(s[0]), int(s[1]), pixels=name == _IN_PIXELS) for n, s in zip(media.lengths, media.given[name], strict=True)
    ]
    return [places(n, shape=shape, device=media.device) for n, shape in zip(media.lengths, shapes, strict=True)]


def _cells(media: Media, length: int, height: int, width: int, *, pixels: bool) -> tuple[int, int]:
    """Rows and columns of an item's tokens; a size of the same proportions where that many tokens do not fit into it."""
    config: Any = media.anatomy.core.config
    step = getattr(config, "downsample_factor", 1)
    if pixels:
        patch = getattr(config.vision_config, "patch_size", 1)
        step = (patch if isinstance(patch, int) else 1) * (getattr(config, "spatial_merge_size", None) or media.anatomy.merge or 1)
    rows, columns = height // step, width // step
    return (rows, columns) if rows * columns == length else (height, width)
