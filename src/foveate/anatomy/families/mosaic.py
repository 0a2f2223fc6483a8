"""Mosaics: the model packs the tiles of a picture in a way of its own (`pack_image_features`): it lays them out as they lie in the picture,
cuts the padding off, and puts a newline after every row.

LLaVA-NeXT, LLaVA-NeXT-Video, LLaVA-OneVision, Granite 4 Vision. Its packing is done again with places and scores for features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.image_processing_utils import select_best_resolution

from foveate.anatomy.families.boxes import over_boxes
from foveate.anatomy.families.crops import before
from foveate.anatomy.media import Arrangement, Media
from foveate.anatomy.raster import Laid, places
from foveate.tokens import Kind

PACKING = "pack_image_features"


def packed(given: dict[str, Any], result: Any) -> dict[str, Any]:
    """The arguments of a call of the model's packing."""
    return given


def arranged(media: Media) -> Mosaic | None:
    packing = media.overheard.get(PACKING)
    if packing is None or media.modality != "image":
        return None
    crops = [int(f.shape[0]) for f in packing["image_features"]]
    inner = [int(f.shape[1]) for f in packing["image_features"] for _ in range(f.shape[0])]
    boxes = media.boxes
    parts = [
        places(n, before=before(media, n), device=media.device) if boxes is None else over_boxes(boxes[0][:n], media.device) for n in inner
    ]
    return Mosaic(parts, media.anatomy.core, packing, crops)


@dataclass(frozen=True)
class Mosaic(Arrangement):
    """Crop 0 of an item is the whole picture, the others its tiles; these have their rows and columns in the mosaic.

    packing  the arguments of the model's packing
    crops    how many parts each item has
    """

    core: Any
    packing: dict[str, Any]
    crops: list[int]

    def items(self, values: Mapping[Any, list[Tensor]]) -> list[tuple[Laid, dict[Any, Tensor]]]:
        tiles = self._by_item(self.parts)
        mosaics = [self._columns(i, count - 1) for i, count in enumerate(self.crops)]
        device = self.parts[0].kind.device
        channels = []
        for of, columns in zip(tiles, mosaics, strict=True):
            stacked = []
            for t, laid in enumerate(of):
                cell = laid.place[:, 2:].double()
                if t and columns:
                    cell = cell + torch.tensor([(t - 1) // columns, (t - 1) % columns], device=device) * laid.size
                stacked.append(torch.cat([laid.kind[:, None].double(), torch.full((len(cell), 1), float(t), device=device), cell], 1))
            channels.append(torch.stack(stacked))
        scores = {about: self._scores(self._by_item(said)) for about, said in values.items()}
        found = []
        for i, (item, of, columns) in enumerate(zip(self._pack(channels), tiles, mosaics, strict=True)):
            newline = item.isnan().any(-1)
            whole = torch.where(newline[:, None], -1.0, item)
            kind = torch.where(newline, int(Kind.NEWLINE), whole[:, 0].round().to(torch.int64))
            crop, row, column = whole[:, 1:4].round().to(torch.int64).unbind(1)
            if columns:  # a mosaic that is scaled down mixes the numbers of tiles, but not the order of their rows and columns
                size = of[0].size
                tile = 1 + row // size[0] * columns + column // size[1]
                crop = torch.where(newline | (torch.arange(len(crop), device=device) < len(of[0].kind)), crop, tile)
            scored = {about: torch.where(newline.view(-1, *[1] * (v[i].ndim - 1)), 0.0, v[i]) for about, v in scores.items()}
            found.append((Laid(kind, torch.stack([crop, torch.full_like(crop, -1), row, column], 1)), scored))
        return found

    def _by_item(self, parts: list[Any]) -> list[list[Any]]:
        starts = [sum(self.crops[:i]) for i in range(len(self.crops))]
        return [parts[start : start + count] for start, count in zip(starts, self.crops, strict=True)]

    def _columns(self, item: int, tiles: int) -> int:
        """How many tiles stand side by side, as the model lays them out; 0 where there are none, or it does so in a way of its own."""
        config = self.core.config
        if not tiles or not hasattr(config, "image_grid_pinpoints"):
            return 0
        size = [int(side) for side in self.packing["image_sizes"][item]]
        height, width = select_best_resolution(size, config.image_grid_pinpoints)
        rows, columns = height // config.vision_config.image_size, width // config.vision_config.image_size
        return columns if rows * columns == tiles else 0

    def _scores(self, said: list[list[Tensor]]) -> list[Tensor]:
        """From what was said of each image's tiles, (l,) or (l, h) each, to what that says of its tokens; NaN where a newline is."""
        found = self._pack([torch.stack([tile.reshape(len(tile), -1).double() for tile in tiles]) for tiles in said])
        return [item.to(torch.float32).view(len(item), *said[0][0].shape[1:]) for item in found]

    def _pack(self, channels: list[Tensor]) -> list[Tensor]:
        """(tiles, l, C) of each image -> (L, C), NaN where a newline is."""
        packing = {**self.packing, "image_features": channels}
        if packing.get("image_newline") is not None:
            packing["image_newline"] = torch.full((channels[0].shape[-1],), float("nan"), dtype=torch.float64, device=channels[0].device)
        with torch.no_grad():
            result = type(self.core).pack_image_features(self.core, **packing)
        return list(result[0] if isinstance(result, tuple) else result)
