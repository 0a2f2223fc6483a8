"""What several vision towers see, as bridges that tell them apart get it: side by side in the channels, tower after tower."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from foveate.bridges.base import positive
from foveate.errors import FoveateError

Towers = list[list[int]]
"""[levels, width] of each tower."""


def read_towers(kind: str, given: Any, levels: int, vision_width: int) -> Towers:
    """`given`, or one tower with all that the bridge reads. FoveateError where it is not levels and widths, or not as many channels."""
    if given is None:
        return [[levels, vision_width]]
    if not isinstance(given, Sequence) or not given or not all(isinstance(one, Sequence) and len(one) == 2 for one in given):
        raise FoveateError(f"{kind}: towers={given!r} is not possible; give [levels, width] of each, as in [[24, 1024], [6, 1024]]")
    towers = [[positive("levels of a tower", count), positive("width of a tower", width)] for count, width in given]
    channels = sum(count * width for count, width in towers)
    if channels != levels * vision_width:
        raise FoveateError(
            f"{kind}: towers={towers} have {channels} channels, but the bridge reads {levels} x {vision_width}; a tiling that joins scales "
            "(s2) goes with other bridges"
        )
    return towers


def split(features: Sequence[Tensor], towers: Towers) -> list[list[Tensor]]:
    """Of each tower its levels, each (B, patches, width)."""
    whole = features[0] if len(features) == 1 else torch.cat(list(features), dim=-1)
    parts = iter(whole.split([width for count, width in towers for _ in range(count)], dim=-1))
    return [[next(parts) for _ in range(count)] for count, _ in towers]
