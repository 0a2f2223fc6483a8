"""Images on their way into the language model: what the encoder made of them, where it lies in the picture, and which slots it fills.

Three methods of the model are watched. `get_image_features` and `get_video_features` say what was encoded, item by item: an item is one
entry of what they return, an image, a tile or a video. `get_placeholder_mask` says which slots the features go to. `generate` encodes first
and hands the features in later, perhaps repeated for its beams: then items are recognised by the content of their features.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from foveate.anatomy import SLOT_METHODS, Anatomy
from foveate.counting import scoring
from foveate.encoder import GROUPS, Encoder, TowerPass, check_groups
from foveate.errors import FoveateError, NotApplicable, Reason
from foveate.hooks import Hook, uncompiled
from foveate.signals import Noise, Signal, content_keys
from foveate.tokens import PLACE, Kind, Layout
from foveate.towers import TOWER_SIGNALS, TowerProbes, carry, prefix_of

MODALITIES = ("image", "video")
_REMEMBERED = 1024  # items that are known until they enter the language model
_CALLS = 64  # calls of towers that are known until then


@dataclass(frozen=True, eq=False)
class Encoded:
    """A call that encoded images or videos, as far as its cost depends on it.

    method  of the model's core, such as "get_image_features"
    given   its arguments; pixels may be stand-ins (see `stand_in`)
    """

    method: str
    given: Mapping[str, Any]

    @classmethod
    def of(cls, method: str, given: Mapping[str, Any]) -> Encoded:
        return cls(method, {name: stand_in(value) for name, value in given.items() if value is not None})


def stand_in(value: Any) -> Any:
    """Of pixels only their shape and which of them are nothing but zeros, since that is how empty tiles are told; in hardly any memory."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.ndim < 2:
        return value
    whole = value.detach().flatten(min(2, value.ndim - 1)).ne(0).any(-1)
    return whole.view(*whole.shape, *[1] * (value.ndim - whole.ndim)).expand(value.shape)


@dataclass(frozen=True)
class Item:
    """What is known of one item of L tokens.

    key     () int64 hash of its pixels (of its features, where these are all there is)
    kind    (L,) int64, a `Kind`
    place   (L, 4) int64: crop, frame, row, column in it, -1 where that is not known
    values  what the tower says of each token, (L,) or (L, h)
    call    what encoded it, and the share of that call which is this item's
    """

    key: Tensor | None
    kind: Tensor
    place: Tensor
    values: dict[Signal, Tensor] = field(default_factory=dict)
    call: tuple[Encoded, Fraction] | None = None

    def __len__(self) -> int:
        return int(self.kind.shape[0])

    def select(self, kept: Tensor) -> Item:
        """Of its tokens those where `kept` (L,) is True."""
        return Item(
            self.key, self.kind[kept], self.place[kept], {signal: values[kept] for signal, values in self.values.items()}, self.call
        )


class Watched:
    """Stands in for a method of the model and tells `note` of every call; looks like the method to those who ask for its signature."""

    def __init__(self, module: Any, name: str, note: Callable[..., Any]) -> None:
        self.module, self.name, self.note = module, name, note
        setattr(module, name, self)

    @property
    def method(self) -> Callable[..., Any]:
        return getattr(type(self.module), self.name).__get__(self.module)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.method)

    def given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """All arguments of a call by name."""
        named = dict(self.__signature__.bind_partial(*args, **kwargs).arguments)
        more = named.pop("kwargs", {})
        return {**named, **more}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return uncompiled(self.note, self, args, kwargs)

    def remove(self) -> None:
        delattr(self.module, self.name)


class Images:
    """The items of the forward pass under way, and of those that were encoded ahead of theirs."""

    def __init__(self, anatomy: Anatomy, needs: Iterable[Signal], encoders: dict[str, Encoder] | None = None) -> None:
        self.anatomy = anatomy
        self._encoders = encoders or {}
        self.calls: list[TowerPass] = []  # of towers in which something is cut: for the images of this forward pass, or of the next
        self._entered_all = False
        self._items: dict[str, list[Item]] = {}
        self._slots: dict[str, Tensor] = {}
        tower = [signal for signal in needs if isinstance(signal, TOWER_SIGNALS)]
        towers = {modality: anatomy.tower_of(modality) for modality in MODALITIES} if tower or anatomy.has_tower else {}
        made = {of: TowerProbes(of, tower) for of in set(towers.values())} if tower else {}
        self.probes = {modality: made[of] for modality, of in towers.items()} if tower else {}
        self._has_cls = {modality: prefix_of(of)[0] for modality, of in towers.items()}
        self._keyed = any(isinstance(signal, Noise) for signal in needs)
        self._known: dict[int, Item] = {}
        self._inside = self._encoding = False
        self._kept: dict[str, Tensor | None] = {}
        self._crops: list[int] = []
        self._packing: dict[str, Any] | None = None
        core: Any = anatomy.core
        watched = {f"get_{modality}_features": self._encode for modality in MODALITIES if hasattr(core, f"get_{modality}_features")}
        watched[next(name for name in SLOT_METHODS if hasattr(core, name))] = self._placed
        if hasattr(core, "pack_image_features"):
            watched["pack_image_features"] = self._packed
        self._watched = [Watched(core, name, note) for name, note in watched.items()]
        self._hooks = [of.register_forward_hook(Hook(self._after_tower)) for of in set(towers.values())]
        self.end()

    def remove(self) -> None:
        for watched in self._watched:
            watched.remove()
        for hook in self._hooks:
            hook.remove()
        for probes in self.probes.values():
            probes.remove()
        self._watched, self._hooks = [], []

    # ---- a forward pass

    def begin(self, handed_in: dict[str, Any] | None, kept: dict[str, Tensor | None]) -> None:
        """A forward pass begins, with these encoded images in its arguments; of a modality's features only those `kept` enter the model."""
        self.end()
        self._inside = True
        self._kept = kept
        for modality in MODALITIES:
            outputs = (handed_in or {}).get(modality)
            if outputs is not None:
                self._items[modality] = [self._recognised(features) for features in _features(outputs)]

    def end(self) -> None:
        self._entered_all |= bool(self.items)
        self._inside = self._encoding = False
        self._kept = {}
        self._items, self._slots = {}, {}
        self._latest: list[Item] = []
        self._entered: set[str] = set()

    @property
    def encoded(self) -> list[Item]:
        """Those that this forward pass has encoded, whatever slots they go to."""
        return [item for modality in MODALITIES for item in self._items.get(modality, [])]

    @property
    def items(self) -> list[Item]:
        """Those whose slots are known, images before videos."""
        return [item for modality in MODALITIES if modality in self._slots for item in self._items.get(modality, [])]

    def layout(self, shape: tuple[int, int], valid: Tensor | None, position: Tensor) -> tuple[Layout, Tensor]:
        """The layout of the chunk, and (B, N) int64 which of the items' tokens, counted through all of them, a slot holds (-1: none)."""
        items, device = self.items, position.device
        which = torch.full(shape, -1, dtype=torch.int64, device=device)
        start = 0
        for modality in MODALITIES:
            if modality not in self._slots or not self._items.get(modality):
                continue
            slots = self._slots[modality].to(device)
            lengths = [len(item) for item in self._items[modality]]
            if sum(lengths) != int(slots.sum()):
                raise FoveateError(
                    f"the prompts have {int(slots.sum())} {modality} placeholders, but the {len(lengths)} {modality}s make {sum(lengths)} "
                    "visual tokens; use the processor that belongs to the model"
                )
            which[slots] = torch.arange(start, start + sum(lengths), device=device)
            start += sum(lengths)
        layout = Layout.sequence(which >= 0, None, valid_BN=valid, position_BN=position)
        if not items:
            return layout, which
        at = which.clamp(min=0)
        here = which >= 0
        image = torch.cat([torch.full((len(item),), i, device=device) for i, item in enumerate(items)])
        kind = torch.where(here, torch.cat([item.kind.to(device) for item in items])[at], int(Kind.TEXT))
        place = torch.cat([image[:, None], torch.cat([item.place.to(device) for item in items])], 1)[at]
        place = torch.where(here[..., None], place, -1)
        return Layout(kind, layout.valid, layout.position, place, (kind == Kind.PATCH).to(torch.float32)), which

    @property
    def keys(self) -> Tensor | None:
        """(I,) int64 content of each item, where a reducer asks for it."""
        if not self._keyed or not self.items:
            return None
        return torch.stack([item.key for item in self.items if item.key is not None])

    def values(self, signal: Signal, which_BN: Tensor) -> Tensor:
        """(B, N) or (B, N, h) float32: what the tower says of each slot's token, 0 elsewhere."""
        for item in self.items:
            if signal not in item.values:
                raise FoveateError("images handed in as features have no tower scores: hand in pixel_values, or encode while attached")
        values = torch.cat([item.values[signal] for item in self.items]).to(which_BN.device, torch.float32)
        spread = values[which_BN.clamp(min=0)]
        return torch.where((which_BN >= 0).view(*which_BN.shape, *[1] * (spread.ndim - 2)), spread, 0.0)

    # ---- what is watched

    def _after_tower(self, module: Any, args: Any, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else getattr(output, "last_hidden_state", None)
        self._crops.append(int(states.shape[0]) if isinstance(states, Tensor) and states.ndim > 2 else 0)

    def _placed(self, watched: Watched, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = watched.method(*args, **kwargs)
        given = watched.given(args, kwargs)
        if watched.name != SLOT_METHODS[0]:
            self._slots["image"] = self.anatomy.placeholders(given.get("input_ids"), given["inputs_embeds"])
            return result
        masks = result if isinstance(result, tuple) else (result,)
        asked = [f"{modality}_features" in watched.__signature__.parameters for modality in MODALITIES]
        for modality, mask in zip(MODALITIES, masks, strict=False):
            if any(asked) and given.get(f"{modality}_features") is None:
                continue
            self._slots[modality] = mask[..., 0] if mask.ndim == 3 else mask
            if any(asked):
                if modality not in self._items:  # videos that are encoded as images
                    self._items[modality] = self._latest
                self._entered.add(modality)
            kept = self._kept.get(modality)
            if kept is not None and modality in self._items:
                parts = torch.split(kept, [len(item) for item in self._items[modality]])
                self._items[modality] = [item.select(part) for item, part in zip(self._items[modality], parts, strict=True)]
        return result

    def _packed(self, watched: Watched, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._packing = watched.given(args, kwargs)
        return watched.method(*args, **kwargs)

    def _encode(self, watched: Watched, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._encoding:  # one of the two may call the other
            return watched.method(*args, **kwargs)
        self._crops, self._packing, self._encoding = [], None, True
        if self._entered_all:
            self.calls, self._entered_all = [], False
        for encoder in self._encoders.values():
            encoder.take()  # of calls that came from elsewhere
        try:
            outputs = watched.method(*args, **kwargs)
        finally:
            self._encoding = False
        modality = watched.name.split("_")[1]
        features = _features(outputs)
        given = watched.given(args, kwargs)
        call = Encoded.of(watched.name, given), Fraction(1, max(1, len(features)))
        items = [replace(item, call=call) for item in self._described(modality, features, given)]
        if self._inside:
            self._latest = items
            if modality not in self._entered:
                self._items[modality] = items
            return outputs
        if len(self._known) > _REMEMBERED:
            self._known.clear()
        for item, name in zip(items, _names(features), strict=True):
            self._known[name] = item
        return outputs

    def _recognised(self, features: Tensor) -> Item:
        known = self._known.get(_names([features])[0])
        if known is not None:
            return known
        kind, place = places(features.shape[0], device=features.device)
        return Item(content_keys([features])[0] if self._keyed else None, kind, place)

    def _described(self, modality: str, features: list[Tensor], given: dict[str, Any]) -> list[Item]:
        lengths = [int(f.shape[0]) for f in features]
        device = features[0].device if features else torch.device("cpu")
        keys = self._keys(features, given) if self._keyed else [None] * len(features)
        values: dict[Signal, list[Tensor]] = {}
        if self._packing is not None and modality == "image":
            crops = [int(f.shape[0]) for f in self._packing["image_features"]]
            inner = [int(f.shape[1]) for f in self._packing["image_features"] for _ in range(f.shape[0])]
            where = [places(length, cls=self._cls(modality, length), device=device) for length in inner]
            values = self._tower_values(modality, where, given)
            described = self._repacked(crops, where, values)
            items = [Item(key, kind, place, of) for key, (kind, place, of) in zip(keys, described, strict=True)]
            return self._checked(items, features)
        where = self._places(modality, lengths, given, device)
        values = self._tower_values(modality, where, given)
        items = [
            Item(keys[i], kind, place, {signal: found[i] for signal, found in values.items()}) for i, (kind, place) in enumerate(where)
        ]
        return self._checked(items, features)

    def _checked(self, items: list[Item], features: list[Tensor]) -> list[Item]:
        """NotApplicable where what was merged in the tower did not stay equal on the way."""
        for item, made in zip(items, features, strict=True):
            if GROUPS in item.values:
                check_groups(item.values[GROUPS], made, item.kind)
        return items

    def _keys(self, features: list[Tensor], given: dict[str, Any]) -> Sequence[Tensor]:
        pixels: Any = next((v for name, v in given.items() if name.startswith("pixel_values") and v is not None), None)
        grids = _grids(given)
        if pixels is not None and grids is not None:
            pixels = list(torch.split(pixels, grids.prod(-1).tolist()))
        elif isinstance(pixels, Tensor) and pixels.ndim == 5:  # without the empty tiles that a batch is filled up with
            pixels = [tiles[(tiles != 0).flatten(1).any(1)] for tiles in pixels]
        return list(content_keys(pixels if pixels is not None and len(pixels) == len(features) else features))

    def _cls(self, modality: str, length: int) -> bool:
        """Whether a crop's first token is the tower's [CLS]: one more than a square, and the tower has one."""
        return self._has_cls.get(modality, False) and math.isqrt(length) ** 2 != length and math.isqrt(length - 1) ** 2 == length - 1

    def _side(self, given: dict[str, Any], item: int) -> int | None:
        """Sides of the block of patches that becomes one token of an item."""
        sizes = next((v for name, v in given.items() if name.endswith("merge_sizes") and v is not None), None)
        return self.anatomy.merge if sizes is None else int(sizes[item])

    def _places(self, modality: str, lengths: list[int], given: dict[str, Any], device: torch.device) -> list[tuple[Tensor, Tensor]]:
        grids = _grids(given)
        pixels = _pixels(given)
        if grids is not None and len(grids) == len(lengths):
            found = []
            for i, (length, (t, h, w)) in enumerate(zip(lengths, grids.tolist(), strict=True)):
                side = self._side(given, i) or max(1, math.isqrt(t * h * w // max(1, length)))
                each = h * w // side**2
                whole = (
                    each > 0 and length % each == 0 and t % (length // each) == 0
                )  # frames may be merged as well; newlines may be among them
                frames = length // each if whole else 1
                found.append(places(length, frames=frames, shape=(h, w), raster=whole, device=device))
            return found
        boxes = self.anatomy.boxes(pixels) if pixels is not None else None
        if boxes is not None:
            return [over_boxes(boxes[0], device) for _ in lengths]
        if modality == "video" and pixels is not None and pixels.ndim == 5:
            frames = pixels.shape[1]
            if len(lengths) == pixels.shape[0] * frames:  # an item is a frame
                found = [places(n, cls=self._cls(modality, n), device=device) for n in lengths]
                for i, (_, place) in enumerate(found):
                    place[:, 1] = i % frames
                return found
            return [places(n, frames=frames, newline=n % frames == 1, cls=self._cls(modality, n // frames), device=device) for n in lengths]
        sizes = given.get("spatial_shapes", given.get("image_sizes"))
        if sizes is not None and len(sizes) == len(lengths):
            return [places(n, shape=(int(s[0]), int(s[1])), device=device) for n, s in zip(lengths, sizes, strict=True)]
        if self.anatomy.resampled:
            return [places(n, raster=False, device=device) for n in lengths]
        total, crops = sum(lengths), sum(self._crops)
        each = total // crops if crops and total % crops == 0 else 0
        if each and all(n % each == 0 for n in lengths):
            return [places(n, crops=n // each, cls=self._cls(modality, each), device=device) for n in lengths]
        return [places(n, device=device) for n in lengths]

    def _tower_values(self, modality: str, where: list[tuple[Tensor, Tensor]], given: dict[str, Any]) -> dict[Signal, list[Tensor]]:
        merged = self._groups(modality, where, given)
        if not self.probes:
            return merged
        grids = _grids(given)
        order = self.anatomy.window_order(grids)
        side = self._side(given, 0) if grids is not None else None
        grouped = side is not None and (self.anatomy.grouped or any(name.endswith("merge_sizes") for name in given))
        segments = int(grids[:, 0].sum()) if grids is not None else None
        pixels = _pixels(given)
        boxes = self.anatomy.boxes(pixels) if pixels is not None else None
        found: dict[Signal, list[Tensor]] = dict(merged)
        with scoring():
            said = self.probes[modality].read(segments)
        for signal, crops in said.items():
            found[signal] = carry(crops, where, grouped=side**2 if grouped and side else 0, order=order, boxes=boxes)
        return found

    def _groups(self, modality: str, where: list[tuple[Tensor, Tensor]], given: dict[str, Any]) -> dict[Signal, list[Tensor]]:
        """What was merged in the tower. NotApplicable where there is not one token for each patch."""
        encoder = self._encoders.get(modality)
        if encoder is None:
            return {}
        calls = encoder.take()
        self.calls = [*self.calls, *calls][-_CALLS:]
        crops = encoder.groups(calls)
        patches, tokens = sum(map(len, crops)), sum(int((kind == Kind.PATCH).sum()) for kind, _ in where)
        pixels = _pixels(given)
        boxes = self.anatomy.boxes(pixels) if pixels is not None else None
        ordered = boxes is None or [(r, c, r + 1, c + 1) for r in range(boxes[1][0]) for c in range(boxes[1][1])] == list(boxes[0])
        if patches != tokens or not ordered or self.anatomy.resampled:
            raise NotApplicable(
                Reason.NOT_BY_PATCH,
                f"{patches} patches of the tower become {tokens} tokens, not one of each: what is merged in the tower cannot be carried "
                "to the language model; act before it instead",
            )
        return {GROUPS: carry(crops, where)}

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
        assert self._packing is not None
        packing = {**self._packing, "image_features": channels}
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


def _grids(given: dict[str, Any]) -> Tensor | None:
    return next((v for name, v in given.items() if name.endswith("grid_thw") and v is not None), None)


def _pixels(given: dict[str, Any]) -> Tensor | None:
    return next((v for name, v in given.items() if name.startswith("pixel_values") and isinstance(v, Tensor)), None)


def _features(outputs: Any) -> list[Tensor]:
    features = outputs.pooler_output if hasattr(outputs, "pooler_output") else outputs
    if features is None:
        # Not pooled, or all of them enter between the layers, level by level; each level has the same items.
        levels = getattr(outputs, "deepstack_features", None)
        features = levels[0][1] if levels else outputs.last_hidden_state
    return list(features)


def _names(features: Sequence[Tensor]) -> list[int]:
    """By which features are found again: a hash of their rows' sums, bit for bit the same for the same features."""
    sums = [f.detach().flatten(1).to(torch.float32).sum(-1) for f in features]
    return content_keys(sums).tolist() if sums else []
