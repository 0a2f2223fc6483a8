"""DAMRO: what is said of the picture, less what would be said of its outliers alone, the few patches that the tower's [CLS] attends to most
(EMNLP 2024, arXiv 2410.04514).

    l + α (l - l')    where l >= log β + max l, elsewhere -inf        l': the logits of a pass whose image is the `keep` best patches by
    s_n = softmax over [CLS] and patches of q · k_n / sqrt(C)         q of [CLS], all heads of the block side by side as one of width C

in the block whose output the projector takes, and with a cache of its own. Settings of the authors' code: LLaVA keep=10, alpha=2;
InstructBLIP keep=4 and alpha=0.5 or 1.5; beta=0.1.

Read: the authors' code and the paper's tables. Where we differ: `keep` is of each image, its crops together (theirs is of each crop, and of
LLaVA-NeXT's only the first one's seem to arrive); the patches stand in raster order, with order="attention" in that of their scores, as
theirs; batches, and processors of logits after the contrast. A tower without [CLS] is asked for the attention received, which is ours; its
blocks have to attend to the whole picture. One of the two vendored copies of LLaVA in their code reads the block after that; layer=-1 does.

It costs the tower a second time, and the prompt and each token with `keep` visual tokens. What is attached acts in the first pass alone; a
cache policy in both.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import ClassVar

import torch

from foveate.contract import BeforeLM, ClsAttention, Cut, Site, View, Workload
from foveate.inference.contrast import Contrast
from foveate.inference.strategies.contrasting import Contrasting
from foveate.reducers import Reducer
from foveate.reducers.common import choose, images, integers, into
from foveate.tokens import TokenMap, budget, top


@dataclass(frozen=True)
class DAMRO(Contrasting):
    """Contrasts with the `keep` patches of each image that [CLS] attends to most in tower block `layer`.

    order  in which they stand: "raster" or "attention"
    """

    name: ClassVar[str] = "damro"
    paper: ClassVar[str] = "2410.04514"
    alpha: float = 2.0
    keep: float | int = 10
    layer: int = -2
    order: str = "raster"

    def check(self) -> None:
        super().check()
        outliers(self.keep, self.layer, self.order)

    @property
    def contrast(self) -> Contrast:
        return Contrast(str(self), self.alpha, self.beta, reducers=(outliers(self.keep, self.layer, self.order),))


@dataclass(frozen=True)
class Outliers(Reducer):
    """Keeps the `keep` patches of each image with the highest attention of [CLS], all heads taken as one."""

    name: ClassVar[str] = "damro"
    paper: ClassVar[str] = "2410.04514"
    looks_at: ClassVar[frozenset[str]] = frozenset({"tower"})
    keep: float | int = 10
    layer: int = -2
    order: str = "raster"
    positions: str = field(default="renumber", kw_only=True)

    def check(self) -> None:
        super().check()
        budget(self.keep, 1)
        integers(self, layer=None)
        choose(self, order=("raster", "attention"))

    def sites(self, layers: int) -> list[Site]:
        return [BeforeLM((ClsAttention(self.layer, joint=True),))]

    def reduce(self, view: View, stage: int = 0) -> Cut:
        layout, score = view.layout, view.signal(ClsAttention(self.layer, joint=True))
        kept = top(layout, score, self.keep)
        if self.order == "raster":
            return Cut(TokenMap.keep(layout, kept))
        place = torch.arange(layout.shape[1], device=kept.device).repeat(layout.shape[0], 1)
        home = torch.where(kept, place, -1)
        for row, slots in images(layout):
            own = slots[kept[row, slots]]
            best = own[score[row, own].argsort(descending=True, stable=True)]
            place[row, best] = own  # the k-th best takes the k-th place that survives
        return Cut(into(layout, home, place=place))

    def count(self, work: Workload, stage: int = 0) -> list[int]:
        return work.leaving(lambda arriving, original: min(arriving, budget(self.keep, arriving)), "image")


@lru_cache(typed=True)
def outliers(keep: float | int, layer: int, order: str) -> Outliers:
    """One for each setting, since its hooks stay on the model."""
    return Outliers(keep, layer, order)
