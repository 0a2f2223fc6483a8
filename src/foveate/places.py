"""What the tokens of an encoded image or video are, and where they lie in its picture: patch, newline or [CLS]; tile, frame, row, column.

A model says this of no token, but what it was given does (grids, sizes, the shape of its pixels), and so does its own packing, which is
done again with places for features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from foveate.anatomy import Anatomy
from foveate.counting import scoring
from foveate.encoder import GROUPS, check_groups
from foveate.errors import NotApplicable, Reason
from foveate.signals import Signal, content_keys
from foveate.tokens import PLACE, Kind
from foveate.towers import TowerProbes, carry


@dataclass(frozen=True)
class Described:
    """What is known of one item of L tokens.

    key     () int64 hash of its pixels (of its features, where these are all there is)
    kind    (L,) int64, a `Kind`
    place   (L, 4) int64: crop, frame, row, column in it, -1 where that is not known
    values  what the tower says of each token, (L,) or (L, h)
    """

    key: Tensor | None
    kind: Tensor
    place: Tensor
    values: dict[Signal, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Encoding:
    """A call that has just encoded the images or videos of one modality.

    features  (L, D) of each item
    given     the call's arguments by name
    crops     how many crops each call of the tower had meanwhile, 0 where it does not say
    packing   the arguments of the model's own packing, if it was called
    cls       whether the tower has a [CLS] token
    """

    anatomy: Anatomy
    modality: str
    features: list[Tensor]
    given: dict[str, Any]
    crops: list[int]
    packing: dict[str, Any] | None
    cls: bool

    def described(self, *, keyed: bool, probes: TowerProbes | None, merged: Sequence[Tensor] | None) -> list[Described]:
        """Its items one by one.

        keyed   whether to hash their content
        probes  of the tower, whose call they have seen
        merged  crop by crop, what was merged in the tower (`encoder.Groups`), where something acts there
        NotApplicable where scores, or what was merged, cannot be carried to the tokens."""
        keys = self._keys() if keyed else [None] * len(self.features)
        if self.packing is not None and self.modality == "image":
            crops = [int(f.shape[0]) for f in self.packing["image_features"]]
            inner = [int(f.shape[1]) for f in self.packing["image_features"] for _ in range(f.shape[0])]
            where = [places(length, cls=self._cls(length), device=self._device) for length in inner]
            found = self._repacked(crops, where, self._tower_values(where, probes, merged))
        else:
            where = self._places()
            said = self._tower_values(where, probes, merged)
            found = [(kind, place, {signal: values[i] for signal, values in said.items()}) for i, (kind, place) in enumerate(where)]
        items = [Described(key, kind, place, values) for key, (kind, place, values) in zip(keys, found, strict=True)]
        for item, made in zip(items, self.features, strict=True):
            if GROUPS in item.values:
                check_groups(item.values[GROUPS], made, item.kind)
        return items

    @property
    def _device(self) -> torch.device:
        return self.features[0].device if self.features else torch.device("cpu")

    @cached_property
    def _grids(self) -> Tensor | None:
        return next((v for name, v in self.given.items() if name.endswith("grid_thw") and v is not None), None)

    @cached_property
    def _pixels(self) -> Tensor | None:
        return next((v for name, v in self.given.items() if name.startswith("pixel_values") and isinstance(v, Tensor)), None)

    @cached_property
    def _boxes(self) -> tuple[list[tuple[int, int, int, int]], tuple[int, int]] | None:
        return None if self._pixels is None else self.anatomy.boxes(self._pixels)

    def _keys(self) -> list[Tensor]:
        pixels: Any = next((v for name, v in self.given.items() if name.startswith("pixel_values") and v is not None), None)
        if pixels is not None and self._grids is not None:
            pixels = list(torch.split(pixels, self._grids.prod(-1).tolist()))
        elif isinstance(pixels, Tensor) and pixels.ndim == 5:  # without the empty tiles that a batch is filled up with
            pixels = [tiles[(tiles != 0).flatten(1).any(1)] for tiles in pixels]
        return list(content_keys(pixels if pixels is not None and len(pixels) == len(self.features) else self.features))

    # ---- places

    def _cls(self, length: int) -> bool:
        """Whether a crop's first token is the tower's [CLS]: one more than a square, and the tower has one."""
        return self.cls and math.isqrt(length) ** 2 != length and math.isqrt(length - 1) ** 2 == length - 1

    def _side(self, item: int) -> int | None:
        """Sides of the block of patches that becomes one token of an item."""
        sizes = next((v for name, v in self.given.items() if name.endswith("merge_sizes") and v is not None), None)
        return self.anatomy.merge if sizes is None else int(sizes[item])

    def _places(self) -> list[tuple[Tensor, Tensor]]:
        lengths = [int(f.shape[0]) for f in self.features]
        device, grids, pixels = self._device, self._grids, self._pixels
        if grids is not None and len(grids) == len(lengths):
            found = []
            for i, (length, (t, h, w)) in enumerate(zip(lengths, grids.tolist(), strict=True)):
                side = self._side(i) or max(1, math.isqrt(t * h * w // max(1, length)))
                each = h * w // side**2
                whole = (
                    each > 0 and length % each == 0 and t % (length // each) == 0
                )  # frames may be merged as well; newlines may be among them
                frames = length // each if whole else 1
                found.append(places(length, frames=frames, shape=(h, w), raster=whole, device=device))
            return found
        if self._boxes is not None:
            return [over_boxes(self._boxes[0], device) for _ in lengths]
        if self.modality == "video" and pixels is not None and pixels.ndim == 5:
            frames = pixels.shape[1]
            if len(lengths) == pixels.shape[0] * frames:  # an item is a frame
                found = [places(n, cls=self._cls(n), device=device) for n in lengths]
                for i, (_, place) in enumerate(found):
                    place[:, 1] = i % frames
                return found
            return [places(n, frames=frames, newline=n % frames == 1, cls=self._cls(n // frames), device=device) for n in lengths]
        sizes = self.given.get("spatial_shapes", self.given.get("image_sizes"))
        if sizes is not None and len(sizes) == len(lengths):
            return [places(n, shape=(int(s[0]), int(s[1])), device=device) for n, s in zip(lengths, sizes, strict=True)]
        if self.anatomy.resampled:
            return [places(n, raster=False, device=device) for n in lengths]
        total, crops = sum(lengths), sum(self.crops)
        each = total // crops if crops and total % crops == 0 else 0
        if each and all(n % each == 0 for n in lengths):
            return [places(n, crops=n // each, cls=self._cls(each), device=device) for n in lengths]
        return [places(n, device=device) for n in lengths]

    # ---- what the tower says

    def _tower_values(
        self, where: list[tuple[Tensor, Tensor]], probes: TowerProbes | None, merged: Sequence[Tensor] | None
    ) -> dict[Signal, list[Tensor]]:
        found: dict[Signal, list[Tensor]] = {} if merged is None else {GROUPS: self._groups(where, merged)}
        if probes is None:
            return found
        grids = self._grids
        order = self.anatomy.window_order(grids)
        side = self._side(0) if grids is not None else None
        grouped = side is not None and (self.anatomy.grouped or any(name.endswith("merge_sizes") for name in self.given))
        with scoring():
            said = probes.read(int(grids[:, 0].sum()) if grids is not None else None)
        for signal, crops in said.items():
            found[signal] = carry(crops, where, grouped=side**2 if grouped and side else 0, order=order, boxes=self._boxes)
        return found

    def _groups(self, where: list[tuple[Tensor, Tensor]], merged: Sequence[Tensor]) -> list[Tensor]:
        """What was merged in the tower. NotApplicable where there is not one token for each patch."""
        patches, tokens = sum(map(len, merged)), sum(int((kind == Kind.PATCH).sum()) for kind, _ in where)
        boxes = self._boxes
        ordered = boxes is None or [(r, c, r + 1, c + 1) for r in range(boxes[1][0]) for c in range(boxes[1][1])] == list(boxes[0])
        if patches != tokens or not ordered or self.anatomy.resampled:
            raise NotApplicable(
                Reason.NOT_BY_PATCH,
                f"{patches} patches of the tower become {tokens} tokens, not one of each: what is merged in the tower cannot be carried "
                "to the language model; act before it instead",
            )
        return carry(list(merged), where)

    # ---- the model's own packing

    def _repacked(
        self, crops: list[int], where: list[tuple[Tensor, Tensor]], values: dict[Signal, list[Tensor]]
    ) -> list[tuple[Tensor, Tensor, dict[Signal, Tensor]]]:
        """The model's own packing (mosaic of tiles, padding cut off, newlines), done again with places and scores for features.

        Crop 0 is the whole picture, the others its tiles; these have their rows and columns in the mosaic."""
        starts = [sum(crops[:i]) for i in range(len(crops))]
        tiles = [where[start : start + count] for start, count in zip(starts, crops, strict=True)]
        numbers = [torch.stack([torch.full((len(kind), 1), float(t)) for t, (kind, _) in enumerate(of)]) for of in tiles]
        device = where[0][0].device
        wide = [_tiles_in_a_row(item, len(of[0][0])) for item, of in zip(self._pack([n.to(device) for n in numbers]), tiles, strict=True)]
        channels = []
        for of, columns in zip(tiles, wide, strict=True):
            stacked = []
            for t, (kind, place) in enumerate(of):
                cell = place[:, 2:].double()
                if t and columns:
                    cell = cell + torch.tensor([(t - 1) // columns, (t - 1) % columns], device=device) * _size(place)
                stacked.append(torch.cat([kind[:, None].double(), torch.full((len(kind), 1), float(t), device=device), cell], 1))
            channels.append(torch.stack(stacked))
        scores = {
            signal: self._packed_scores([said[start : start + n] for start, n in zip(starts, crops, strict=True)])
            for signal, said in values.items()
        }
        described = []
        for i, (item, of, columns) in enumerate(zip(self._pack(channels), tiles, wide, strict=True)):
            newline = item.isnan().any(-1)
            whole = torch.where(newline[:, None], -1.0, item)
            kind = torch.where(newline, int(Kind.NEWLINE), whole[:, 0].round().to(torch.int64))
            crop, row, column = whole[:, 1:4].round().to(torch.int64).unbind(1)
            if columns:  # a mosaic that is scaled down mixes the numbers of tiles, but not the order of their rows and columns
                size = _size(of[0][1])
                tile = 1 + row // size[0] * columns + column // size[1]
                crop = torch.where(newline | (torch.arange(len(crop), device=device) < len(of[0][0])), crop, tile)
            scored = {signal: torch.where(newline.view(-1, *[1] * (v[i].ndim - 1)), 0.0, v[i]) for signal, v in scores.items()}
            described.append((kind, torch.stack([crop, torch.full_like(crop, -1), row, column], 1), scored))
        return described

    def _packed_scores(self, said: list[list[Tensor]]) -> list[Tensor]:
        """From what was said of each image's tiles, (l,) or (l, h) each, to what that says of its tokens; NaN where a newline is."""
        packed = self._pack([torch.stack([tile.reshape(len(tile), -1).double() for tile in tiles]) for tiles in said])
        return [item.to(torch.float32).view(len(item), *said[0][0].shape[1:]) for item in packed]

    def _pack(self, channels: list[Tensor]) -> list[Tensor]:
        """(tiles, l, C) of each image -> (L, C), NaN where a newline is."""
        assert self.packing is not None
        packing = {**self.packing, "image_features": channels}
        if packing.get("image_newline") is not None:
            packing["image_newline"] = torch.full((channels[0].shape[-1],), float("nan"), dtype=torch.float64, device=channels[0].device)
        with torch.no_grad():
            core: Any = self.anatomy.core
            result = type(core).pack_image_features(core, **packing)
        return list(result[0] if isinstance(result, tuple) else result)


def _tiles_in_a_row(item: Tensor, base: int) -> int:
    """Of a packed image, given as the numbers of its tiles: how many stand side by side; 0 where no newline tells."""
    mosaic = item[base:, 0]
    ends = mosaic.isnan().nonzero()
    return int(mosaic[: int(ends[0])].round().unique().numel()) if len(ends) and int(ends[0]) else 0


def _size(place: Tensor) -> Tensor:
    """Rows and columns of a crop."""
    return place[:, 2:].amax(0) + 1


def places(
    length: int,
    *,
    crops: int = 1,
    frames: int = 1,
    shape: tuple[int, int] | None = None,
    cls: bool = False,
    newline: bool = False,
    raster: bool = True,
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    """(L,) kinds and (L, 4) places of an item's tokens: `crops` tiles or `frames` one behind the other, each a raster of the proportions of
    `shape` (rows, columns; a square without it), each behind a [CLS] token with `cls`; one newline token at the very end with `newline`;
    without `raster` nothing is said of rows and columns."""
    parts = max(1, crops * frames)
    each = (length - newline) // parts
    kind = torch.full((length,), int(Kind.PATCH), dtype=torch.int64, device=device)
    place = torch.full((length, len(PLACE) - 1), -1, dtype=torch.int64, device=device)
    index = torch.arange(each * parts, device=device)
    part, rank = index // max(each, 1), index % max(each, 1)
    if crops > 1:
        place[: len(index), 0] = part
    if frames > 1:
        place[: len(index), 1] = part
    columns = _columns(each - cls, shape) if raster else 0
    if columns:
        place[: len(index), 2] = torch.where(rank >= cls, (rank - int(cls)) // columns, -1)
        place[: len(index), 3] = torch.where(rank >= cls, (rank - int(cls)) % columns, -1)
    if cls:
        kind[: len(index)] = torch.where(rank == 0, int(Kind.CLS), kind[: len(index)])
    if newline:
        kind[-1] = int(Kind.NEWLINE)
    return kind, place


def over_boxes(boxes: Sequence[tuple[int, int, int, int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Kinds and places of the tokens of a bridge that says from which box of patches each is made: a raster if the boxes are one."""
    kind = torch.full((len(boxes),), int(Kind.PATCH), dtype=torch.int64, device=device)
    place = torch.full((len(boxes), len(PLACE) - 1), -1, dtype=torch.int64, device=device)
    rows, columns = sorted({b[0] for b in boxes}), sorted({b[1] for b in boxes})
    corners = [(rows.index(b[0]), columns.index(b[1])) for b in boxes]
    if corners == [(r, c) for r in range(len(rows)) for c in range(len(columns))]:
        place[:, 2:] = torch.tensor(corners, device=device)
    return kind, place


def _columns(length: int, shape: tuple[int, int] | None) -> int:
    """Columns of a raster of `length` tokens with the proportions of `shape`; 0 if there is none."""
    if length < 1:
        return 0
    if shape is None:
        side = math.isqrt(length)
        return side if side * side == length else 0
    columns = round(math.sqrt(length * shape[1] / shape[0]))
    return columns if columns and length % columns == 0 else 0
