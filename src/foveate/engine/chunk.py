"""What the cuts have made of the chunk of the sequence that came in, and what the layers get instead of what was made for all of it.

The library makes masks, rotary embeddings and side inputs once, for the whole chunk, and hands the same objects to every layer. After
a cut each of them is gathered from the whole one by the slots that are left, for the chunk's rows as for the columns of what is cached. So
a mask keeps all that its model put into it: causality, padding, sliding windows by original distance, image blocks that see both ways. Only
positions that change (a group's mean, closed gaps) are computed anew, by the model's own rotary module.

Flash attention takes no such mask: it has a 2-D one, counts its windows in slots and finds packed samples by positions that begin anew.
So it is given positions that count the slots that are left, sample by sample, and a window that would reach further than it should is
refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from foveate.anatomy import Anatomy
from foveate.engine.cache import CacheTable, fixed_length, held_before
from foveate.engine.held import Held
from foveate.engine.moves import Move, axis_of, dropped_before, each, in_order, saved
from foveate.engine.rulings import Rules, Ruling, laid_over, rules_at
from foveate.engine.several import nth_member, turned
from foveate.engine.stretching import Call, Stretch, called, placed
from foveate.errors import FoveateError
from foveate.tokens import Kind, Layout, TokenMap

_VARLEN = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")  # where packed samples begin, for flash attention


@dataclass
class Chunk:
    """The chunk as it came in (`arrived`), as it is at the segment under way (`layout`), and the tables of what is cached.

    past      tokens of the sequence before this chunk
    samples   (B, N) int64: which packed sample a slot belongs to, ascending from 0; None where a row is one sample
    whole     the map from the chunk as it came in to the segment under way
    segment   the decoder layer that the segment began at
    """

    arrived: Layout
    past: int
    memory: CacheTable | None
    cache: Any
    implementation: str
    anatomy: Anatomy
    samples: Tensor | None = None
    layout: Layout = field(init=False)
    whole: TokenMap = field(init=False)
    segment: int = 0
    moves: list[Move] = field(default_factory=list)
    cuts: list[tuple[int, TokenMap, Tensor | None]] = field(default_factory=list)  # (layer, map, samples of its source)
    moved: bool = False  # whether a position is another one than the library gave
    shift: Tensor = field(init=False)
    shift_before: Tensor = field(init=False)
    changed: bool = False  # whether layers need anything else than what the library hands them
    cut: bool = False  # whether `whole` does anything
    rotary_calls: list[tuple[tuple[Any, ...], dict[str, Any], Any]] = field(default_factory=list)
    tables: dict[int, Tensor] = field(default_factory=dict)
    shifts: dict[int, Tensor] = field(default_factory=dict)
    layouts: dict[int, Layout] = field(default_factory=dict)
    rulings: tuple[Ruling, ...] = ()
    shows: bool = False  # whether there are images in it
    several: int = 1  # positions that each slot has
    stretch: Stretch | None = None  # what slots turn by in the place of the model's frequencies
    dtype: torch.dtype = torch.float32  # of the layers' states
    given: dict[tuple[Any, ...], tuple[list[Any], dict[str, Any]]] = field(default_factory=dict)  # what layers were handed, what they get
    held: dict[int, Held] = field(default_factory=dict)  # layer -> what a policy has left in its cache, this chunk among it
    since: int = 0  # tokens since the policy decided
    _known: dict[tuple[Any, ...], tuple[Any, Any]] = field(default_factory=dict)
    _keys: dict[tuple[int, int, int | None], Tensor] = field(default_factory=dict)
    _all_now: Tensor = field(init=False)  # the slots of this chunk, where nothing was cut
    _rows: Tensor = field(init=False)  # the slots of `whole`, ascending
    _all_before: Tensor | None = None  # the slots of earlier chunks where nothing was cut
    _aside: dict[str, Any] = field(default_factory=dict)  # the chunk as it was in front of the layer that a part of it passes by

    def __post_init__(self) -> None:
        self.layout = self.arrived
        self.whole = TokenMap.identity(self.arrived)
        self.shift = self.shift_before = torch.zeros(self.arrived.shape[0], dtype=torch.int64, device=self.arrived.kind.device)
        self.changed = self.memory is not None
        self._rows = self.whole.representative
        self._all_now = self._rows + self.past
        self._begin(0, self._all_now)
        if self.memory is not None:
            self.rulings, self.stretch = self.memory.rulings, self.memory.stretch
            self.moved = self.stretch is not None

    # ---- cuts

    def enter(self, segment: int, token_map: TokenMap, renumber: bool, steps: Tensor | None = None, several: int = 1) -> None:
        """Cuts the chunk in front of decoder layer `segment`; what stays of it is `token_map`. steps, several: as in `Cut`."""
        before, samples = self._shift_of(segment), self.samples_now()
        earlier = before - self.shift_before
        closed = dropped_before(token_map, samples) if renumber else None
        if steps is not None:
            at = token_map.representative.clamp(min=0)
            now = token_map.positions(self.layout.position, mean=token_map.mean) - (0 if closed is None else closed)
            theirs = None if samples is None else samples.gather(1, at)
            less, after = saved(steps.gather(1, at), now, token_map.target.valid, theirs, self.past > 0)
            closed, self.shift = less if closed is None else closed + less, self.shift + after
        self.cuts.append((segment, token_map, samples))
        self.moves.append(Move(token_map, earlier, None if closed is None else torch.where(token_map.representative >= 0, closed, 0)))
        self.several = max(self.several, several)
        self.moved |= several > 1 or token_map.mean or closed is not None or (self.memory is not None and bool(earlier.any()))
        self.shift, self.shift_before = self.shift + earlier, before
        if renumber:
            self.shift = self.shift + (token_map.source.valid.sum(1) - token_map.target.valid.sum(1))
        self.whole = token_map if self.whole.source is token_map.source else self.whole.then(token_map)
        self.layout, self.segment = replace(token_map.target, position=self.positions(self.arrived.position)), segment
        self.changed = self.cut = True
        self.given, self._known, self._keys = {}, {}, {}
        self._begin(segment, self._sequence_index())
        self.shifts[segment] = self.shift

    def go_on(self, segment: int) -> None:
        """Starts a segment without cutting (a decoding step after a reduced prefill): what `enter` does for a map that keeps all, in a few
        steps, since every decoded token comes here."""
        before = self._shift_of(segment)
        earlier = before - self.shift_before
        if bool(earlier.any()):
            self.moved = True
            self.moves.append(Move(None, earlier))
            self.shift = self.shift + earlier
            self.layout = replace(self.layout, position=self.layout.position - earlier[:, None])
        self.shift_before = before
        self.given, self._known, self._keys = {}, {}, {}
        self._begin(segment, self.tables[self.segment])
        self.shifts[segment], self.segment = self.shift, segment

    def pass_by(self, segment: int) -> None:
        """Starts a segment at which nothing happens and nothing ever has; its layers go on with what the ones before had."""
        self._begin(segment, self.tables[self.segment])
        self.shifts[segment] = self.shift
        self.segment = segment

    def full_length(self, hidden: Tensor, layers: int | None = None) -> Tensor:
        """States that have come through the cuts in front of the first `layers` decoder layers (None: all), at the chunk's full length:
        a dropped row has the state of its nearest survivor before it in its sample, a merged row its group's."""
        for layer, token_map, samples in reversed(self.cuts):
            if layers is None or layer < layers:
                hidden = token_map.expand(hidden, samples)
        return hidden

    def begins(self, layer: int) -> bool:
        """Whether the slots that earlier chunks left change in front of this layer."""
        return self.memory is not None and layer in self.memory.shift

    def _shift_of(self, segment: int) -> Tensor:
        return self.shift_before if self.memory is None else self.memory.shift.get(segment, self.shift_before)

    def samples_now(self) -> Tensor | None:
        """(B, M) the sample of each slot that is left."""
        if self.samples is None or not self.cut:
            return self.samples
        return self.samples.gather(1, self.whole.representative.clamp(min=0))

    def go_through(self, layer: int, token_map: TokenMap, renumber: bool) -> None:
        """What the map keeps goes through this one layer, the rest passes by."""
        names = ("layout", "whole", "moved", "cut", "shift", "shift_before")
        self._aside = {name: getattr(self, name) for name in names} | {"moves": list(self.moves), "cuts": list(self.cuts)}
        self.enter(layer, token_map, renumber)

    def come_back(self, segment: int) -> None:
        """After that layer: the chunk is as it was in front of it, in a segment of its own, since the layer has cached less."""
        for name, value in self._aside.items():
            setattr(self, name, value)
        self.segment, self._aside, self.given, self._known, self._keys = segment, {}, {}, {}, {}
        self._begin(segment, self._sequence_index())
        self.shifts[segment] = self.shift

    def look(self, ruling: Ruling) -> None:
        """A rule of who sees whom holds from now on; one that holds already is no other."""
        if ruling not in self.rulings:
            self.rulings, self.changed = (*self.rulings, ruling), True

    def _begin(self, segment: int, table: Tensor) -> None:
        self.tables[segment], self.layouts[segment] = table, self.layout

    def _sequence_index(self) -> Tensor:
        self._rows = in_order(self.whole.representative)
        return torch.where(self._rows >= 0, self._rows + self.past, -1)

    def remember(self, memory: CacheTable) -> None:
        """Called when the pass has gone through: the tables grow by this chunk."""
        B = self.arrived.shape[0]
        if self.rulings or self.shows:
            before = {segment: memory.layout(segment, self._before(memory, segment, B)) for segment in self.layouts}
            memory.layouts = {segment: before[segment].joined(here) for segment, here in self.layouts.items()}
        memory.rulings, memory.stretch = self.rulings, None if self.stretch is None else self.stretch.goes_on()
        memory.slots = {segment: torch.cat([self._before(memory, segment, B), table], 1) for segment, table in self.tables.items()}
        memory.shift.update(self.shifts)
        visual = (self.arrived.kind != Kind.TEXT) & self.arrived.valid
        for layer, held in memory.held.items():
            if layer not in self.held:  # no policy is attached any more: what comes stays
                slots = self.slots_of(layer)
                at = (slots - self.past).clamp(min=0)
                self.held[layer] = held.grown(slots, visual.gather(1, at) & (slots >= 0), self.all_came(layer))
        memory.held, memory.since = self.held, self.since
        if memory.valid is not None or not bool(self.arrived.valid.all()):
            memory.valid = self.valid_so_far()
        memory.length = self.past + self.arrived.shape[1]

    def valid_so_far(self) -> Tensor:
        """(B, L) bool: which slots of the sequence are tokens, this chunk's at the end."""
        B, valid = self.arrived.shape[0], self.arrived.valid
        earlier = None if self.memory is None else self.memory.valid
        return torch.cat([torch.ones((B, self.past), dtype=torch.bool, device=valid.device) if earlier is None else earlier, valid], 1)

    def before(self, layer: int) -> Tensor:
        """(B, K) the slots that a layer was given of earlier chunks, whatever a policy has left of them."""
        return self._before(self.memory, layer, self.arrived.shape[0])

    def slots_of(self, layer: int) -> Tensor:
        """(B, M) the slots that a layer was given of this chunk; once it has run."""
        return self.tables[max(begin for begin in self.tables if begin <= layer)]

    def all_came(self, layer: int) -> bool:
        """Whether a layer is known to have been given all of this chunk, so that none of its slots is empty."""
        return self.slots_of(layer) is self._all_now

    def thinned(self, layer: int) -> Held | None:
        """What a layer holds of earlier chunks, where a policy thins its cache."""
        return None if self.memory is None else self.memory.held.get(layer)

    def _before(self, memory: CacheTable | None, layer: int, B: int) -> Tensor:
        """(B, K) the slots that a layer holds of earlier chunks."""
        segment = None if memory is None else memory.segment(layer)
        if memory is not None and segment is not None:
            return memory.slots[segment]
        if self._all_before is None:
            self._all_before = torch.arange(self.past, device=self.arrived.kind.device).expand(B, self.past)
        return self._all_before

    # ---- what a layer gets

    def mask(self, mask: Any, layer: int, recurrent: bool, window: int | None = None) -> Any:
        """A layer's own mask, from the whole chunk's. window: of a layer whose backend counts it in slots."""
        held, rules = self.thinned(layer), rules_at(layer, self.rulings)
        if held is not None and rules:
            raise FoveateError(
                f"a cache policy has let keys of decoder layer {layer} go, where a rule says who sees whom: only one of them can act on a "
                "sequence"
            )
        if mask is None and held is not None and held.full and not self.cut and self._rows.shape[1] == 1:
            return None  # a decoded token sees all that is left: nothing has to be asked of the device
        columns = self._columns(layer)
        if held is not None and columns.ndim == 3:
            return held.mask(mask, columns, self._filled(self._rows), self.past, self.flash)
        if window is not None and self._reaches_further(columns, window):
            raise FoveateError(
                f"{self.implementation} counts the sliding window of decoder layer {layer} in slots, so that after a cut it would reach "
                "further back than it should: load the model with sdpa or eager attention"
            )
        key = (id(mask), columns.shape[1], recurrent, -1 if held is None else layer, rules)
        if key not in self._known:
            found = self._cut_mask(mask, columns, recurrent)
            self._known[key] = (mask, self._ruled(found, rules, columns) if rules else found)
        return self._known[key][1]

    @property
    def flash(self) -> bool:
        return "flash" in self.implementation

    def cached(self, layer: int) -> int:
        """How many keys this decoder layer had before the chunk's: asked for after the layer."""
        if self.cache is None:
            return 0
        if (held := self.thinned(layer)) is not None:
            return held.slots.shape[2]
        return held_before(self.cache, layer, self._before(self.memory, layer, self.arrived.shape[0])).shape[1]

    def _columns(self, layer: int) -> Tensor:
        """(B, K) the sequence index of every key that the layer will see, -1 where there is none; (B, G, K) where its heads differ."""
        now = self.tables[self.segment]
        if self.cache is None:
            return now
        if (held := self.thinned(layer)) is not None:
            columns = torch.cat([held.slots, now[:, None].expand(-1, held.slots.shape[1], -1)], 2)
            return columns[:, 0] if columns.shape[1] == 1 else columns
        before = held_before(self.cache, layer, self._before(self.memory, self.segment, now.shape[0]))
        # Of a cache of fixed length flash attention looks at as many slots as its mask has.
        length = None if self.flash else fixed_length(self.cache, layer)
        key = (self.segment, before.shape[1], length)
        if key not in self._keys:
            columns = torch.cat([before, now], 1)
            more = 0 if length is None else length - columns.shape[1]
            self._keys[key] = torch.nn.functional.pad(columns, (0, more), value=-1) if more else columns
        return self._keys[key]

    def _reaches_further(self, columns: Tensor, window: int) -> bool:
        """Whether a window that counts slots shows some row a key that one that counts tokens does not."""
        rows, K = self._rows + self.past, columns.shape[1]
        if not self.changed or K == 0:
            return False
        oldest = (torch.arange(rows.shape[1], device=rows.device) + K - rows.shape[1] - window + 1).clamp(min=0)
        seen = columns[:, oldest]
        return bool(((self._rows >= 0) & (seen >= 0) & (seen <= rows - window)).any())

    def _cut_mask(self, mask: Any, columns: Tensor, recurrent: bool) -> Any:
        rows = self._rows
        B, M = rows.shape
        K = columns.shape[1]
        if recurrent and (mask is None or mask.ndim == 2):  # a layer that neither attends nor recurs may be given any
            if mask is None:
                return None if bool((rows >= 0).all()) else rows >= 0
            return mask.expand(B, -1).gather(1, rows.clamp(min=0)) * (rows >= 0).to(mask.dtype)
        if self.flash and (mask is None or mask.ndim == 2):
            seen = columns >= 0
            if mask is not None:
                seen = seen & mask.expand(B, -1).to(torch.bool).gather(1, self._in_mask(mask, columns))
            length = None if self.cache is None else fixed_length(self.cache, 0)
            return None if bool(seen.all()) and length in (None, K) else seen
        if mask is None:
            causal = M == 1 or M == K
            if causal and bool((columns >= 0).all()):
                return None
            return self._causal(columns)
        if not isinstance(mask, Tensor):
            kind = f"{self.implementation} ({type(mask).__name__})"
            raise FoveateError(f"masks of {kind} cannot be reduced; load the model with sdpa or eager attention")
        if mask.ndim == 2:  # of backends that are none of the library's
            return mask.expand(B, -1).gather(1, self._in_mask(mask, columns)) * (columns >= 0).to(mask.dtype)
        if mask.ndim != 4:
            raise FoveateError(f"an attention mask of shape {tuple(mask.shape)} cannot be reduced; give a 2-D one (batch, tokens) or none")
        H = mask.shape[1]
        mask = mask.expand(B, H, -1, -1)
        mask = mask.gather(2, self._filled(rows)[:, None, :, None].expand(B, H, M, mask.shape[3]))
        mask = mask.gather(3, self._in_mask(mask, columns)[:, None, None].expand(B, H, M, K))
        low: Any = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        return mask.masked_fill((columns < 0)[:, None, None], low)

    def _causal(self, columns: Tensor) -> Tensor:
        """(B, 1, M, K) bool: what a causal mask shows."""
        return ((columns[:, None] >= 0) & (columns[:, None] <= (self._filled(self._rows) + self.past)[..., None]))[:, None]

    def _ruled(self, mask: Any, rules: Rules, columns: Tensor) -> Any:
        before = self._before(self.memory, self.segment, columns.shape[0])
        known = (self.memory or CacheTable()).layout(self.segment, before)
        return laid_over(
            mask,
            rules,
            self.layout.counted_on(known),
            known.joined(self.layout),
            lambda: self._causal(columns),
            columns.shape[1],
            self.dtype,
        )

    def _in_mask(self, mask: Tensor, columns: Tensor) -> Tensor:
        """The columns in the library's mask: a sliding layer's begins at the first key that the layer holds."""
        begins = max(0, self.past + self.arrived.shape[1] - mask.shape[-1])
        return (columns - begins).clamp(min=0)

    @staticmethod
    def _filled(rows: Tensor) -> Tensor:
        """Rows of padding see what the real one before them sees: a row that sees nothing would be NaN in some kernels."""
        index = torch.arange(rows.shape[1], device=rows.device).expand_as(rows)
        last = torch.where(rows >= 0, index, -1).cummax(1).values
        return rows.gather(1, last.clamp(min=0)).clamp(min=0)

    def positions(self, positions: Tensor) -> Tensor:
        """(B or 1, N) or (R, B or 1, N) positions of the chunk as they are at this stage."""
        B, N = self.arrived.shape
        moved = (positions if positions.is_floating_point() else positions.to(torch.int64)).expand(*positions.shape[:-2], B, N)
        for move in self.moves:
            moved = move(moved)
        return moved

    def counted(self, positions: Tensor) -> Tensor:
        """The positions that tell flash attention which slots are one sample: beside a rotary embedding they are for nothing else."""
        if positions.ndim != 2 or not (self.cut and (self.flash or self.samples is not None)):
            return self.positions(positions) if self.moved else self.side(positions)
        now, samples = torch.arange(self.layout.shape[1], device=positions.device).expand(self.layout.shape), self.samples_now()
        if samples is None:
            return now
        begins = torch.nn.functional.pad(samples[:, 1:] != samples[:, :-1], (1, 0), value=True)
        return now - torch.where(begins, now, 0).cummax(1).values

    def varlen(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Where packed samples begin among the slots that are left, in place of what a caller said of all."""
        if not self.cut or self.samples is None or any(kwargs.get(name) is None for name in _VARLEN):
            return {}
        samples = self.samples_now()
        assert samples is not None
        lengths = torch.bincount(samples[self.layout.valid], minlength=int(self.samples.max()) + 1)
        starts = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(kwargs["cu_seq_lens_q"].dtype)
        longest: Any = lengths.max()
        longest = longest if isinstance(kwargs["max_length_q"], Tensor) else int(longest)
        return dict(zip(_VARLEN, (starts, starts, longest, longest), strict=True))

    def side(self, value: Any) -> Any:
        """Anything else that a layer gets: what runs along the sequence is cut as the sequence is."""
        key = (id(value), -1)
        if key not in self._known:
            self._known[key] = (value, self._cut_side(value))
        return self._known[key][1]

    def _cut_side(self, value: Any) -> Any:
        for args, kwargs, output in self.rotary_calls:
            if value is output:
                return self._rotary_again((args, kwargs)) if self.moved else each(value, self._gather) if self.cut else value
        return each(value, self._carry) if self.cut else value

    def _rotary_again(self, call: Call) -> Any:
        def turn_by(rotary: Callable[..., Any]) -> Any:
            if self.several == 1:
                return called(rotary, call, self.positions(placed(call)))
            where = [nth_member(self.whole, n) for n in range(self.several)]
            return turned(partial(called, rotary, call), [self._moved_along(placed(call), at) for at in where])

        assert self.anatomy.rotary is not None
        if self.stretch is None:
            return turn_by(self.anatomy.rotary)
        return self.stretch.turned(self.anatomy, turn_by, self.whole.representative)

    def _moved_along(self, positions: Tensor, at_BM: Tensor) -> Tensor:
        """The positions of some arrived slots, one for each that is left, moved as that has moved."""
        whole = positions.expand(*positions.shape[:-2], *self.arrived.shape)
        index = at_BM.expand(*whole.shape[:-2], *at_BM.shape)
        own = self.whole.representative.clamp(min=0).expand_as(index)
        return whole.gather(-1, index) + self.positions(positions) - whole.gather(-1, own)

    def _carry(self, value: Tensor) -> Tensor:
        """States along the sequence are mixed as the tokens are; anything else follows the representatives."""
        if value.is_floating_point() and value.ndim > 2 and value.shape[:2] == self.arrived.shape:
            return self.whole.apply(value)
        return self._gather(value)

    def _gather(self, value: Tensor) -> Tensor:
        axis, B = axis_of(value, self.arrived.shape), self.arrived.shape[0]
        if axis is None:
            return value
        index = self.whole.representative.clamp(min=0)
        shape = list(value.shape)
        shape[axis - 1] = B
        value = value.expand(shape)
        view = [1] * value.ndim
        view[axis - 1], view[axis] = index.shape
        shape[axis] = index.shape[1]
        return value.gather(axis, index.view(view).expand(shape))
