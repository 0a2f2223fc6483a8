"""What a model's encoder makes of images and videos, item by item: an item is one entry of what `get_image_features` (or its like for
videos) returns, an image, a tile or a video. The calls are watched, and what is known of each item is handed on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Protocol

import torch
from torch import Tensor

from foveate.anatomy import MODALITIES, Anatomy
from foveate.contract import Noise, Signal, content_keys
from foveate.probes.hooks import Hook
from foveate.probes.live import Live
from foveate.probes.places import Described, Encoding, places
from foveate.probes.tower import TOWER_SIGNALS, Extras, TowerProbes, extras_of
from foveate.probes.tower_pass import TowerPass
from foveate.probes.watched import Watched


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

    call    the call that encoded it, and this item's share of its cost
    tower   what was cut in the tower meanwhile, by its calls
    """

    call: tuple[Encoded, Fraction] | None = None
    tower: tuple[TowerPass, ...] = ()

    def __len__(self) -> int:
        return int(self.kind.shape[0])

    def select(self, kept: Tensor) -> Item:
        """Of its tokens those where `kept` (L,) is True."""
        values = {signal: values[kept] for signal, values in self.values.items()}
        return replace(self, kind=self.kind[kept], place=self.place[kept], values=values)


class TowerCuts(Protocol):
    """Whoever cuts tokens in a tower."""

    def take(self) -> list[TowerPass]:
        """The calls since the last time."""

    def groups(self, calls: Sequence[TowerPass]) -> list[Tensor]:
        """Of every crop of some calls, (P, 2) as in `Groups`."""


class _Call(Live):
    """The call under way: how many crops each call of the tower had and tokens each crop, what was packed, and what pooling has left."""

    def __init__(self) -> None:
        self.under_way = False
        self.crops: list[tuple[int, int]] = []
        self.packing: dict[str, Any] | None = None
        self.pooled: int | None = None


class Encodings:
    """Watches a model encode. `sink(modality, items, features)` is told of every call; features are one tensor an item."""

    def __init__(
        self,
        anatomy: Anatomy,
        needs: Iterable[Signal],
        sink: Callable[[str, list[Item], list[Tensor]], None],
        encoders: Mapping[str, TowerCuts] | None = None,
    ) -> None:
        self.anatomy, self._sink, self._encoders = anatomy, sink, encoders or {}
        tower = [signal for signal in needs if isinstance(signal, TOWER_SIGNALS)]
        towers = {modality: anatomy.tower_of(modality) for modality in MODALITIES} if tower or anatomy.has_tower else {}
        made = {of: TowerProbes(of, tower) for of in set(towers.values())} if tower else {}
        self.probes = {modality: made[of] for modality, of in towers.items()} if tower else {}
        self._extras = {modality: extras_of(of) for modality, of in towers.items()}
        self.keyed = any(isinstance(signal, Noise) for signal in needs)
        self._call = _Call()
        core: Any = anatomy.core
        watched = dict.fromkeys(anatomy.encodings, self._encode)
        if hasattr(core, "pack_image_features"):
            watched["pack_image_features"] = self._packed
        if hasattr(core, "apply_pooling"):
            watched["apply_pooling"] = self._pooled
        self._watched = [Watched(core, name, note) for name, note in watched.items()]
        self._hooks = [of.register_forward_hook(Hook(self._after_tower)) for of in set(towers.values())]

    def remove(self) -> None:
        """Leaves the model as it was."""
        for watched in self._watched:
            watched.remove()
        for hook in self._hooks:
            hook.remove()
        for probes in self.probes.values():
            probes.remove()
        self._watched, self._hooks = [], []

    def _after_tower(self, module: Any, args: Any, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else getattr(output, "last_hidden_state", None)
        crops = int(states.shape[0]) if isinstance(states, Tensor) and states.ndim > 2 else 0
        self._call.crops.append((crops, int(states.shape[1]) if isinstance(states, Tensor) and states.ndim == 3 else 0))

    def _packed(self, watched: Watched, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._call.packing = watched.given(args, kwargs)
        return watched.method(*args, **kwargs)

    def _pooled(self, watched: Watched, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = watched.method(*args, **kwargs)
        self._call.pooled = int(result.shape[1])
        return result

    def _encode(self, watched: Watched, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        now = self._call
        if now.under_way:  # one of the two may call the other
            return watched.method(*args, **kwargs)
        now.crops, now.packing, now.pooled, now.under_way = [], None, None, True
        for encoder in self._encoders.values():
            encoder.take()  # of calls that came from elsewhere
        try:
            outputs = watched.method(*args, **kwargs)
        finally:
            now.under_way = False
        modality = self.anatomy.encodings[watched.name]
        features, given = features_of(outputs), watched.given(args, kwargs)
        call = Encoded.of(watched.name, given), Fraction(1, max(1, len(features)))
        acting = self._encoders.get(modality)
        cuts = acting.take() if acting is not None else []
        merged = acting.groups(cuts) if acting is not None else None
        extras = self._extras.get(modality, Extras())
        seen = Encoding(self.anatomy, modality, features, given, now.crops, now.packing, now.pooled, extras)
        described = seen.described(keyed=self.keyed, probes=self.probes.get(modality), merged=merged)
        now.crops, now.packing, now.pooled = [], None, None
        items = [Item(item.key, item.kind, item.place, item.values, call, tuple(cuts)) for item in described]
        self._sink(modality, items, features)
        return outputs


def unseen(features: Tensor, keyed: bool) -> Item:
    """What is known of features whose encoding was not seen: how many they are."""
    kind, place = places(features.shape[0], device=features.device)
    return Item(content_keys([features])[0] if keyed else None, kind, place)


def features_of(outputs: Any) -> list[Tensor]:
    """(L, D) features of each item that a model's encoding has returned."""
    features = outputs.pooler_output if hasattr(outputs, "pooler_output") else outputs
    if features is None:
        # Not pooled, or all of them enter between the layers, level by level; each level has the same items.
        levels = getattr(outputs, "deepstack_features", None)
        features = levels[0][1] if levels else outputs.last_hidden_state
    return list(features)


def names_of(features: Sequence[Tensor]) -> list[int]:
    """By which features are found again: a hash of their rows' sums, bit for bit the same for the same features."""
    sums = [f.detach().flatten(1).to(torch.float32).sum(-1) for f in features]
    return content_keys(sums).tolist() if sums else []
