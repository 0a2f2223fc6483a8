"""HiRED: a token budget for the whole tiled image, shared out by where the base image's [CLS] looks (arXiv 2408.10945).

    N_b = keep of all the image's tokens; the base image (crop 0) gets floor(alpha * N_b)
    tile p gets floor((N_b - base) * s_p / sum of s), s_p = [CLS] attention, in block 0 of the tower, of the base patches that show tile p
    inside each crop the patches with the highest [CLS] attention in block -2 are kept, in raster order; no crop gets more than it has
    (what a full base image cannot take goes to the tiles, what a full tile cannot take is unspent)

The paper adds up heads where the signal has their mean: the same ranking and the same shares. Tiles are crops >= 1, their rows and
columns count over the whole mosaic, and base image and mosaic are taken to show the same picture from edge to edge: a base patch shows
the tile in which its centre lies. The only tile of an image takes the whole rest, and an image of a single crop the whole budget.

The paper's floors, and crops that are full, leave tokens of the budget unspent. unspent="give" (ours, not the paper's) gives them to the
best patches that are left, so that exactly N_b are kept. If floors leave nothing at all, the base image's best patch stays. keep=1 keeps
all.

Where this differs from the authors' code: share="count" is theirs (s_p = how many of the int(base patches * (1 - alpha)) best base patches
show tile p), and regions="raster" too (the base patches cut into contiguous raster runs, one a tile: for 2 x 2 tiles each is a quarter of
the rows in full width, not a quadrant). Not offered: their budget counts 576 patches for every tile, padding included, which then loses
what was selected in the padding, and rounds down; they drop all newline tokens, which stay here; their LLaVA-1.5 variant uses
the first sample's mask for the whole batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from decimal import ROUND_FLOOR, Decimal
from math import floor
from typing import ClassVar

import torch
from torch import Tensor

from foveate.contract import BeforeLM, ClsAttention, Cut, Site, View, Workload
from foveate.errors import FoveateError, NotApplicable, Reason
from foveate.reducers.base import Reducer
from foveate.reducers.common import choose, integers
from foveate.tokens import TokenMap, budget, top


@dataclass(frozen=True)
class HiRED(Reducer):
    """Keeps `keep` (share or number) of each image's patches, `alpha` of them in the base image.

    layer, budget_layer: tower blocks whose [CLS] attention selects and shares out. share, regions, unspent: see the module.
    """

    name: ClassVar[str] = "hired"
    paper: ClassVar[str] = "2408.10945"
    looks_at: ClassVar[frozenset[str]] = frozenset({"tower"})
    examples: ClassVar[tuple[str, ...]] = ("hired:keep=0.5", "hired:keep=0.5,unspent=give")
    keeps_all: ClassVar[tuple[str, ...]] = ("hired:keep=1.0",)
    multiplies: ClassVar[tuple[str, ...]] = ("hired:keep=0.5",)
    keep: float | int = 0.2
    alpha: float = 0.5
    layer: int = -2
    budget_layer: int = 0
    share: str = "sum"
    regions: str = "tiles"
    unspent: str = "leave"
    positions: str = field(default="renumber", kw_only=True)

    def check(self) -> None:
        super().check()
        budget(self.keep, 1)
        if type(self.alpha) not in (float, int) or not 0 <= self.alpha <= 1:
            raise FoveateError(f"hired: alpha={self.alpha!r} is not possible; give the base image's share of the budget, 0 to 1")
        integers(self, layer=None, budget_layer=None)
        choose(self, share=("sum", "count"), regions=("tiles", "raster"), unspent=("leave", "give"))

    def sites(self, layers: int) -> list[Site]:
        return [BeforeLM((ClsAttention(self.budget_layer), ClsAttention(self.layer)))]

    def reduce(self, view: View, stage: int = 0) -> Cut:
        layout = view.layout
        score, coarse = view.signal(ClsAttention(self.layer)), view.signal(ClsAttention(self.budget_layer))
        image = layout.groups()
        quota = torch.zeros_like(image)  # at each patch: how many its crop keeps
        whole = torch.zeros_like(image)  # and its image
        for i in range(int(image.max()) + 1 if image.numel() else 0):
            mine = image == i
            N_b = budget(self.keep, int(mine.sum()))
            quota[mine] = self._quotas(layout.place[mine], coarse[mine], N_b)
            whole[mine] = N_b
        # A crop's quota is the whole (1.0) of what it "had".
        kept = top(layout, score, 1.0, scope="crop", original_BN=quota)
        if self.unspent == "give":
            kept = top(layout, torch.where(kept, float("inf"), score), 1.0, original_BN=whole)
        return Cut(TokenMap.keep(layout, kept))

    def count(self, work: Workload, stage: int = 0) -> list[int]:
        return work.leaving(lambda arriving, _: budget(self.keep, arriving))

    def exact(self, work: Workload) -> bool:
        """With unspent="give", and for images of one crop. Else floors and full crops leave some of the budget unspent, and how much
        follows from where [CLS] looks."""
        return self.unspent == "give" or all(len(image.crops) == 1 for image in work.images)

    def _quotas(self, place_L5: Tensor, coarse_L: Tensor, N_b: int) -> Tensor:
        """(L,) int64: at each patch of one image how many patches its crop may keep."""
        crop, L = place_L5[:, 1], place_L5.shape[0]
        crops, at, lengths = torch.unique(crop, return_inverse=True, return_counts=True)
        if len(crops) == 1 or N_b == L:
            return torch.full_like(crop, N_b)
        if int(crops[0]) != 0:
            raise FoveateError("hired: an image has several crops, but none of them is crop 0, the base image that the budget is read from")
        most = lengths.tolist()
        base = min(_floor(self.alpha, N_b), most[0])
        share = self._shares(place_L5, coarse_L, crops)
        total = sum(share)
        if not total > 0.0:  # nothing was attended to, or nothing that is a number: all alike
            share, total = [1.0] * len(share), float(len(share))
        # 1e-9: the quotient of exact shares may fall just short of the integer that it is.
        quota = [base] + [min(floor((N_b - base) * s / total + 1e-9), m) for s, m in zip(share, most[1:], strict=True)]
        if sum(quota) == 0:
            quota[0] = 1
        return torch.tensor(quota, device=crop.device)[at]

    def _shares(self, place_L5: Tensor, coarse_L: Tensor, crops: Tensor) -> list[float]:
        """The unnormalised share of each tile, in ascending order of crops."""
        base = place_L5[:, 1] == 0
        worth = coarse_L[base].to(torch.float64)
        n = worth.shape[0]
        if self.share == "count":
            best = torch.argsort(worth, descending=True, stable=True)[: n - _ceil(self.alpha, n)]
            worth = torch.zeros_like(worth).index_fill(0, best, 1.0)
        if self.regions == "raster":
            tiles = len(crops) - 1
            run = torch.arange(n, device=worth.device) * tiles // n
            return [float(worth[run == p].sum()) for p in range(tiles)]
        if bool((place_L5[:, 3:] < 0).any()):
            message = 'hired: the grid of an image with several crops is not known; use regions="raster"'
            raise NotApplicable(Reason.NO_RASTER, message)
        at, tile = place_L5[base][:, 3:], place_L5[~base][:, 3:]
        if len(tile.unique(dim=0)) < len(tile):
            message = 'hired: where in the picture the tiles lie is not known, their rows and columns overlap; use regions="raster"'
            raise NotApplicable(Reason.NO_RASTER, message)
        low, grid = tile.amin(0), at.amax(0) + 1
        extent = tile.amax(0) + 1 - low
        # Where the centre of a base patch lies in the mosaic, times 2 * grid: integers, so that edges are exact.
        centre = low * 2 * grid + (2 * at + 1) * extent
        shares = []
        for crop in crops[1:]:
            box = place_L5[place_L5[:, 1] == crop][:, 3:]
            inside = (centre >= box.amin(0) * 2 * grid) & (centre < (box.amax(0) + 1) * 2 * grid)
            shares.append(float(worth[inside.all(-1)].sum()))
        return shares


def _floor(share: float, n: int) -> int:
    """floor(share * n) of the decimal that was meant."""
    return int((Decimal(str(share)) * n).to_integral_value(ROUND_FLOOR))


def _ceil(share: float, n: int) -> int:
    return -_floor(-share, n)
