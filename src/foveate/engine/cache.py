"""What must be remembered of a sequence between forward passes, and where: on the request's own cache.

After a cut a decoder layer caches fewer slots than the sequence has tokens. The library asks the cache for lengths, to number positions
and to size masks, and would get those of a shortened layer. `remember` makes the cache answer with the length of the sequence instead and
keeps, for every segment of layers, the table of the slots that its layers hold; beams, crops and copies of the cache take the tables along.
A layer that wants to add to such a cache while nothing is attached gets an error: what it would attend to has gaps that it cannot see.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from foveate.engine.held import Held
from foveate.engine.rulings import Ruling
from foveate.engine.stretching import Stretch
from foveate.errors import FoveateError
from foveate.tokens import Layout


class Serving(Protocol):
    """A forward pass that knows of the tables."""

    @property
    def under_way(self) -> bool: ...


@dataclass
class CacheTable:
    """A segment of layers with equal slots is named by the decoder layer that it begins at; a sequence index counts the tokens of the
    request, dropped ones too.

    cut_by   the reducers that have cut the sequence, as they are spelled
    length   tokens of the sequence so far
    slots    segment -> (B, K) int64: the sequence index of each slot that the segment's layers were given, -1 for padding
    shift    segment -> (B,) int64: by how much the segment's positions are smaller than the sequence's (closed gaps)
    valid    (B, length) bool, or None where every token is real
    held     layer -> what it holds, where a policy thins its cache: in the place of `slots`, which go on counting what it was given
    since    tokens since the policy decided
    layouts  segment -> what its slots are, as far as that is known: those behind the last image may be missing
    rulings   who sees whom, as it was decided on
    stretch   what the rotary embedding's frequencies are multiplied with in some rows
    """

    cut_by: str = ""
    length: int = 0
    slots: dict[int, Tensor] = field(default_factory=dict)
    shift: dict[int, Tensor] = field(default_factory=dict)
    valid: Tensor | None = None
    held: dict[int, Held] = field(default_factory=dict)
    since: int = 0
    layouts: dict[int, Layout] = field(default_factory=dict)
    rulings: tuple[Ruling, ...] = ()
    stretch: Stretch | None = None
    _served: Callable[[], Serving | None] | None = None

    def serve(self, forward: Serving) -> None:
        """A forward pass begins that gives each layer the mask and the positions of these tables."""
        self._served = weakref.ref(forward)

    @property
    def served(self) -> bool:
        forward = None if self._served is None else self._served()
        return forward is not None and forward.under_way

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_served": None}

    def segment(self, layer: int) -> int | None:
        """The segment that a layer belongs to."""
        return max((begin for begin in self.slots if begin <= layer), default=None)

    def layout(self, layer: int, slots: Tensor) -> Layout:
        """What the slots (B, K) of a layer are: those of which nothing is known are text that goes on counting."""
        text = Layout.sequence(torch.zeros_like(slots, dtype=torch.bool), position_BN=slots.clamp(min=0))
        segment = max((begin for begin in self.layouts if begin <= layer), default=None)
        if segment is None:
            return text
        known = self.layouts[segment]
        return known if known.shape[1] == slots.shape[1] else known.joined(text.each(lambda part: part[:, known.shape[1] :]))

    def select(self, index: Tensor) -> None:
        """Rows of the batch are chosen, reordered or repeated."""
        for table in (self.slots, self.shift):
            for segment, value in table.items():
                table[segment] = value[index.to(value.device)]
        if self.valid is not None:
            self.valid = self.valid[index.to(self.valid.device)]
        self.held = {layer: held.select(index) for layer, held in self.held.items()}
        self.stretch = None if self.stretch is None else self.stretch.select(index)
        self.layouts = {segment: layout.each(lambda part: part[index.to(part.device)]) for segment, layout in self.layouts.items()}

    def crop(self, removed: int) -> None:
        """The last `removed` tokens go. FoveateError if some of them were merged or dropped at a cut: their slots cannot be told apart."""
        length = self.length - removed
        slots: dict[int, Tensor] = {}
        for segment, held in self.slots.items():
            last = held[:, max(0, held.shape[1] - removed) :] if removed else held[:, :0]
            if removed > held.shape[1] or bool((last < length).any()):
                raise FoveateError(f"the cache cannot be cropped by {removed} tokens: some of them were cut in front of layer {segment}")
            slots[segment] = held[:, : held.shape[1] - removed]
        kept = {layer: held.crop(removed, length) for layer, held in self.held.items()}
        if (evicted := next((layer for layer, held in kept.items() if held is None), None)) is not None:
            raise FoveateError(f"the cache cannot be cropped by {removed} tokens: some of them were evicted from decoder layer {evicted}")
        self.held = {layer: held for layer, held in kept.items() if held is not None}
        self.slots, self.length = slots, length
        for segment, layout in self.layouts.items():
            held = next(slots[begin] for begin in sorted(slots, reverse=True) if begin <= segment)
            self.layouts[segment] = layout.each(_first(held.shape[1]))
        if self.valid is not None:
            self.valid = self.valid[:, :length]


def _first(slots: int) -> Callable[[Tensor], Tensor]:
    return lambda part: part[:, :slots]


class _Remembering:
    """Mixed into the class of a cache: lengths are those of the sequence."""

    memory: CacheTable

    def update(self, *args: Any, **kwargs: Any) -> Any:
        if not self.memory.served:
            raise FoveateError(
                f"this cache belongs to a sequence that {self.memory.cut_by!r} has cut, and nothing is attached to the model that goes on "
                "with it: go on while that reducer (or any other, or None) is attached, or begin anew without the cache"
            )
        return super().update(*args, **kwargs)  # type: ignore[misc]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.memory.length

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.memory.length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        if fixed_length(self, layer_idx):
            sizes: tuple[int, int] = super().get_mask_sizes(query_length, layer_idx)  # type: ignore[misc]
            return sizes
        return self.memory.length + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        self.memory.crop(abs(tokens_to_remove))
        super().crop(tokens_to_remove)  # type: ignore[misc]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self.memory.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self.memory.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        rows = next(iter(self.memory.slots.values())).shape[0]
        self.memory.select(torch.arange(rows).repeat_interleave(repeats))

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self.__class__ = plain_class(self)
        del self.memory

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _remembered, (plain_class(self),), dict(self.__dict__)


def plain_class(cache: Any) -> Any:
    """The library's own class of a cache."""
    kind: Any = type(cache)
    return kind.plain if issubclass(kind, _Remembering) else kind


@functools.cache
def _remembering(kind: type) -> type:
    return type(kind.__name__, (_Remembering, kind), {"__module__": kind.__module__, "plain": kind})


def _remembered(kind: type) -> Any:
    """An empty cache of that class which remembers; its state follows."""
    remembering: Any = _remembering(kind)
    return remembering.__new__(remembering)


def remember(cache: Any, cut_by: str) -> CacheTable:
    """The table of a request's cache; from the first call on the cache counts tokens, not slots."""
    if not isinstance(cache, _Remembering):
        cache.memory = CacheTable(cut_by, int(cache.get_seq_length()))
        cache.__class__ = _remembering(type(cache))  # type: ignore[arg-type]
    memory: CacheTable = cache.memory
    return memory


def recall(cache: Any) -> CacheTable | None:
    """The table of a cache of a sequence in which something was cut, else None."""
    return cache.memory if isinstance(cache, _Remembering) else None


def capacity(cache: Any, layer: int) -> tuple[int | None, int | None]:
    """How many slots a layer holds at most: the window of one that slides, and what one has from the start; None where it is not so."""
    layers = () if cache is None else cache.layers
    held = layers[layer] if layer < len(layers) else None
    return getattr(held, "sliding_window", None), getattr(held, "max_cache_len", None)


def fixed_length(cache: Any, layer: int) -> int | None:
    """Slots of a layer that has a fixed number of them from the start (a static cache), else None."""
    return capacity(cache, layer)[1]


def held_before(cache: Any, layer: int, slots: Tensor) -> Tensor:
    """(B, K) of the segment's earlier slots those that this layer gives its next queries: a sliding layer the last of them only."""
    layers = cache.layers
    held = layers[layer] if layer < len(layers) else None
    if getattr(held, "is_sliding", False):
        if fixed_length(cache, layer) is not None:
            raise FoveateError("a static cache with sliding windows cannot be reduced; use a dynamic cache (cache_implementation=None)")
        kept = min(slots.shape[1], held.sliding_window - 1)  # type: ignore[union-attr]
        return slots[:, slots.shape[1] - kept :]
    return slots
