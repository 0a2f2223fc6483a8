"""SnapKV: keys that the last tokens of the prompt look at, with their neighbours (arXiv 2404.14469).

    s_k = sum over the last w queries of A[h, q, k]         w = window
    s_k = mean of s over k - r .. k + r                     r = (kernel - 1) / 2, zeros beyond the ends

The best keep - w keys of each head stay, and the window's own keys always. So only w rows of attention are computed, whatever the backend.

Where this differs from the authors' code (read): keep counts the window too; of grouped-query attention each key head decides by the mean
of its query heads, as kvpress does, where the authors store keys once for each query head; prompts padded on either side decide as they
would alone; a budget smaller than the window keeps the newest of it, where theirs is refused; their "maxpool" is not offered.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foveate.cache_policies.base import Keeping
from foveate.cache_policies.common import in_order, protect, received
from foveate.contract import CacheView
from foveate.errors import FoveateError


@dataclass(frozen=True)
class SnapKV(Keeping):
    """Keeps `keep` of each row's keys in every head: the last `window`, and those that these look at, pooled over `kernel` neighbours."""

    name: ClassVar[str] = "snapkv"
    paper: ClassVar[str] = "2404.14469"
    examples: ClassVar[tuple[str, ...]] = ("snapkv:keep=0.5,window=4", "snapkv:keep=9,window=3,kernel=1,every=2")
    keeps_all: ClassVar[tuple[str, ...]] = ("snapkv:keep=1.0", "snapkv:keep=1000,window=4")
    window: int = 32
    kernel: int = 5

    def check(self) -> None:
        super().check()
        self.least(1, "window", "kernel")
        if self.kernel % 2 == 0:
            raise FoveateError(f"{self.name}: kernel={self.kernel} is not possible; give an odd number, such as kernel=5 (1: no pooling)")

    @property
    def observes(self) -> int | None:
        return self.window

    def score(self, view: CacheView) -> Tensor:
        recent = view.there & (view.age < self.window)
        seen = received(self.name, view, self.window).masked_fill(recent | ~view.there, 0.0)
        ordered, order = in_order(view, seen)
        pooled = torch.nn.functional.avg_pool1d(ordered, self.kernel, stride=1, padding=self.kernel // 2)
        return protect(view, torch.empty_like(pooled).scatter_(-1, order, pooled), recent)
