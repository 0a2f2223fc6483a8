"""Crops: a call says of an item no more than the shape of its pixels, and the tower how many crops it saw and how many tokens each had.

All that is left: LLaVA, InternVL, Gemma 3, PaliGemma, Idefics 3, Llama 4 and most others. An item is one crop or several, each a raster of
the pixels' proportions, perhaps behind tokens of the tower's own.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from foveate.anatomy.media import Media
from foveate.anatomy.raster import Laid, places
from foveate.tokens import Kind


def laid(media: Media) -> list[Laid]:
    lengths, pixels = media.lengths, media.pixels
    total, crops = sum(lengths), sum(count for count, _ in media.crops)
    each = total // crops if crops and total % crops == 0 else 0
    shape = None if pixels is None or pixels.ndim < 4 else (int(pixels.shape[-2]), int(pixels.shape[-1]))
    raster = shape is not None and not media.anatomy.resampled
    if each and all(n % each == 0 for n in lengths):
        own = before(media, each)
        return [places(n, crops=n // each, shape=shape, before=own, raster=raster, device=media.device) for n in lengths]
    return [places(n, shape=shape, raster=raster, device=media.device) for n in lengths]


def before(media: Media, each: int) -> tuple[Kind, ...]:
    """What of the tower's own tokens ([CLS], registers) stands before a crop's patches, if the crop has `each` tokens: the bridge has
    dropped the first of them, or all, or none, where there are no more tokens than that fewer than the tower gave."""
    extras = media.extras
    kinds = () if extras.behind else (Kind.CLS,) * extras.cls + (Kind.REGISTER,) * (extras.number - extras.cls)
    dropped = {tokens - each for _, tokens in media.crops}
    if media.anatomy.resampled or len(dropped) != 1:
        return ()
    number = dropped.pop()
    return kinds[number:] if number >= 0 else ()


def pixels_of(pixels: Any) -> Any:
    """Item by item; of several tiles an item without the empty ones that a batch is filled up with."""
    if isinstance(pixels, Tensor) and pixels.ndim == 5:
        return [tiles[(tiles != 0).flatten(1).any(1)] for tiles in pixels]
    return pixels
