"""LOOK-M: text first, and what goes of the images is merged into what stays (arXiv 2406.18139).

    s_k = sum over the prompt's queries of A[h, q, k],  + max s for tokens of text
    the best keep - w keys of each head stay, and the last w

so that images are thinned before any text is. `merge`: each evicted key e goes to the key c that stays with the largest cosine similarity,
its value with it. Of n that come to one c, with similarities c_e:

    average   (c + sum e) / (n + 1)          pivot   (c + sum (e + c) / 2) / (n + 1)          weighted   (c + sum c_e e) / (n + 1)

Merging is done on keys as they are cached, rotated to their own positions, as the authors' code does.

Where this differs from that code (read; the rule that adds the maximum is from memory of the paper): theirs finds images by fixed places of
576 tokens and takes two shares, of important and of recent tokens, both of all; here `keep` counts both, and one number says how many are
recent. Grouped-query attention: as in SnapKV. Attention is summed block by block, no map is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foveate.cache_policies.base import Keeping
from foveate.cache_policies.common import protect, received
from foveate.contract import BLOCK, CacheView, Evict
from foveate.reducers.common import choose


@dataclass(frozen=True)
class LookM(Keeping):
    """Keeps `keep` of each row's keys in every head: the last `window`, then text, then images by the attention that they receive."""

    name: ClassVar[str] = "lookm"
    paper: ClassVar[str] = "2406.18139"
    tells_images: ClassVar[bool] = True
    examples: ClassVar[tuple[str, ...]] = (
        "lookm:keep=0.5,window=4",
        "lookm:keep=0.5,window=4,merge=pivot",
        "lookm:keep=0.3,window=2,merge=weighted",
        "lookm:keep=9,window=2,merge=average,every=2",
    )
    keeps_all: ClassVar[tuple[str, ...]] = ("lookm:keep=1.0", "lookm:keep=1000,merge=average")
    window: int = 16
    merge: str = "none"

    def check(self) -> None:
        super().check()
        self.least(1, "window")
        choose(self, merge=("none", "average", "pivot", "weighted"))

    def score(self, view: CacheView) -> Tensor:
        seen = received(self.name, view).masked_fill(~view.there, 0.0)
        prior = seen.max(-1, keepdim=True).values
        return protect(view, seen + torch.where(view.visual, 0.0, prior), view.there & (view.age < self.window))

    def decide(self, view: CacheView) -> Evict:
        stays = super().decide(view).stays
        gone = view.there & ~stays
        if self.merge == "none" or not bool(gone.any()):
            return Evict(stays)
        home, likeness = nearest(view.keys, stays, gone)
        merged = [merge(kind, home, likeness, self.merge) for kind in (view.keys, view.values)]
        return Evict(stays, *merged)

    def score_flops(self, tokens: int, width: int, keys: int) -> int:
        likeness = 0 if self.merge == "none" or self.count(tokens, 0, 1) == tokens else 2 * tokens * tokens * keys
        return super().score_flops(tokens, width, keys) + likeness


def nearest(keys: Tensor, stays: Tensor, gone: Tensor) -> tuple[Tensor, Tensor]:
    """(B, G, K) of each slot that goes, the slot that stays whose key is most like its own (-1 for all others), and how like: cosine."""
    unit = torch.nn.functional.normalize(keys.to(torch.float32), dim=-1)
    parts = [(block @ unit.transpose(-1, -2)).masked_fill(~stays[..., None, :], float("-inf")).max(-1) for block in unit.split(BLOCK, 2)]
    likeness, home = (torch.cat([part[i] for part in parts], -1) for i in range(2))
    gone = gone & stays.any(-1, keepdim=True)
    return torch.where(gone, home, -1), likeness


def merge(kind: Tensor, home: Tensor, likeness: Tensor, how: str) -> Tensor:
    """(B, G, K, h) keys or values, those that stay with those whose `home` they are."""
    own, h = kind.to(torch.float32), kind.shape[-1]
    at = home.clamp(min=0)[..., None].expand(-1, -1, -1, h)
    comes = {"average": own, "pivot": (own + own.gather(2, at)) / 2, "weighted": own * likeness[..., None].nan_to_num(neginf=0.0)}[how]
    here = (home >= 0)[..., None]
    total = own.scatter_add(2, at, torch.where(here, comes, 0.0))
    number = torch.ones_like(own[..., :1]).scatter_add(2, at[..., :1], here.to(torch.float32))
    return (total / number).to(kind.dtype)
