"""Noise on the pixels that a processor has made: some steps of a diffusion, the same for a picture wherever it stands in a batch."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from foveate.contract.signals import content_keys, hashed
from foveate.errors import FoveateError

STEPS = 1000  # of the whole diffusion
_FIRST, _LAST = 1e-5, 5e-3  # the variance that a step adds, at the two ends of a sigmoid from -6 to 6


@functools.cache
def left(step: int) -> float:
    """The share of a picture's variance that steps 0 to `step` leave; the rest is noise."""
    found = 1.0
    for t in range(step + 1):
        found *= 1 - (_FIRST + (_LAST - _FIRST) / (1 + math.exp(6 - 12 * t / (STEPS - 1))))
    return found


def noised(inputs: Mapping[str, Any], step: int, seed: int = 0) -> dict[str, Any]:
    """A processor's outputs with noise on their pixels, those of clips too: sqrt(left) * x + sqrt(1 - left) * e, e of variance 1.

    e follows from the seed and the picture's own content. Tiles of nothing but zeros, which a batch is filled up with, stay as they are."""
    found = dict(inputs)
    for name, value in inputs.items():
        if "pixel_values" in name and value is not None:
            found[name] = _on(name, value, inputs, step, seed)
    return found


def _on(name: str, pixels: Any, inputs: Mapping[str, Any], step: int, seed: int) -> Any:
    if isinstance(pixels, list | tuple):  # of pictures of several sizes
        return [_on(name, one[None], {}, step, seed)[0] if isinstance(one, Tensor) else _on(name, one, {}, step, seed) for one in pixels]
    if not isinstance(pixels, Tensor) or not pixels.is_floating_point():
        kind = str(pixels.dtype).removeprefix("torch.") if isinstance(pixels, Tensor) else type(pixels).__name__
        raise FoveateError(
            f"noise is added to pixels that are floating-point tensors, and {name} is {kind}: let the processor normalise them"
        )
    if not pixels.numel():
        return pixels
    return torch.cat([_picture(one, step, seed).reshape(-1, *pixels.shape[1:]) for one in _pictures(name, pixels, inputs)])


def _pictures(name: str, pixels: Tensor, inputs: Mapping[str, Any]) -> Sequence[Tensor]:
    """The pictures one by one: entries of the first axis, or as many of them as the grid of each says where patches are packed."""
    kind = "video" if "video" in name else "image"
    grids = next((value for key, value in inputs.items() if key.startswith(kind) and key.endswith("grid_thw")), None)
    lengths = grids.prod(-1).tolist() if isinstance(grids, Tensor) else []
    return pixels.split(lengths) if sum(lengths) == len(pixels) else pixels.unbind(0)


def _picture(pixels: Tensor, step: int, seed: int) -> Tensor:
    """One picture of any number of axes. Its noise is told by places and not by their number, so that zeros behind it change nothing."""
    own, share = pixels.to(torch.float32), left(step)
    key = content_keys([_without_border(own)])[0]
    places = [torch.arange(n, device=own.device).view(-1, *[1] * (own.ndim - axis - 1)) for axis, n in enumerate(own.shape)]
    size, turn = (hashed(2 * seed + which, key, *places) for which in (0, 1))
    noise = (-2 * torch.log1p(-size)).sqrt() * torch.cos(2 * math.pi * turn)
    found = math.sqrt(share) * own + math.sqrt(1 - share) * noise
    if own.ndim > 2:
        empty = (own == 0).flatten(-3).all(-1)
        found = torch.where(empty[..., None, None, None], own, found)
    return found.to(pixels.dtype)


def _without_border(pixels: Tensor) -> Tensor:
    """Without the zeros behind it, along every axis."""
    there = pixels != 0
    for axis in range(pixels.ndim):
        last = there.movedim(axis, 0).flatten(1).any(1).nonzero()
        pixels = pixels.narrow(axis, 0, int(last[-1]) + 1 if len(last) else 0)
    return pixels
