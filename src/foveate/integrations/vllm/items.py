"""The images of a call one by one: how their tokens lie, from sizes alone, and what each of them is told apart by."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from foveate.anatomy import Anatomy, Extras, Media
from foveate.integrations.vllm.setting import RequestError
from foveate.reducers import Reducer, parse
from foveate.tokens import Layout

FIELD = "foveate"
"""What goes with each image to the model, beside its pixels: its `Room`."""
_LONGEST = 254  # bytes of a spelling
_SPLIT = ("image_grid_thw", "num_image_patches")  # say how many rows of the pixels each image has


@dataclass(frozen=True)
class Room:
    """The places that a prompt has for an image: of how many tokens, for how many of them, by which reducer."""

    tokens: int
    left: int
    reducer: Reducer

    def packed(self) -> Tensor:
        """(2 + 254,) int64: what vLLM carries to the model are tensors."""
        spelling = str(self.reducer).encode()
        if len(spelling) > _LONGEST:
            raise RequestError(f"{self.reducer} is spelled in more than {_LONGEST} letters")
        return torch.tensor([self.tokens, self.left, *spelling.ljust(_LONGEST, b"\0")])

    @classmethod
    def of(cls, packed: Tensor) -> Room:
        tokens, left, *spelling = packed.tolist()
        return cls(tokens, left, _parsed(bytes(spelling).rstrip(b"\0").decode()))


@functools.lru_cache(maxsize=64)
def _parsed(spelling: str) -> Reducer:
    return parse(spelling)[0]


def lie(config: Any, given: Mapping[str, Any], tokens: int) -> Layout:
    """The layout of one image's tokens.

    config  of the model, as transformers has it: what is read of it is read as from the model itself
    given   the image's own part of what the processor has made, each value with the dimension of a batch in front
    tokens  how many the model makes of it
    """
    core = nn.Module()
    core.config = config
    pixels = pixels_of(given)
    crops = len(pixels) if pixels is not None and pixels.ndim == 4 else 1
    anatomy = Anatomy(core, core, nn.ModuleList())
    media = Media(anatomy, "image", [torch.empty((tokens, 0))], dict(given), [(crops, tokens // crops)], {}, Extras())
    (laid,) = anatomy.arrangement(media).parts
    return Layout.item(*laid)


def pixels_of(given: Mapping[str, Any]) -> Tensor | None:
    return next((value for name, value in given.items() if name.startswith("pixel_values") and isinstance(value, Tensor)), None)


def apart(batch: Mapping[str, Any], items: int) -> list[dict[str, Any]]:
    """Of what the model is given for some images, the part of each, with the dimension of a batch in front."""
    counts = next((batch[name] for name in _SPLIT if isinstance(batch.get(name), Tensor)), None)
    rows = None if counts is None else (counts.prod(-1) if counts.ndim > 1 else counts).tolist()
    parts: list[dict[str, Any]] = [{} for _ in range(items)]
    for name, value in batch.items():
        if rows is not None and name.startswith("pixel_values") and isinstance(value, Tensor):
            each: Any = value.split(rows)
        elif isinstance(value, list | tuple):
            each = [one[None] if isinstance(one, Tensor) else one for one in value]
        else:
            each = value.split(1) if isinstance(value, Tensor) else [value] * items
        if len(each) == items:
            for part, own in zip(parts, each, strict=True):
                part[name] = own
    return parts
