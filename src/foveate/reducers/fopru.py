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

from foveate.contract import BeforeLM, Cut, ReceivedAttention, Site, View
from foveate.errors import NotApplicable, Reason
from foveate.reducers.base import Reducer
from foveate.reducers.common import choose, integers
from foveate.tokens import Layout, TokenMap, budget, top


@dataclass(frozen=True)
class FoPru(Reducer):
    """Keeps `keep` (share or number) of each image's patches by attention received in tower block `layer`.

    strategy: "rank" keeps single patches, "row" keeps complete rows of the grid. Formulas unverified, see the module.
    """

    name: ClassVar[str] = "fopru"
    paper: ClassVar[str] = "2411.14164"
    keep: float | int = 0.25
    strategy: str = "rank"
    layer: int = -2
    positions: str = field(default="renumber", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        budget(self.keep, 1)
        integers(self, layer=None)
        choose(self, strategy=("rank", "row"))

    def sites(self, layers: int) -> list[Site]:
        return [BeforeLM((ReceivedAttention(self.layer),))]

    def reduce(self, view: View, stage: int = 0) -> Cut:
        score = view.signal(ReceivedAttention(self.layer))
        kept = top(view.layout, score, self.keep) if self.strategy == "rank" else self._rows(view.layout, score)
        return Cut(TokenMap.keep(view.layout, kept))

    def count(self, arriving: int, original: int, stage: int = 0) -> int:
        """Exact for "rank". For "row" exact where the image is a whole square grid; else the grid is not known here and this is the budget,
        which rows do not exceed unless one row does."""
        T, W = budget(self.keep, arriving), isqrt(arriving)
        if self.strategy == "rank" or arriving != original or arriving != W * W:
            return T
        return max(1, T // W) * W if W else 0

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
