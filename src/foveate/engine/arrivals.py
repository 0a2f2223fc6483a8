"""Which slots the encoded images and videos of a forward pass fill, and what was encoded ahead of its pass.

`generate` encodes first and hands the features in later, perhaps repeated for its beams: then items are recognised by the content of
their features. They are known as long as the `generate` call lasts; what a caller encodes by hand is known until much more came.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from foveate.anatomy import MODALITIES, Anatomy, features_of
from foveate.contract import Signal
from foveate.errors import FoveateError
from foveate.probes.encoding import Item, names_of, unseen
from foveate.probes.watched import Watched
from foveate.tokens import PLACE, Kind, Layout

_REMEMBERED = 256  # items encoded by hand, the last call's always


class Ahead:
    """Items that were encoded before their forward pass, by the name of their features."""

    def __init__(self, most: int | None = _REMEMBERED) -> None:
        self._most = most
        self._calls: OrderedDict[int, dict[int, Item]] = OrderedDict()
        self._count = 0

    def note(self, items: list[Item], features: list[Tensor]) -> None:
        self._count += 1
        self._calls[self._count] = dict(zip(names_of(features), items, strict=True))
        while self._most is not None and len(self._calls) > 1 and len(self) > self._most:
            self._calls.popitem(last=False)

    def find(self, name: int) -> Item | None:
        return next((known[name] for known in reversed(list(self._calls.values())) if name in known), None)

    def __len__(self) -> int:
        return sum(len(known) for known in list(self._calls.values()))


class Arrivals:
    """The items of one forward pass. `kept` says by modality which of the features enter the model, (tokens,) bool or None for all."""

    def __init__(self, anatomy: Anatomy, keyed: bool) -> None:
        self._anatomy, self._keyed = anatomy, keyed
        self._items: dict[str, list[Item]] = {}
        self._slots: dict[str, Tensor] = {}
        self._latest: list[Item] = []
        self._entered: set[str] = set()
        self._kept: dict[str, Tensor | None] = {}

    def begin(self, handed_in: Any, kept: dict[str, Tensor | None], ahead: list[Ahead]) -> None:
        """The model is about to put images into the sequence; `handed_in` are such as are encoded already, by modality."""
        self._kept = kept
        for modality in MODALITIES:
            outputs = (handed_in or {}).get(modality)
            if outputs is not None:
                features = features_of(outputs)
                self._items[modality] = [self._known(name, f, ahead) for name, f in zip(names_of(features), features, strict=True)]

    def _known(self, name: int, features: Tensor, ahead: list[Ahead]) -> Item:
        for known in ahead:
            item = known.find(name)
            if item is not None:  # it may have no token, as the empty rows of a batch in Idefics 3
                return item
        return unseen(features, self._keyed)

    def encoded(self, modality: str, items: list[Item]) -> None:
        """The model has encoded these just now."""
        self._latest = items
        if modality not in self._entered:
            self._items[modality] = items

    def placed(self, watched: Watched, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model says which slots the features go to."""
        result = watched.method(*args, **kwargs)
        parameters = watched.__signature__.parameters
        self.placed_at(*self._anatomy.slots(result, watched.given(args, kwargs), parameters))
        return result

    def placed_at(self, slots: dict[str, Tensor], entered: bool = False) -> None:
        """The slots (B, N) bool of some modalities; `entered`: that their features have gone there by this."""
        self._slots.update(slots)
        for modality in slots if entered else ():
            if modality not in self._items:  # videos that are encoded as images
                self._items[modality] = self._latest
            self._entered.add(modality)
        for modality in slots:
            kept = self._kept.get(modality)
            if kept is not None and modality in self._items:
                parts = torch.split(kept, [len(item) for item in self._items[modality]])
                self._items[modality] = [item.select(part) for item, part in zip(self._items[modality], parts, strict=True)]

    # ---- what has arrived

    @property
    def items(self) -> list[Item]:
        """Those whose slots are known, images before videos."""
        return [item for modality in MODALITIES if modality in self._slots for item in self._items.get(modality, [])]

    def layout(self, shape: tuple[int, int], valid: Tensor | None, position: Tensor) -> tuple[Layout, Tensor]:
        """The layout of the chunk, and (B, N) int64 which of the items' tokens, counted through all of them, a slot holds (-1: none)."""
        items, device = self.items, position.device
        which = torch.full(shape, -1, dtype=torch.int64, device=device)
        valid, position = torch.ones_like(which, dtype=torch.bool) if valid is None else valid, position.expand(shape)
        if not any(len(item) for item in items):  # as at every decoded token, or where images become weights
            kind, size = torch.full_like(which, int(Kind.TEXT)), torch.zeros_like(which, dtype=torch.float32)
            return Layout(kind, valid, position, which[..., None].expand(*shape, len(PLACE)), size), which
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
        at = which.clamp(min=0)
        here = which >= 0
        image = torch.cat([torch.full((len(item),), i, device=device) for i, item in enumerate(items)])
        kind = torch.where(here, torch.cat([item.kind.to(device) for item in items])[at], int(Kind.TEXT))
        place = torch.cat([image[:, None], torch.cat([item.place.to(device) for item in items])], 1)[at]
        place = torch.where(here[..., None], place, -1)
        return Layout(kind, valid, position, place, (kind == Kind.PATCH).to(torch.float32)), which

    @property
    def keys(self) -> Tensor | None:
        """(I,) int64 content of each item, where a reducer asks for it."""
        items = self.items
        return torch.stack([item.key for item in items if item.key is not None]) if self._keyed and items else None

    def values(self, signal: Signal, which_BN: Tensor) -> Tensor:
        """(B, N) or (B, N, h) float32: what the tower says of each slot's token, 0 elsewhere."""
        items = self.items
        for item in items:
            if signal not in item.values:
                raise FoveateError("images handed in as features have no tower scores: hand in pixel_values, or encode while attached")
        values = torch.cat([item.values[signal] for item in items]).to(which_BN.device, torch.float32)
        spread = values[which_BN.clamp(min=0)]
        return torch.where((which_BN >= 0).view(*which_BN.shape, *[1] * (spread.ndim - 2)), spread, 0.0)


def valid_slots(mask: Any, past: int, length: int) -> Tensor | None:
    """(B, N) bool: which of the chunk's `length` slots behind `past` cached ones are tokens, from the mask that a caller may give: 2-D, or
    4-D (one or one a kind of layer), where padding is what nobody attends to. None: it does not say."""
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if not isinstance(mask, Tensor):
        return None
    if mask.ndim == 2:
        return mask[:, -length:].to(torch.bool)
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return seen[:, 0, :, past : past + length].any(1) if mask.ndim == 4 else None
