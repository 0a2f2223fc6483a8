"""SliME's lens: of each tile's patches learned queries make side x side features, which the bridge then reads (Zhang et al.,
arXiv 2406.08487).

    q_n = LN(query_n) + P_n    k_m = LN(x_m) + P'_m    v_m = LN(x_m)
    y_n = LN(MHA(q, k, v)_n)                           one layer, without residual or MLP; side² learned queries

P holds fixed 2-D sines and cosines of a raster of side x side, one place a query, P' the same resized to the grid of patches. Every y has
read its whole tile; it stands for the cell of the tile at its query's place, which is where its tokens are laid out.

As in the released code, with heads of 128 values (fewer where the width is no multiple) and the initial weights of torch's multi-head
attention. Settled here: several levels have queries of their own each, and the biases of keys, which no softmax sees, are left out.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.bridges.base import positive
from foveate.bridges.cross_attention import MultiHead
from foveate.bridges.windows import Grid, sines

_HEAD = 128


class TileQueries(nn.Module):
    """`side` x `side` features of a view, for any grid of patches."""

    kind: ClassVar[str] = "tile_queries"

    def __init__(self, *, side: int, levels: int, width: int) -> None:
        super().__init__()
        self.side = positive("side", side)
        self.readers = nn.ModuleList(Queries(side, width) for _ in range(levels))

    def forward(self, features: list[Tensor], grid: Grid) -> list[Tensor]:
        """Of each level (views, rows * columns, width) -> (views, side², width)."""
        return [reader(x, grid) for reader, x in zip(self.readers, features, strict=True)]


class Queries(nn.Module):
    """The queries of one level."""

    def __init__(self, side: int, width: int) -> None:
        super().__init__()
        self.side, self.width = side, width
        sines((side, side), width)  # a width that has no such places is told now
        self.query = nn.Parameter(torch.empty(side * side, width))
        self.norm_query, self.norm_patch, self.norm = (nn.LayerNorm(width, eps=1e-6) for _ in range(3))
        self.attention = MultiHead(width, width // math.gcd(width, _HEAD))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.query, std=0.02)
        for part in (self.attention.to_q, self.attention.to_k, self.attention.to_v):  # torch's, of one matrix for all three
            nn.init.uniform_(part.weight, -((1.5 / self.width) ** 0.5), (1.5 / self.width) ** 0.5)
        for part in (self.attention.to_q, self.attention.to_v, self.attention.proj):
            nn.init.zeros_(part.bias)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        place = sines((self.side, self.side), self.width).to(x.device)
        cells = place.T.view(1, self.width, self.side, self.side)
        beside = F.interpolate(cells, size=grid, mode="bicubic").flatten(2).transpose(1, 2).to(x.dtype)  # (1, patches, width)
        query, patch = self.norm_query(self.query) + place.to(x.dtype), self.norm_patch(x)
        read: Tensor = self.norm(self.attention(query.expand(len(x), -1, -1), patch + beside, patch))
        return read
