"""Frames: the pixels of videos are one tensor (videos, frames, channels, height, width).

LLaVA-NeXT-Video, LLaVA-OneVision, Video-LLaVA. An item is a video, perhaps with one newline at its end, or a frame.
`apply_pooling`, where the model has it, says how many tokens are left of a frame.
"""

from __future__ import annotations

from typing import Any

from foveate.anatomy.families.crops import before
from foveate.anatomy.media import Media
from foveate.anatomy.raster import Laid, places

POOLING = "apply_pooling"


def pooled(given: dict[str, Any], result: Any) -> int:
    """Tokens of a frame, of a call of the model's pooling: (frames, tokens, D)."""
    return int(result.shape[1])


def laid(media: Media) -> list[Laid] | None:
    pixels, lengths = media.pixels, media.lengths
    if media.modality != "video" or pixels is None or pixels.ndim != 5:
        return None
    total, shape = pixels.shape[0] * pixels.shape[1], (int(pixels.shape[-2]), int(pixels.shape[-1]))
    frames = total // len(lengths)
    found = []
    for i, length in enumerate(lengths):
        each: int = media.overheard[POOLING] if POOLING in media.overheard else length // frames
        newline = length - frames * each == 1
        known = length == frames * each + newline
        raster = known and not media.anatomy.resampled
        one = places(
            length,
            frames=frames if known else 1,
            shape=shape,
            before=before(media, each),
            newline=newline,
            raster=raster,
            device=media.device,
        )
        if len(lengths) == total > pixels.shape[0]:
            one.place[:, 1] = i % pixels.shape[1]
        found.append(one)
    return found
