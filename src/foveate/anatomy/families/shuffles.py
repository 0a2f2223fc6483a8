"""Shuffles: the bridge makes one token of each square block of a crop's patches, by laying their states side by side or by their mean.

InternVL and Qianfan-OCR (`downsample_ratio`), Idefics 3 and SmolVLM (`scale_factor`), Aya Vision and Cohere 2 Vision
(`downsample_factor`), Ovis 2 (`hidden_stride` of the tower), Gemma 3 (`mm_tokens_per_image`).
"""

from __future__ import annotations

import math
from typing import Any

from foveate.anatomy.config import sides_of, vision_of


def side(core: Any) -> int:
    """Sides of the block; 1 where nothing says that patches become fewer tokens."""
    config, vision = core.config, vision_of(core.config)
    tokens = getattr(config, "mm_tokens_per_image", None)
    image, patch = sides_of(vision, "image_size"), sides_of(vision, "patch_size")
    if tokens is not None and image is not None and patch is not None:
        return max(1, image[0] // patch[0] // math.isqrt(int(tokens)))
    ratio = getattr(config, "downsample_ratio", None)
    if ratio:
        return round(1 / ratio)
    named = (getattr(config, "scale_factor", None), getattr(config, "downsample_factor", None), getattr(vision, "hidden_stride", None))
    return next((number for number in named if isinstance(number, int) and number > 0), 1)
