"""ZipVL: as many tokens as hold a share tau of the attention, layer by layer (arXiv 2410.08584, version 2).

    a_k = sum over queries, mean over heads, of A[h, q, k]            accumulated
    p   = the smallest number of tokens, by falling a, whose sum is at least tau of all
    the p best by a_k / (number of queries that see k) stay           normalised, so that early tokens have no bonus

So a prompt that is looked at in few places keeps few, and layers differ. All heads of a layer keep the same tokens.

From the abstract and others' notes of it; no code was found. The default tau is from memory. Where this differs: the paper also runs the
prompt's attention among the important tokens alone, which is left out here (every layer runs whole, then its cache is thinned); it
estimates the scores from probe tokens, the choice of which is not known to us: `probes` takes the last ones, 0 all. Version 1 keeps the
others at low precision where this, as version 2, drops them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foveate.cache_policies.base import CachePolicy, highest
from foveate.cache_policies.common import received
from foveate.contract import CacheView, Evict
from foveate.reducers.common import above_zero, shares


@dataclass(frozen=True)
class ZipVL(CachePolicy):
    """Keeps in each layer as many tokens as hold `tau` of its attention, seen from the last `probes` queries (0: from all)."""

    name: ClassVar[str] = "zipvl"
    paper: ClassVar[str] = "2410.08584"
    experimental: ClassVar[bool] = True
    examples: ClassVar[tuple[str, ...]] = ("zipvl:tau=0.8", "zipvl:tau=0.5,probes=4,every=2")
    keeps_all: ClassVar[tuple[str, ...]] = ("zipvl:tau=1.0",)
    tau: float = 0.975
    probes: int = 0

    def check(self) -> None:
        super().check()
        shares(self, "tau")
        above_zero(self, "tau")
        self.least(0, "probes")

    @property
    def observes(self) -> int | None:
        return self.probes or None

    @property
    def keeps_everything(self) -> bool:
        return self.tau == 1.0

    def decide(self, view: CacheView) -> Evict:
        accumulated = received(self.name, view, self.observes, alike=True).masked_fill(~view.there, 0.0)
        return Evict(highest(view, normalised(view, accumulated, self.observes), important(accumulated, self.tau)))

    def count(self, tokens: int, number: int, layers: int) -> int | None:
        return tokens if self.keeps_everything else None


def important(accumulated: Tensor, tau: float) -> Tensor:
    """(..., ) int64: of scores (..., K) the smallest number of the largest whose sum is at least `tau` of the whole."""
    falling = accumulated.to(torch.float64).sort(dim=-1, descending=True).values
    total = falling.sum(-1, keepdim=True)
    return (falling.cumsum(-1) < tau * total * (1 - 1e-9)).sum(-1) + 1  # sums that are equal on paper differ in their last bits


def normalised(view: CacheView, accumulated: Tensor, last: int | None = None) -> Tensor:
    """Accumulated attention (B, 1 or G, K) by the number of queries that see each slot: its own and those after it, of the last `last`."""
    asked = view.asking.sum(1)[:, None, None].clamp(max=view.asking.shape[1] if last is None else last)
    return accumulated / asked.minimum(view.age + 1).clamp(min=1)
