"""Images on their way into the language model: what the encoder made of them, where it lies in the picture, and which slots it fills.

Three methods of the model are watched. `get_image_features` and `get_video_features` say what was encoded, item by item: an item is one
entry of what they return, an image, a tile or a video. `get_placeholder_mask` says which slots the features go to. `generate` encodes first
and hands the features in later, perhaps repeated for its beams: then items are recognised by the content of their features.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from foveate.anatomy import SLOT_METHODS, Anatomy
from foveate.encoder import Encoder, TowerPass
from foveate.errors import FoveateError
from foveate.hooks import Hook, uncompiled
from foveate.places import Described, Encoding, places
from foveate.signals import Noise, Signal, content_keys
from foveate.tokens import Kind, Layout
from foveate.towers import TOWER_SIGNALS, TowerProbes, prefix_of

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
class Item(Described):
    """What is known of one item.

    call    what encoded it, and the share of that call which is this item's
    """

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
        seen = Encoding(self.anatomy, modality, features, given, self._crops, self._packing, self._has_cls.get(modality, False))
        described = seen.described(keyed=self._keyed, probes=self.probes.get(modality), merged=self._merged(modality))
        items = [Item(item.key, item.kind, item.place, item.values, call) for item in described]
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

    def _merged(self, modality: str) -> list[Tensor] | None:
        """Crop by crop, what was merged in the tower; None where nothing acts in it."""
        encoder = self._encoders.get(modality)
        if encoder is None:
            return None
        calls = encoder.take()
        self.calls = [*self.calls, *calls][-_CALLS:]
        return encoder.groups(calls)

    def _recognised(self, features: Tensor) -> Item:
        known = self._known.get(_names([features])[0])
        if known is not None:
            return known
        kind, place = places(features.shape[0], device=features.device)
        return Item(content_keys([features])[0] if self._keyed else None, kind, place)


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
