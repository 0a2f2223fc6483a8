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
from transformers.image_processing_utils import select_best_resolution

from foveate.anatomy import Anatomy
from foveate.contract import GROUPS, Signal, content_keys
from foveate.errors import NotApplicable, Reason
from foveate.probes.marker import scoring
from foveate.probes.tower import Extras, TowerProbes, carry
from foveate.tokens import PLACE, Kind


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
    crops     of each call of the tower meanwhile, how many crops it had and how many tokens each of them, 0 where it does not say
    packing   the arguments of the model's own packing, if it was called
    pooled    how many tokens the model's own pooling has left of each frame, if it was called
    extras    the tokens that the tower has beside its patches
    """

    anatomy: Anatomy
    modality: str
    features: list[Tensor]
    given: dict[str, Any]
    crops: list[tuple[int, int]]
    packing: dict[str, Any] | None
    pooled: int | None
    extras: Extras

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
            where = [places(length, before=self._before(length), device=self._device) for length in inner]
            found = self._repacked(crops, where, self._tower_values(where, probes, merged))
        else:
            where = [self._told_apart(kind, place, f) for (kind, place), f in zip(self._places(), self.features, strict=True)]
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

    def _places(self) -> list[tuple[Tensor, Tensor]]:
        rasters = self.anatomy.rasters(self.given)
        if rasters is not None:
            return [places(len(f), shape=shape, device=self._device) for f, shape in zip(self.features, rasters, strict=True)]
        lengths = [int(f.shape[0]) for f in self.features]
        device, grids, pixels = self._device, self._grids, self._pixels
        if grids is not None and len(grids) == len(lengths):
            return [self._in_grid(i, n, grid) for i, (n, grid) in enumerate(zip(lengths, grids.tolist(), strict=True))]
        if self._boxes is not None:
            return [over_boxes(self._boxes[0], device) for _ in lengths]
        positions = self.given.get(f"{self.modality}_position_ids")
        if positions is not None:
            return self._by_positions(lengths, positions)
        if self.modality == "video" and pixels is not None and pixels.ndim == 5:
            return self._by_frames(lengths, pixels)
        sizes = next((self.given[name] for name in ("spatial_shapes", "image_sizes") if self.given.get(name) is not None), None)
        if sizes is not None and len(sizes) == len(lengths):
            return [places(n, shape=self._cells(n, int(s[0]), int(s[1])), device=device) for n, s in zip(lengths, sizes, strict=True)]
        total, crops = sum(lengths), sum(count for count, _ in self.crops)
        each = total // crops if crops and total % crops == 0 else 0
        shape = None if pixels is None or pixels.ndim < 4 else (int(pixels.shape[-2]), int(pixels.shape[-1]))
        raster = shape is not None and not self.anatomy.resampled
        if each and all(n % each == 0 for n in lengths):
            before = self._before(each)
            return [places(n, crops=n // each, shape=shape, before=before, raster=raster, device=device) for n in lengths]
        return [places(n, shape=shape, raster=raster, device=device) for n in lengths]

    def _before(self, each: int) -> tuple[Kind, ...]:
        """What of the tower's own tokens ([CLS], registers) stands before a crop's patches, if the crop has `each` tokens: the bridge has
        dropped the first of them, or all, or none, where there are no more tokens than that fewer than the tower gave."""
        kinds = () if self.extras.behind else (Kind.CLS,) * self.extras.cls + (Kind.REGISTER,) * (self.extras.number - self.extras.cls)
        dropped = {tokens - each for _, tokens in self.crops}
        if self.anatomy.resampled or len(dropped) != 1:
            return ()
        number = dropped.pop()
        return kinds[number:] if number >= 0 else ()

    def _told_apart(self, kind: Tensor, place: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """The same with the rows that are the model's own newline or separator named so, where none was expected: a model with a way of its
        own to put them in. Nothing is known then of the raster of the others."""
        core = self.anatomy.core.named_parameters(recurse=False)
        marks = [p.to(features) for name, p in core if name.endswith(("newline", "separator")) and p.shape == features.shape[1:]]
        if not marks or features.is_meta:
            return kind, place
        mark = torch.stack([(features == p).all(-1) for p in marks]).any(0)
        if not bool((mark & (kind != Kind.NEWLINE)).any()):
            return kind, place
        return torch.where(mark, int(Kind.NEWLINE), int(Kind.PATCH)), torch.full_like(place, -1)

    def _side(self, item: int) -> int | None:
        """Sides of the block of patches that becomes one token of an item."""
        sizes = next((v for name, v in self.given.items() if name.endswith("merge_sizes") and v is not None), None)
        return self.anatomy.merge if sizes is None else int(sizes[item])

    def _in_grid(self, item: int, length: int, grid: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Of an item whose patches are a grid (frames, rows, columns): frames may have been merged as well, or the tower adds marks."""
        t, h, w = grid
        side = self._side(item) or max(1, math.isqrt(t * h * w // max(1, length)))
        rows, columns = h // side, w // side
        frames, rest = divmod(length, rows * columns) if rows * columns else (0, 1)
        if frames and not rest and t % frames == 0:
            return places(length, frames=frames, shape=(rows, columns), device=self._device)
        begin, newline, end = self.anatomy.marks
        if length == begin + rows * (columns + newline) + end:
            return marked((rows, columns), begin, newline, end, self._device)
        return places(length, raster=False, device=self._device)

    def _by_positions(self, lengths: list[int], positions: Tensor) -> list[tuple[Tensor, Tensor]]:
        """By the column and row (crops or frames, patches, 2) of each patch, -1 where there is none; square blocks of them are pooled."""
        side = int(getattr(self.anatomy.core.config.vision_config, "pooling_kernel_size", 1))  # type: ignore[union-attr]
        given = self.given.get("num_frames_per_video")
        frames = [1] * len(lengths) if given is None else [int(n) for n in given]
        found, start = [], 0
        for length, count in zip(lengths, frames, strict=True):
            columns, rows = ((positions[start].amax(0) + 1) // side).tolist()
            known = length == rows * columns * count
            found.append(places(length, frames=count if known else 1, shape=(rows, columns), raster=known, device=self._device))
            start += count
        return found

    def _by_frames(self, lengths: list[int], pixels: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Of videos (videos, frames, channels, height, width): an item is a video, perhaps with a newline at its end, or a frame."""
        total, shape = pixels.shape[0] * pixels.shape[1], (int(pixels.shape[-2]), int(pixels.shape[-1]))
        frames = total // len(lengths)
        found = []
        for i, length in enumerate(lengths):
            each = length // frames if self.pooled is None else self.pooled
            newline = length - frames * each == 1
            known = length == frames * each + newline
            before, raster = self._before(each), known and not self.anatomy.resampled
            kind, place = places(
                length, frames=frames if known else 1, shape=shape, before=before, newline=newline, raster=raster, device=self._device
            )
            if len(lengths) == total > pixels.shape[0]:
                place[:, 1] = i % pixels.shape[1]
            found.append((kind, place))
        return found

    def _cells(self, length: int, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of an item's tokens, from its size in pixels, or in patches where the model counts so; a size of the same
        proportions where that many tokens do not fit into it."""
        config: Any = self.anatomy.core.config
        step = getattr(config, "downsample_factor", 1)
        if self.given.get("spatial_shapes") is None:
            patch = getattr(config.vision_config, "patch_size", 1)
            step = (patch if isinstance(patch, int) else 1) * (getattr(config, "spatial_merge_size", None) or self.anatomy.merge or 1)
        rows, columns = height // step, width // step
        return (rows, columns) if rows * columns == length else (height, width)

    # ---- what the tower says

    def _tower_values(
        self, where: list[tuple[Tensor, Tensor]], probes: TowerProbes | None, merged: Sequence[Tensor] | None
    ) -> dict[Signal, list[Tensor]]:
        found: dict[Signal, list[Tensor]] = {} if merged is None else {GROUPS: self._groups(where, merged)}
        if probes is None:
            return found
        grids = self._grids
        order = self.anatomy.window_order(grids)
        sides = {self._side(i) for i in range(len(grids))} if grids is not None else set()
        if len(sides) > 1:
            raise NotApplicable(
                Reason.UNKNOWN_PATCHES, "images of one call whose tokens are made of more and of fewer patches: encode them apart"
            )
        side = next(iter(sides), None)
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
        mosaics = [self._mosaic(i, count - 1) for i, count in enumerate(crops)]
        device = where[0][0].device
        channels = []
        for of, columns in zip(tiles, mosaics, strict=True):
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
        for i, (item, of, columns) in enumerate(zip(self._pack(channels), tiles, mosaics, strict=True)):
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

    def _mosaic(self, item: int, tiles: int) -> int:
        """How many tiles stand side by side, as the model lays them out; 0 where there are none, or it does so in a way of its own."""
        config: Any = self.anatomy.core.config
        if self.packing is None or not tiles or not hasattr(config, "image_grid_pinpoints"):
            return 0
        size = [int(side) for side in self.packing["image_sizes"][item]]
        height, width = select_best_resolution(size, config.image_grid_pinpoints)
        rows, columns = height // config.vision_config.image_size, width // config.vision_config.image_size
        return columns if rows * columns == tiles else 0

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


def _size(place: Tensor) -> Tensor:
    """Rows and columns of a crop."""
    return place[:, 2:].amax(0) + 1


def places(
    length: int,
    *,
    crops: int = 1,
    frames: int = 1,
    shape: tuple[int, int] | None = None,
    before: Sequence[Kind] = (),
    newline: bool = False,
    raster: bool = True,
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    """(L,) kinds and (L, 4) places of an item's tokens: `crops` tiles or `frames` one after the other, each a raster of the proportions of
    `shape` (rows, columns; a square without it), each behind tokens of the kinds `before`; one newline token at the very end with
    `newline`; without `raster` nothing is said of rows and columns."""
    parts = max(1, crops * frames)
    each = (length - newline) // parts
    first = len(before)
    kind = torch.full((length,), int(Kind.PATCH), dtype=torch.int64, device=device)
    place = torch.full((length, len(PLACE) - 1), -1, dtype=torch.int64, device=device)
    index = torch.arange(each * parts, device=device)
    part, rank = index // max(each, 1), index % max(each, 1)
    if crops > 1:
        place[: len(index), 0] = part
    if frames > 1:
        place[: len(index), 1] = part
    columns = _columns(each - first, shape) if raster else 0
    if columns:
        place[: len(index), 2] = torch.where(rank >= first, (rank - first) // columns, -1)
        place[: len(index), 3] = torch.where(rank >= first, (rank - first) % columns, -1)
    for i, own in enumerate(before):
        kind[: len(index)] = torch.where(rank == i, int(own), kind[: len(index)])
    if newline:
        kind[-1] = int(Kind.NEWLINE)
    return kind, place


def marked(shape: tuple[int, int], begin: bool, newline: bool, end: bool, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Kinds and places of a raster of (rows, columns) with a newline after every row, and a mark at either end; marks are newlines too."""
    rows, columns = shape
    raster = torch.nn.functional.pad(torch.arange(rows * columns, device=device).view(rows, columns), (0, int(newline)), value=-1)
    rank = torch.nn.functional.pad(raster.flatten(), (int(begin), int(end)), value=-1)
    kind = torch.where(rank >= 0, int(Kind.PATCH), int(Kind.NEWLINE))
    place = torch.full((len(rank), len(PLACE) - 1), -1, dtype=torch.int64, device=device)
    place[:, 2] = torch.where(rank >= 0, rank // columns, -1)
    place[:, 3] = torch.where(rank >= 0, rank % columns, -1)
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
    rows, columns = shape or (1, 1)
    high, wide = round(math.sqrt(length * rows / columns)), round(math.sqrt(length * columns / rows))
    return wide if high * wide == length else 0


def check_groups(groups_L2: Tensor, features_LD: Tensor, kind: Tensor) -> None:
    """NotApplicable where tokens of one group differ: then something on the way from tower to tokens looks at more than one of them."""
    patch = (kind == Kind.PATCH).nonzero()[:, 0]
    kept, own = groups_L2[patch].unbind(-1)
    if bool((groups_L2 != groups_L2.round()).any()):
        raise NotApplicable(Reason.NOT_BY_PATCH, "tokens are interpolated between patches, so that none stands for one of them")
    order = own.argsort(stable=True)
    at = torch.searchsorted(own[order], kept.contiguous()).clamp(max=max(len(own) - 1, 0))
    there = own[order][at] == kept
    features = features_LD.detach()[patch].float()
    difference = (features[there] - features[order[at[there]]]).abs()
    # Rows of one product may differ in their last bits; positions added behind the tower, or a convolution, differ in their first.
    if difference.numel() and bool(difference.max() > 0.02 * features.abs().max()):
        raise NotApplicable(Reason.NOT_BY_PATCH, "behind the tower patches are mixed, or told apart by their places; act before the LM")
