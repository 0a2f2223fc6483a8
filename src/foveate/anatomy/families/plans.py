"""Plans: the model itself says, from the sizes of its images, into which views each was cut and in which order their tokens stand.

Foveate's own models with a tiling. The overview is crop 0, tiles have their rows and columns in the map that they are laid into.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveate.anatomy.families.boxes import over_boxes
from foveate.anatomy.media import Arrangement, Media, Patches
from foveate.anatomy.raster import Laid
from foveate.errors import NotApplicable, Reason
from foveate.tokens import ImagePlan, Kind, Wiring, wire

Pair = tuple[int, int]
Box = tuple[int, int, int, int]


def plans_of(media: Media) -> list[ImagePlan] | None:
    """Of a call that says the sizes of its images to a model that plans by them."""
    sizes, of = media.given.get("image_sizes"), getattr(media.anatomy.core.config, "plans_of", None)
    return (
        None
        if sizes is None or of is None or media.pixels is None
        else list(of(sizes, media.pixels.shape[-1], media.given.get("view_tokens")))
    )


def arranged(media: Media) -> Planned | None:
    plans = plans_of(media)
    if plans is None:
        return None
    of: Any = media.anatomy.core.bridge
    boxes = {crop.grid: of.boxes(crop.grid) for plan in plans for crop in plan.crops}
    parts = [over_boxes(boxes[crop.grid][: crop.tokens], media.device) for plan in plans for crop in plan.crops]
    return Planned(parts, plans)


def refuse_shapes(media: Media) -> None:
    """NotApplicable where views of one call differ in shape: the tower sees those of one shape together, in an order of its own."""
    if len({crop.pixels for plan in plans_of(media) or [] for crop in plan.crops}) > 1:
        raise NotApplicable(
            Reason.UNKNOWN_PATCHES,
            "images of one call that are seen in several shapes: what the tower says of each is not told apart; encode them apart",
        )


def patches(media: Media) -> Patches | None:
    """Where the model has a lens that makes fewer features of some crops: what it makes stands for the patches of its cell."""
    crops = [crop for plan in plans_of(media) or [] for crop in plan.crops]
    if media.boxes is None or not any(crop.lens for crop in crops):
        return None
    of: Any = media.anatomy.core.bridge
    grid = media.boxes[1]
    each = [(spread(of.boxes(crop.grid), crop.grid, grid), grid) if crop.lens and crop.grid else media.boxes for crop in crops]
    return Patches(boxes=media.boxes, each=tuple(each))


def spread(boxes: Sequence[Box], of: Pair, grid: Pair) -> list[Box]:
    """The patches of a `grid` that lie under boxes of another one over the same picture, those that they cover in part as well."""
    (down, across), (rows, columns) = of, grid
    return [
        (top * rows // down, left * columns // across, -(-bottom * rows // down), -(-right * columns // across))
        for top, left, bottom, right in boxes
    ]


@dataclass(frozen=True)
class Planned(Arrangement):
    """Items that are laid out by their plans."""

    plans: list[ImagePlan]

    def items(self, values: Mapping[Any, list[Tensor]]) -> list[tuple[Laid, dict[Any, Tensor]]]:
        found, start = [], 0
        for plan in self.plans:
            wired, end = wire(plan), start + len(plan.crops)
            device = self.parts[start].kind.device
            own = {
                about: _carried(wired, [value[: crop.tokens] for value, crop in zip(said[start:end], plan.crops, strict=True)])
                for about, said in values.items()
            }
            found.append((Laid(wired.kind.to(device), wired.place.to(device)), own))
            start = end
        return found


def _carried(wired: Wiring, said: Sequence[Tensor]) -> Tensor:
    """(L,) or (L, h) from what was said of the tokens of the crops; 0 for marks."""
    flat = torch.cat(list(said))
    each = wired.apply(flat.reshape(len(flat), -1).float())
    each = torch.where((wired.kind == Kind.PATCH).to(each.device)[:, None], each, 0.0)
    return each.view(len(each), *flat.shape[1:])
