"""What a cache policy does in one forward pass: after each of its layers, and after the last where it decides on all of them together."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction

import torch
from torch import Tensor

from foveate.cache_policies import CachePolicy
from foveate.cache_policies.base import Keeping
from foveate.contract import AttentionRows, CacheView, Evict
from foveate.engine.chunk import Chunk
from foveate.engine.held import Held, evict, thinnable
from foveate.probes.layer import LayerProbe
from foveate.probes.marker import scoring
from foveate.tokens import Kind, Layout


@dataclass
class Thinning:
    """Of one pass: whether it decides, and what it has found so far.

    layers   those on whose caches the policy decides
    deciding whether it does so in this pass
    ran      layer -> keys that it attended to, all rows together, mean over heads; `stays` those that are left of them
    """

    policy: CachePolicy
    layers: tuple[int, ...]
    probes: Mapping[int, LayerProbe]
    deciding: bool = False
    since: int = 0
    ran: dict[int, Fraction] = field(default_factory=dict)
    stays: dict[int, Fraction] = field(default_factory=dict)
    _later: list[tuple[CacheView, Tensor]] = field(default_factory=list)

    def begin(self, chunk: Chunk, prompt: int | None) -> None:
        """The decoder is about to run on a chunk. prompt: tokens of the `generate` call's prompt, None outside of one: there all chunks of
        more than one token are prompts."""
        N = chunk.arrived.shape[1]
        before = 0 if chunk.memory is None else chunk.memory.since
        is_prompt = chunk.past < prompt if prompt is not None else N > 1 or chunk.past == 0
        self.deciding = is_prompt or 0 < self.policy.every <= before + N
        self.since = 0 if self.deciding else before + N
        for layer in self.layers:
            thinnable(chunk.cache, layer)

    @property
    def looks(self) -> bool:
        """Whether the queries of this pass are looked at, now or later."""
        return self.deciding or self.policy.every > 0

    def after(self, index: int, chunk: Chunk, layout: Layout) -> None:
        """Decoder layer `index` has run on slots of this layout."""
        if not self.looks or not thinnable(chunk.cache, index):
            return
        now, old, seen = chunk.slots_of(index), chunk.thinned(index), self.probes[index].attention()
        if old is None:
            before = chunk.before(index)
            repeats = seen.query.shape[1] // chunk.cache.layers[index].keys.shape[1]
            old = Held(before[:, None], torch.zeros_like(before, dtype=torch.bool)[:, None], repeats, bool((before >= 0).all()))
        held = old.grown(now, (layout.kind != Kind.TEXT) & layout.valid, chunk.all_came(index))
        if self.policy.every and self.policy.observes != 0:
            held = held.remembered(seen.query, torch.where(layout.valid, now, -1), max(self.policy.every, self.policy.observes or 0))
        if self.deciding:
            view = self._view(index, chunk, layout, held, seen)
            if self.policy.together:
                assert isinstance(self.policy, Keeping)
                with _deciding(view):
                    self._later.append((replace(view, attention=None), self.policy.score(view)))
            else:
                with _deciding(view):
                    decision = self.policy.decide(view)
                held = self._apply(view, chunk, held, decision)
        chunk.held[index] = held

    def finish(self, chunk: Chunk) -> None:
        """The last layer has run."""
        if self._later:
            assert isinstance(self.policy, Keeping)
            views, scores = zip(*self._later, strict=True)
            with _deciding(views[0]):
                decisions = self.policy.decide_together(views, scores)
            for view, decision in zip(views, decisions, strict=True):
                chunk.held[view.layer] = self._apply(view, chunk, chunk.held[view.layer], decision)
        self._later = []
        chunk.since = self.since

    def _view(self, index: int, chunk: Chunk, layout: Layout, held: Held, seen: AttentionRows) -> CacheView:
        valid = chunk.valid_so_far()
        at = held.slots.clamp(min=0).flatten(1)
        number = (valid.cumsum(1) - 1).gather(1, at).view(held.slots.shape)
        there = (held.slots >= 0) & valid.gather(1, at).view(held.slots.shape)
        place = torch.where(there, number, -1)
        given = torch.cat([chunk.before(index), chunk.slots_of(index)], 1)
        tokens = ((given >= 0) & valid.gather(1, given.clamp(min=0))).sum(1)
        own = chunk.cache.layers[index]
        rows: AttentionRows | None = seen
        asking = layout.valid
        if self.policy.observes == 0:
            rows = None
        elif layout.shape[1] == 1 and held.queries is not None and held.asked is not None:  # decoding: those that were remembered
            asking = held.asked >= 0
            mask = there[:, :, None] & (held.slots[:, :, None] <= held.asked[:, None, :, None])
            mask = mask if mask.shape[1] == 1 else mask.repeat_interleave(held.repeats, 1)
            rows = replace(seen, query=held.queries, key=own.keys, mask=mask, valid=None, window=None, samples=None)
        return CacheView(index, self.layers, place, held.visual, tokens, own.keys, own.values, rows, asking)

    def _apply(self, view: CacheView, chunk: Chunk, held: Held, decision: Evict) -> Held:
        stays = decision.stays & view.there
        self.ran[view.layer], self.stays[view.layer] = _mean(view.there), _mean(stays)
        if bool((stays == view.there).all()):
            return held
        return evict(chunk.cache, view.layer, held, replace(decision, stays=stays))


@contextlib.contextmanager
def _deciding(view: CacheView) -> Iterator[None]:
    """What a policy computes in it counts as scores, and is float32, also where the model is not."""
    with scoring(), torch.autocast(view.keys.device.type, enabled=False):
        yield


def _mean(slots: Tensor) -> Fraction:
    """How many of (B, heads, K) there are, mean over heads."""
    return Fraction(int(slots.sum()), slots.shape[1])
