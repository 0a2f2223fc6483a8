"""VScan: patches by attention in local windows and in the whole picture, the others merged into them; half of the depth later a ranking by
the prompt (arXiv 2505.22654).

    local   in each of `windows` x `windows` windows of a tile's grid the floor(floor(T / 2) / windows^2) patches that [CLS] attends to
            most in tower block `local`
    global  of the other patches those that [CLS] attends to most in tower block `layer`, until there are T
    merge   every other patch joins the kept one nearest by cosine of the states in front of the language model; a group becomes its mean
    late    in front of decoder layer `late` the share `rest` of each image's tokens stays: those that the asking row of the layer
            before attends to most

Means stand at their kept patches' places. Of the published settings for LLaVA-1.5, 96 tokens in 16 layers and 32 in 16 more are 64 on
average.

Where this differs from the authors' code: what the windows' rounding leaves of the budget goes to the global ones (theirs keeps 98 of T =
100). A window is cut out of any grid by its share of rows and columns (theirs asserts 24 x 24); patches that are no raster are one
window. On Qwen2.5-VL theirs ranks late by a row without rotary embedding and keeps the positions there (`positions="keep"`). Newline
tokens stay. In a tower without [CLS] the attention received stands in for it (see `ClsAttention`), as in their code for Qwen.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from foveate.contract import Attention, AttentionRows, BeforeLM, ClsAttention, Cut, FromLayer, Site, View, Workload, products
from foveate.reducers.base import Reducer
from foveate.reducers.common import asked, choose, groups, integers, into, states
from foveate.tokens import TokenMap, budget, top


@dataclass(frozen=True)
class VScan(Reducer):
    """Keeps `keep` of each tile's patches, merges the others into them, and keeps `rest` of each image from decoder layer `late` on.

    layer and local: tower blocks of the two rankings. scope: what `keep` counts in, "crop" (tile), "image" or "frame".
    """

    name: ClassVar[str] = "vscan"
    paper: ClassVar[str] = "2505.22654"
    looks_at: ClassVar[frozenset[str]] = frozenset({"tower", "states", "text", "attention"})
    examples: ClassVar[tuple[str, ...]] = ("vscan:keep=0.5,windows=2,local=-1,late=2,rest=0.5",)
    keeps_all: ClassVar[tuple[str, ...]] = ("vscan:keep=1.0,local=-1,late=2,rest=1.0",)
    multiplies: ClassVar[tuple[str, ...]] = ("vscan:keep=0.5,local=-1,late=1,rest=0.5",)
    keep: float | int = 1 / 6
    rest: float | int = 1 / 3
    late: int = 16
    windows: int = 4
    local: int = 5
    layer: int = -2
    scope: str = "crop"
    positions: str = field(default="renumber", kw_only=True)

    def check(self) -> None:
        super().check()
        budget(self.keep, 1)
        budget(self.rest, 1)
        integers(self, ", the attention of the layer before it is needed", late=1)
        integers(self, windows=1, local=None, layer=None)
        choose(self, scope=("crop", "image", "frame"))

    def sites(self, layers: int) -> list[Site]:
        return [BeforeLM((ClsAttention(self.local), ClsAttention(self.layer))), FromLayer(self.late, (Attention(self.late - 1),))]

    def reduce(self, view: View, stage: int = 0) -> Cut:
        layout = view.layout
        if stage:
            attention: AttentionRows = view.signal(Attention(self.late - 1))
            return Cut(TokenMap.keep(layout, top(layout, asked(self.name, view, lambda q: attention.row(q.asking)), self.rest)))
        near, far = (view.signal(ClsAttention(layer)).flatten() for layer in (self.local, self.layer))
        x, place = states(self.name, view).detach().flatten(0, 1), layout.place.flatten(0, 1)
        home = torch.arange(len(x), device=x.device)
        weight = torch.ones(len(x), dtype=torch.float64, device=x.device)
        for slots in groups(layout, self.scope):
            left = budget(self.keep, len(slots))
            if left < len(slots):
                kept = self._kept(place[slots], near[slots], far[slots], left)
                unit = normalize(x[slots].to(torch.float32), dim=-1)
                group = kept.cumsum(0) - 1  # of a kept one its number
                group[~kept] = (unit[~kept] @ unit[kept].T).argmax(1)
                home[slots] = slots[kept][group]
                weight[slots] = 1 / group.bincount()[group].to(torch.float64)
        return Cut(into(layout, home, weight))

    def count(self, work: Workload, stage: int = 0) -> list[int]:
        if stage:
            return work.leaving(lambda arriving, _: budget(self.rest, arriving))
        return work.leaving(lambda arriving, _: budget(self.keep, arriving), self.scope)

    def score_flops(self, sizes: Workload, stage: int = 0) -> int:
        if stage:
            return sizes.rows(1)
        reduced = [(n, left) for n in sizes.groups(self.scope) if (left := budget(self.keep, n)) < n]
        return products(((n - left, left) for n, left in reduced), sizes.width)

    def _kept(self, place_L5: Tensor, near_L: Tensor, far_L: Tensor, left: int) -> Tensor:
        """(L,) bool: the local ones, then the global ones, `left` in all."""
        cell = place_L5[:, 3:] - place_L5[:, 3:].amin(0)
        row, column = (cell * self.windows // (cell.amax(0) + 1)).unbind(1)
        window = row * self.windows + column
        first = torch.zeros_like(window, dtype=torch.bool)
        for one in window.unique():
            here = (window == one).nonzero()[:, 0]
            best = torch.argsort(near_L[here], descending=True, stable=True)[: left // 2 // self.windows**2]
            first[here[best]] = True
        order = torch.argsort(torch.where(first, float("inf"), far_L), descending=True, stable=True)
        return torch.zeros_like(first).index_fill(0, order[:left], True)
