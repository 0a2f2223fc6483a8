"""Random eviction: the baseline that every scored policy has to beat.

Each key head of each layer keeps a share of its own, by a hash of (seed, layer, head, place in the prompt): the same in every batch, and in
every prompt of one length. Nothing is protected, the last tokens no more than the first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from foveate.cache_policies.base import Keeping
from foveate.contract import CacheView
from foveate.reducers.common import integers


@dataclass(frozen=True)
class RandomEviction(Keeping):
    """Keeps a random `keep` of each row's keys in every head of every layer."""

    name: ClassVar[str] = "random"
    paper: ClassVar[str] = "-"
    examples: ClassVar[tuple[str, ...]] = ("random:keep=0.5", "random:keep=9,every=2")
    keeps_all: ClassVar[tuple[str, ...]] = ("random:keep=1.0", "random:keep=1000")
    seed: int = 0

    def check(self) -> None:
        super().check()
        integers(self, seed=0)

    @property
    def observes(self) -> int | None:
        return 0

    def score(self, view: CacheView) -> Tensor:
        return view.noise(self.seed)
