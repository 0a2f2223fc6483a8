"""What the engine and a cache policy say to each other: where it acts, what it is shown, and what it decides.

A reducer shortens the sequence: what it drops has no states, keys or values from there on. A cache policy leaves the sequence as it is:
every layer runs on all that comes to it, and then some of its keys and values go, so that what is said later no longer sees them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from foveate.contract.attention import AttentionRows
from foveate.contract.signals import hashed


@dataclass(frozen=True)
class InCache:
    """After decoder layer index `layer` has run: what stays of its keys and values."""

    layer: int


@dataclass(frozen=True)
class Evict:
    """What stays in the cache of one layer.

    stays         (B, 1 or G, K) bool: 1 where all key heads keep the same slots. A slot that holds no token never stays
    keys, values  (B, G, K, h) in place of the layer's own, where what goes is merged into what stays; None: they are as they were
    """

    stays: Tensor
    keys: Tensor | None = None
    values: Tensor | None = None


@dataclass(frozen=True)
class CacheView:
    """What a policy may look at once a layer has run. Legend: B rows, H heads, G key heads, h their width, K keys, N queries.

    layer      the decoder layer, and `layers` all those on whose caches the policy decides, ascending
    place      (B, 1 or G, K) int64: which token of its row each slot holds, counted from 0 without padding; -1: none
    visual     (B, 1 or G, K) bool: slots of an image
    tokens     (B,) int64: tokens that the layer has been given so far, those evicted earlier too: what a share is one of
    keys       (B, G, K, h) and values (B, G, K, h'), as they are cached: after the rotary embedding
    attention  the `AttentionRows` of the queries that are looked at, over these keys; None where the policy looks at none
    asking     (B, N) bool: which of these queries are tokens
    """

    layer: int
    layers: tuple[int, ...]
    place: Tensor
    visual: Tensor
    tokens: Tensor
    keys: Tensor
    values: Tensor
    attention: AttentionRows | None
    asking: Tensor

    @property
    def there(self) -> Tensor:
        """(B, 1 or G, K) bool: slots that hold a token."""
        return self.place >= 0

    @cached_property
    def age(self) -> Tensor:
        """(B, 1 or G, K) int64: how many of the tokens that are there stand after this one; of empty slots no sense."""
        order = self.place.argsort(dim=-1, descending=True, stable=True)
        return torch.empty_like(order).scatter_(-1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order))

    def noise(self, seed: int) -> Tensor:
        """(B, G, K) uniform scores from a hash of (seed, layer, head, place in the row): the same in every batch and beam."""
        heads = torch.arange(self.keys.shape[1], device=self.place.device)[:, None]
        return hashed(seed, (self.layer << 12) + heads, self.place)
