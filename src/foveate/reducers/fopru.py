"""FoPru: the patches, or the rows of patches, that receive most attention inside the vision tower (arXiv 2411.14164).

    s_n = attention that patch n receives in the tower's last block but one, mean over heads and queries
    rank:  keep the T largest s_n of the image
    row:   s of a grid row = mean of its patches'; keep the best floor(T / W) whole rows of W patches

What is kept stays in its original order. UNVERIFIED: the abstract (three steps: significance, pruning, re-ordering) is all that
could be read of the paper, and no code was found; the formulas above are second-hand and may not be the authors'. Not known in
particular: the layer, attention received rather than [CLS] attention, mean or sum over a row (the same where rows are equally long),
the default share (0.25 is this library's), and positions (renumbered, as LLaVA does with whatever is cut before the LM).

Ours, where the description says nothing: rows of different lengths (un-padded or already cut images) are taken best first for as long
as they fit into T; one row is always kept, even if it is longer than T; rows of tiles are rows of their own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isqrt
from typing import ClassVar

import torch
from torch import Tensor

from foveate.contract import BeforeLM, Cut, ReceivedAttention, Site, View, Workload
from foveate.errors import NotApplicable, Reason
from foveate.reducers.common import choose, integers
from foveate.reducers.ranker import Ranker
from foveate.tokens import Layout, TokenMap, budget


@dataclass(frozen=True)
class FoPru(Ranker):
    """Keeps `keep` (share or number) of each image's patches by attention received in tower block `layer`.

    strategy: "rank" keeps single patches, "row" keeps complete rows of the grid. Formulas unverified, see the module.
    """

    name: ClassVar[str] = "fopru"
    paper: ClassVar[str] = "2411.14164"
    experimental: ClassVar[bool] = True
    looks_at: ClassVar[frozenset[str]] = frozenset({"tower"})
    examples: ClassVar[tuple[str, ...]] = ("fopru:keep=0.5", "fopru:keep=0.5,strategy=row")
    keeps_all: ClassVar[tuple[str, ...]] = ("fopru:keep=1.0",)
    multiplies: ClassVar[tuple[str, ...]] = ("fopru:keep=0.5",)
    keep: float | int = 0.25
    strategy: str = "rank"
    layer: int = -2
    positions: str = field(default="renumber", kw_only=True)

    def check(self) -> None:
        super().check()
        integers(self, layer=None)
        choose(self, strategy=("rank", "row"))

    def sites(self, layers: int) -> list[Site]:
        return [BeforeLM((ReceivedAttention(self.layer),))]

    def score(self, view: View, stage: int = 0) -> Tensor:
        scores: Tensor = view.signal(ReceivedAttention(self.layer))
        return scores

    def reduce(self, view: View, stage: int = 0) -> Cut:
        if self.strategy == "rank":
            return super().reduce(view, stage)
        return Cut(TokenMap.keep(view.layout, self._rows(view.layout, self.score(view))))

    def count(self, work: Workload, stage: int = 0) -> list[int]:
        """Of rows that are not equally long the budget, which they do not exceed; of an unknown grid as if it were a square."""
        allowed = super().count(work)
        if self.strategy == "rank":
            return allowed
        found = []
        for image, arriving, T in zip(work.images, work.arriving, allowed, strict=True):
            square = {isqrt(arriving)} if isqrt(arriving) ** 2 == arriving else set()
            lengths = set() if arriving != image.tokens else {columns for _, columns in image.grids} or square
            W = lengths.pop() if len(lengths) == 1 else 1
            found.append(max(1, T // W) * W if W else 0)
        return found

    def exact(self, work: Workload) -> bool:
        """In whole rows: where the grids are known and all rows of an image are equally long."""
        whole = work.arriving == tuple(image.tokens for image in work.images)
        return self.strategy == "rank" or (whole and all(len({columns for _, columns in image.grids}) == 1 for image in work.images))

    def _rows(self, layout: Layout, score_BN: Tensor) -> Tensor:
        """(B, N) bool: the patches of the best rows. R: rows of all images; n: visual slots of the batch."""
        visual = layout.visual
        if not bool(visual.any()):
            return visual
        place = layout.place[visual]
        if bool((place[:, 3] < 0).any()):
            message = 'fopru: strategy="row" needs the grid of every image, and one has none; use strategy="rank"'
            raise NotApplicable(Reason.NO_RASTER, message)
        image = layout.groups()[visual]
        key = torch.cat([image[:, None], place[:, 1:4]], -1)
        row, length = torch.unique(key, dim=0, return_inverse=True, return_counts=True)[1:]
        R, n = length.shape[0], row.shape[0]
        first = torch.full_like(length, n).scatter_reduce(0, row, torch.arange(n, device=row.device), "amin")
        # Sums in float64 are exact for scores of ordinary range, so that equal rows tie on every device.
        mean = torch.zeros(R, dtype=torch.float64, device=row.device).index_add(0, row, score_BN[visual].to(torch.float64)) / length
        # Stable sorts from the least to the most important key: place in the sequence, score, image.
        order = torch.argsort(first)
        order = order[torch.argsort(mean[order], descending=True, stable=True)]
        order = order[torch.argsort(image[first[order]], stable=True)]
        total = torch.bincount(image)
        allowed = torch.tensor([budget(self.keep, t) for t in total.tolist()], device=row.device)
        owner = image[first[order]]
        taken = length[order].cumsum(0) - (total.cumsum(0) - total)[owner]
        chosen = (taken <= allowed[owner]) | (taken == length[order])
        best = torch.zeros_like(chosen)
        best[order] = chosen
        kept = torch.zeros_like(visual)
        kept[visual] = best[row]
        return kept
