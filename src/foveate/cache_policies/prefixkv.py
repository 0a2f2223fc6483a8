"""PrefixKV: one share of attention for all layers, so that a layer that looks at many tokens keeps many (arXiv 2412.03409).

    s_l,k = sum over the prompt's queries, mean over heads, of A_l[h, q, k] / their sum over k
    of each layer the smallest prefix of its keys, by falling s, that reaches p; p such that all layers together keep `keep`

The first `first` tokens and the last one are protected. All heads of a layer keep the same tokens.

Where this differs from the authors' code (read): p is found for each prompt, exactly and to the token, after its last layer; theirs is
searched by bisection on ten calibration samples and saved as a share for each layer of each checkpoint, so that at run time no layer has to
wait. So ours peaks at the whole cache while the prompt runs. While decoding theirs drops one token a step, the one at a fixed distance from
the end; here `every` decides anew. Theirs: batch 1, eager attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foveate.cache_policies.base import Keeping
from foveate.cache_policies.common import protect, received
from foveate.contract import CacheView, Evict
from foveate.tokens import budget


@dataclass(frozen=True)
class PrefixKV(Keeping):
    """Keeps `keep` of all layers' keys, each layer as many as reach the same share of its attention; `first` tokens always."""

    name: ClassVar[str] = "prefixkv"
    paper: ClassVar[str] = "2412.03409"
    together: ClassVar[bool] = True
    examples: ClassVar[tuple[str, ...]] = ("prefixkv:keep=0.5", "prefixkv:keep=9,first=1,every=2")
    keeps_all: ClassVar[tuple[str, ...]] = ("prefixkv:keep=1.0", "prefixkv:keep=1000")
    first: int = 4

    def check(self) -> None:
        super().check()
        self.least(0, "first")

    def score(self, view: CacheView) -> Tensor:
        return received(self.name, view, alike=True)

    def decide_together(self, views: Sequence[CacheView], scores: Sequence[Tensor]) -> list[Evict]:
        reached = [self._reached(view, score) for view, score in zip(views, scores, strict=True)]
        # A slot is in its layer's prefix where those before it have not reached p: the lowest of these, over all layers, are the prefixes.
        heads, sizes = max(one.shape[1] for one in reached), [one.shape[2] for one in reached]
        every = torch.cat([one.expand(-1, heads, -1) for one in reached], 2)
        total = torch.tensor(
            [[[sum(budget(self.keep, n) for n in row)]] for row in zip(*(view.tokens.tolist() for view in views), strict=True)]
        )
        order = every.argsort(dim=-1, stable=True)
        rank = torch.empty_like(order).scatter_(-1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order))
        kept = (rank < total.to(rank.device)) & every.isfinite()
        return [Evict(one[:, : view.place.shape[1]]) for one, view in zip(kept.split(sizes, 2), views, strict=True)]

    def _reached(self, view: CacheView, score: Tensor) -> Tensor:
        """(B, 1 or G, K) the share of its layer's attention in front of each slot, by falling score; inf where it holds nothing."""
        kept = view.there & ((view.place < self.first) | (view.age == 0))
        share = score.masked_fill(~view.there, 0.0).to(torch.float64)
        share = share / share.sum(-1, keepdim=True)
        order = protect(view, score, kept).masked_fill(~view.there, float("-inf")).argsort(dim=-1, descending=True, stable=True)
        ordered = share.gather(-1, order)
        before = torch.empty_like(share).scatter_(-1, order, ordered.cumsum(-1) - ordered)
        return torch.where(kept, -1.0, before).masked_fill(~view.there, float("inf"))

    def count(self, tokens: int, number: int, layers: int) -> int | None:
        return None
