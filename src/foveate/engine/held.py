"""What a layer holds whose cache a policy thins: which token each slot is of, head by head, and how the library's cache is written."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import BaseQuantizedLayer, DynamicIndexedLayer, DynamicLayer, DynamicSlidingWindowLayer

from foveate.contract import Evict
from foveate.errors import FoveateError


@dataclass(frozen=True)
class Held:
    """Legend: B rows, H heads, G key heads, K slots, w queries.

    slots    (B, 1 or G, K) int64: the sequence index of each slot, -1 where it is empty; empty slots come first
    visual   (B, 1 or G, K) bool: slots of images
    repeats  H / G
    full     whether no slot is known to be empty, so that one decoded token may look at all of them
    queries  (B, H, w, h) the last ones, for decisions while decoding, and `asked` (B, w) int64 their sequence indices, -1: none
    """

    slots: Tensor
    visual: Tensor
    repeats: int
    full: bool
    queries: Tensor | None = None
    asked: Tensor | None = None

    def grown(self, slots_BM: Tensor, visual_BM: Tensor, full: bool) -> Held:
        """With the slots of a chunk behind its own; `full`: none of them is empty."""
        new = [one[:, None].expand(-1, self.slots.shape[1], -1) for one in (slots_BM, visual_BM)]
        slots, visual = torch.cat([self.slots, new[0]], 2), torch.cat([self.visual, new[1]], 2)
        return replace(self, slots=slots, visual=visual, full=self.full and full)

    def remembered(self, queries_BHNh: Tensor, slots_BN: Tensor, width: int) -> Held:
        """With the last `width` tokens of those whose queries came, and of those that it had."""
        if self.queries is not None and self.asked is not None:
            queries_BHNh, slots_BN = torch.cat([self.queries, queries_BHNh], 2), torch.cat([self.asked, slots_BN], 1)
        last = (slots_BN >= 0).to(torch.int8).argsort(dim=1, stable=True)[:, -width:]
        queries = queries_BHNh.gather(2, last[:, None, :, None].expand(-1, queries_BHNh.shape[1], -1, queries_BHNh.shape[3]))
        return replace(self, queries=queries, asked=slots_BN.gather(1, last))

    def select(self, index: Tensor) -> Held:
        """Rows of the batch are chosen, reordered or repeated."""
        at = index.to(self.slots.device)
        queries, asked = (None if one is None else one[at] for one in (self.queries, self.asked))
        return replace(self, slots=self.slots[at], visual=self.visual[at], queries=queries, asked=asked)

    def crop(self, removed: int, length: int) -> Held | None:
        """Without the last `removed` slots, those of a sequence of `length` tokens that go; None: some of these were evicted already."""
        kept = self.slots.shape[2] - removed
        if kept < 0 or bool((self.slots[..., kept:] < length).any()):
            return None
        asked = None if self.asked is None else self.asked.where(self.asked < length, -1)
        return replace(self, slots=self.slots[..., :kept], visual=self.visual[..., :kept], asked=asked)

    def mask(self, mask: Any, columns: Tensor, rows: Tensor, begins: int, flash: bool) -> Any:
        """The mask of a chunk whose heads see different slots, from the library's for all of the sequence. columns: (B, G, K) as `slots`,
        with the chunk's own. rows: (B, N) sequence index of each query, less `begins`, the tokens before the chunk."""
        there = columns >= 0
        if flash or (isinstance(mask, Tensor) and mask.ndim == 2):
            seen = there[:, 0]
            if not bool((there == seen[:, None]).all()):
                raise FoveateError(
                    "heads of one layer keep different numbers of tokens, which this attention takes no mask for: load the model with sdpa "
                    "or eager attention, or choose a policy that keeps as many in every head"
                )
            if mask is not None:
                seen = seen & mask.expand(len(seen), -1).to(torch.bool).gather(1, columns[:, 0].clamp(min=0))
            return None if bool(seen.all()) else seen
        if mask is None:
            if rows.shape[1] == 1 and bool(there.all()):
                return None
            seen = there[:, :, None] & (columns[:, :, None] <= (rows + begins)[:, None, :, None])
            return seen.repeat_interleave(self.repeats, 1)
        if not isinstance(mask, Tensor) or mask.ndim != 4:
            kind = f"of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise FoveateError(f"a mask {kind} cannot be thinned with the cache; load the model with sdpa or eager attention")
        by_head = columns.repeat_interleave(self.repeats, 1) if mask.shape[1] > 1 else columns
        (B, H, K), M = by_head.shape, rows.shape[1]
        mask = mask.expand(B, H, -1, -1).gather(2, rows[:, None, :, None].expand(B, H, M, mask.shape[3]))
        mask = mask.gather(3, by_head.clamp(min=0)[:, :, None].expand(B, H, M, K))
        low: Any = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        mask = mask.masked_fill((by_head < 0)[:, :, None], low)
        return mask.repeat_interleave(self.repeats, 1) if by_head is columns else mask


def thinnable(cache: Any, layer: int) -> bool:
    """Whether a layer's cache is one that a policy decides on: of keys and values that grows with the sequence. FoveateError for one that
    cannot be written."""
    layers = getattr(cache, "layers", ())
    held = layers[layer] if layer < len(layers) else None
    if held is None or not hasattr(held, "update") or getattr(held, "is_sliding", False) or isinstance(held, DynamicSlidingWindowLayer):
        return False
    served = isinstance(held, DynamicLayer) and not isinstance(held, BaseQuantizedLayer | DynamicIndexedLayer)
    if served and not getattr(cache, "offloading", False):
        return True
    if served or hasattr(held, "keys"):
        kind = f"offloaded {type(cache).__name__}" if served else f"{type(cache).__name__} of {type(held).__name__}s"
        raise FoveateError(
            f"a cache policy cannot thin a {kind}: it writes into a plain DynamicCache, whose layers grow; leave out "
            "cache_implementation, or detach the policy"
        )
    return False


def evict(cache: Any, layer: int, held: Held, decision: Evict) -> Held:
    """Leaves of a layer's keys and values what stays, each head's in ascending order, behind empty slots where another keeps more."""
    stays = decision.stays
    own = cache.layers[layer]
    M = int(stays.sum(-1).max())
    order = stays.to(torch.int8).argsort(dim=-1, stable=True)[..., stays.shape[-1] - M :]
    there = stays.gather(-1, order)
    for name, changed in (("keys", decision.keys), ("values", decision.values)):
        whole = getattr(own, name) if changed is None else changed
        index = order.to(whole.device)[..., None].expand(-1, whole.shape[1], -1, whole.shape[3])
        setattr(own, name, whole.gather(2, index))
    slots, visual = (one.expand(stays.shape).gather(-1, order) for one in (held.slots, held.visual))
    return replace(held, slots=slots.masked_fill(~there, -1), visual=visual & there, full=bool(there.all()))
