"""From views to visual tokens: what a model with a tiling does around its tower and its bridge."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from foveate.bridges import Bridge, build_bridge
from foveate.bridges.windows import Box, Grid
from foveate.errors import FoveateError
from foveate.tilings import Sight
from foveate.tokens import MARKS, Crop, ImagePlan, raster, stacks, wire

_LARGEST = 32  # patches a side of which a bridge might make one token


# ---- before there is a model -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BridgeSight(Sight):
    """What a tower sees at once, and what a bridge makes of it.

    bridge  its configuration as JSON
    each    as how many tokens a view is asked for; None: as many as the bridge makes
    """

    bridge: str = ""
    each: int | None = None

    @classmethod
    def of(cls, bridge: Mapping[str, Any], side: int, patch: int, each: int | None = None) -> BridgeSight:
        """Of the views of a model. `merge` is the least that the bridge takes."""
        spelled = json.dumps(dict(bridge), sort_keys=True)
        return cls(side, patch, _least(spelled), spelled, each)

    def made(self, grid: Grid) -> tuple[int, Grid | None]:
        """See Sight. FoveateError where the bridge cannot take the grid, or does not make so many tokens of it."""
        return _made(self.bridge, grid, self.each)

    def boxes(self, grid: Grid) -> tuple[Box, ...]:
        """For which patches each token of a view stands."""
        return tuple(_boxes(self.bridge, grid, self.each))


@lru_cache(maxsize=32)
def _built(bridge: str) -> Bridge:
    with torch.device("meta"), torch.inference_mode(False):
        return build_bridge(json.loads(bridge))


@lru_cache(maxsize=4096)
def _made(bridge: str, grid: Grid, each: int | None) -> tuple[int, Grid | None]:
    boxes = _boxes(bridge, grid, each)
    return len(boxes), raster(boxes)


def _boxes(bridge: str, grid: Grid, each: int | None) -> list[Box]:
    built = _built(bridge)
    return built.boxes(grid)[: built.within(grid, each)]


@lru_cache(maxsize=32)
def _least(bridge: str) -> int:
    for side in range(1, _LARGEST + 1):
        try:
            _made(bridge, (side, 2 * side), None)
        except FoveateError:
            continue
        return side
    return 1  # bound to one grid, which it will say of any other


# ---- in the model ----------------------------------------------------------------------------------------------------------------------


class ImageMarks(nn.Module):
    """The learned vectors that a tiling puts between visual tokens, each (width,)."""

    def __init__(self, names: Sequence[str], width: int) -> None:
        super().__init__()
        for name in names:
            self.register_parameter(name, nn.Parameter(torch.randn(width) / width**0.5))

    def table(self) -> Tensor:
        """(len(MARKS), width), zeros for those that the tiling has not."""
        known = dict(self.named_parameters())
        empty = torch.zeros_like(next(iter(known.values())))
        return torch.stack([known.get(name, empty) for name in MARKS])


def of_images(features: Sequence[Tensor], views: int) -> list[Tensor]:
    """Of each level (images * views, patches, width) -> (images, views, patches, width). FoveateError where that cannot be."""
    for x in features:
        if len(x) % views:
            raise FoveateError(f"{len(x)} views were given, but an image has {views} of them; hand in image_sizes with the pixels")
    return [x.unflatten(0, (-1, views)) for x in features]


def joined(features: Sequence[Tensor], grid: Grid, sizes: int) -> list[Tensor]:
    """Scaling on scales: of each level (images, 1 + 4 + … + sizes², patches, width), the maps of each size put together and pooled to
    one view's patches, (images, patches, width), sizes before levels."""
    (rows, columns), found, start = grid, [], 0
    for k in range(1, sizes + 1):
        for x in features:
            part = x[:, start : start + k * k].unflatten(2, grid).unflatten(1, (k, k))
            whole = part.permute(0, 5, 1, 3, 2, 4).reshape(len(part), x.shape[-1], k * rows, k * columns)
            found.append(avg_pool2d(whole, k).flatten(2).transpose(1, 2) if k > 1 else whole.flatten(2).transpose(1, 2))
        start += k * k
    return found


def arrange(tokens: Sequence[Tensor], plans: Sequence[ImagePlan], marks: ImageMarks | None) -> list[Tensor]:
    """Of each image its tokens (visual tokens and marks, width) in the order of the prompt, from those of its crops, one after the
    other."""
    table = None if marks is None else marks.table()
    return [wire(plan).apply(own, table) for own, plan in zip(tokens, plans, strict=True)]


def stacked(tokens: Sequence[Tensor], plans: Sequence[ImagePlan], count: int) -> list[list[Tensor]]:
    """Of each of `count` stacks, of each image the (visual tokens, width) that are added to its visual tokens, from those of its crops;
    zeros where the image has fewer stacks."""
    found = []
    for own, plan in zip(tokens, plans, strict=True):
        there = own[stacks(plan).to(own.device)]
        found.append([*there, *there.new_zeros(count - len(there), *there.shape[1:])])
    return [list(of) for of in zip(*found, strict=True)]


def check_views(plans: Sequence[ImagePlan], given: int) -> None:
    """FoveateError unless as many views were given as the images become."""
    views = sum(len(plan.crops) for plan in plans)
    if views != given:
        raise FoveateError(
            f"image_sizes says of {len(plans)} images that they become {views} views, but pixel_values holds {given}; "
            "processor and model must agree on the tiling"
        )


def by_shape(plans: Sequence[ImagePlan], pixels: Tensor) -> list[tuple[tuple[int, int], list[int]]]:
    """(height, width) of views and which of them have it; views of several shapes lie in the upper left of their pixels."""
    shapes: dict[tuple[int, int], list[int]] = {}
    for number, crop in enumerate(crop for plan in plans for crop in plan.crops):
        shapes.setdefault(crop.pixels[::-1], []).append(number)
    if any(height > pixels.shape[-2] or width > pixels.shape[-1] for height, width in shapes):
        raise FoveateError(f"pixel_values of shape {tuple(pixels.shape)} are smaller than the views that image_sizes says")
    return list(shapes.items())


def each_shape(plans: Sequence[ImagePlan], pixels: Tensor, make: Callable[[Tensor, Sequence[Crop]], Iterable[Tensor]]) -> list[Tensor]:
    """What `make` makes of views (n, channels, height, width) of one shape and their crops, n times (tokens, width), for each view in its
    order."""
    crops, found = [crop for plan in plans for crop in plan.crops], dict[int, Tensor]()
    for (height, width), numbers in by_shape(plans, pixels):
        own = pixels if len(numbers) == len(pixels) else pixels[numbers]
        found |= dict(zip(numbers, make(own[..., :height, :width], [crops[number] for number in numbers]), strict=True))
    return [found[number] for number in range(len(pixels))]
