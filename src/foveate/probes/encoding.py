"""What a model's encoder makes of images and videos, item by item: an item is one entry of what `get_image_features` (or its like for
videos) returns, an image, a tile or a video. The calls are watched, and what is known of each item is handed on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, Protocol

import torch
from torch import Tensor

from foveate.anatomy import MODALITIES, Anatomy, Extras, Laid, Media, Patches, extras_of, features_of, places
from foveate.contract import GROUPS, Noise, Signal, content_keys
from foveate.errors import NotApplicable, Reason
from foveate.probes.hooks import Hook
from foveate.probes.live import Live
from foveate.probes.marker import scoring
from foveate.probes.tower import TOWER_SIGNALS, TowerProbes, carry, never
from foveate.probes.tower_pass import TowerPass
from foveate.probes.watched import Watched
from foveate.tokens import Kind

KEPT = "_foveate_kept"  # the attribute by which a model's base model knows who keeps what it has encoded


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
    call    the call that encoded it, and this item's share of its cost
    tower   what was cut in the tower meanwhile, by its calls
    """

    key: Tensor | None
    kind: Tensor
    place: Tensor
    values: dict[Signal, Tensor] = field(default_factory=dict)
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
    """The call under way: how many crops each call of the tower had and tokens each crop, and what of other methods was overheard."""

    def __init__(self) -> None:
        self.under_way = False
        self.crops: list[tuple[int, int]] = []
        self.overheard: dict[str, Any] = {}


class Encodings:
    """Watches a model encode. `sink(modality, items, features)` is told of every call; features are one tensor an item. `idle` says of the
    calling thread whether nothing is to be seen in it."""

    def __init__(
        self,
        anatomy: Anatomy,
        needs: Iterable[Signal],
        sink: Callable[[str, list[Item], list[Tensor]], None],
        encoders: Mapping[str, TowerCuts] | None = None,
        idle: Callable[[], bool] = never,
    ) -> None:
        self.anatomy, self._sink, self._encoders, self._idle = anatomy, sink, encoders or {}, idle
        tower = [signal for signal in needs if isinstance(signal, TOWER_SIGNALS)]
        towers = {modality: anatomy.tower_of(modality) for modality in MODALITIES} if tower or anatomy.has_tower else {}
        made = {of: TowerProbes(of, tower, idle) for of in set(towers.values())} if tower else {}
        self.probes = {modality: made[of] for modality, of in towers.items()} if tower else {}
        self._extras = {modality: extras_of(of) for modality, of in towers.items()}
        self.keyed = any(isinstance(signal, Noise) for signal in needs)
        self._call = _Call()
        self._remembered = anatomy.overheard
        watched = dict.fromkeys(anatomy.encodings, self._encode) | dict.fromkeys(self._remembered, self._overhear)
        self._watched = [Watched(anatomy.core, name, note) for name, note in watched.items()]
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
        if self._idle():
            return
        states = output[0] if isinstance(output, tuple) else getattr(output, "last_hidden_state", None)
        crops = int(states.shape[0]) if isinstance(states, Tensor) and states.ndim > 2 else 0
        self._call.crops.append((crops, int(states.shape[1]) if isinstance(states, Tensor) and states.ndim == 3 else 0))

    def _overhear(self, watched: Watched, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = watched.method(*args, **kwargs)
        if self._idle():
            return result
        self._call.overheard[watched.name] = self._remembered[watched.name](watched.given(args, kwargs), result)
        return result

    def _encode(self, watched: Watched, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        now = self._call
        if now.under_way or self._idle():  # one of the two may call the other
            return watched.method(*args, **kwargs)
        for encoder in self._encoders.values():
            encoder.take()  # of calls that came from elsewhere
        given, kept = watched.given(args, kwargs), getattr(self.anatomy.core, KEPT, None)

        def encode() -> tuple[Any, list[tuple[int, int]], dict[str, Any]]:
            now.crops, now.overheard, now.under_way = [], {}, True
            try:
                return watched.method(*args, **kwargs), now.crops, now.overheard
            finally:
                now.under_way = False

        looks = bool(self.probes or self._encoders)  # into the tower, so that it has to run
        outputs, now.crops, now.overheard = encode() if kept is None or looks else kept.of(watched.name, given, encode)
        modality = self.anatomy.encodings[watched.name]
        features = features_of(outputs)
        call = Encoded.of(watched.name, given), Fraction(1, max(1, len(features)))
        acting = self._encoders.get(modality)
        cuts = acting.take() if acting is not None else []
        merged = acting.groups(cuts) if acting is not None else None
        media = Media(self.anatomy, modality, features, given, now.crops, now.overheard, self._extras.get(modality, Extras()))
        described = self._described(media, merged)
        now.crops, now.overheard = [], {}
        self._sink(modality, [replace(item, call=call, tower=tuple(cuts)) for item in described], features)
        return outputs

    def _described(self, media: Media, merged: Sequence[Tensor] | None) -> list[Item]:
        """The items of a call one by one; `merged` is crop by crop what was merged in the tower, where something acts there. NotApplicable
        where that, or scores, cannot be carried to the tokens."""
        keys: Iterable[Tensor | None] = content_keys(self.anatomy.contents(media)) if self.keyed else [None] * len(media.features)
        arrangement = self.anatomy.arrangement(media)
        values: dict[Signal, list[Tensor]] = {} if merged is None else {GROUPS: carry_groups(media, arrangement.parts, merged)}
        probes = self.probes.get(media.modality)
        if probes is not None:
            how = self.anatomy.patches(media)
            with scoring():
                said = probes.read(how.segments)
            values |= {signal: carry(crops, arrangement.parts, how) for signal, crops in said.items()}
        items = [Item(key, *laid, of) for key, (laid, of) in zip(keys, arrangement.items(values), strict=True)]
        for item, made in zip(items, media.features, strict=True):
            if merged is not None:
                check_groups(item.values[GROUPS], made, item.kind)
        return items


def carry_groups(media: Media, parts: Sequence[Laid], merged: Sequence[Tensor]) -> list[Tensor]:
    """What was merged in the tower, `Groups` of the units of each crop, to the tokens of each part. NotApplicable where there is not one
    token for each unit."""
    order = media.anatomy.patches(media).order  # which refuses what is not told apart
    units, tokens = sum(map(len, merged)), sum(int((laid.kind == Kind.PATCH).sum()) for laid in parts)
    boxes = media.boxes
    ordered = boxes is None or [(r, c, r + 1, c + 1) for r in range(boxes[1][0]) for c in range(boxes[1][1])] == list(boxes[0])
    if units != tokens or not ordered or media.anatomy.resampled:
        raise NotApplicable(
            Reason.NOT_BY_PATCH,
            f"{units} patches of the tower, or blocks of them, become {tokens} tokens, not one of each: what is merged in the tower cannot "
            "be carried to the language model; act before it instead",
        )
    return carry(list(merged), parts, Patches(grouped=int(order is not None), order=order))


def unseen(features: Tensor, keyed: bool) -> Item:
    """What is known of features whose encoding was not seen: how many they are."""
    kind, place = places(features.shape[0], device=features.device)
    return Item(content_keys([features])[0] if keyed else None, kind, place)


def names_of(features: Sequence[Tensor]) -> list[int]:
    """By which features are found again: a hash of their rows' sums, bit for bit the same for the same features."""
    sums = [f.detach().flatten(1).to(torch.float32).sum(-1) for f in features]
    return content_keys(sums).tolist() if sums else []


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
