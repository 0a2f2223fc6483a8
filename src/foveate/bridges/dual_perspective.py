"""INF-LLaVA's lens: blocks and strides of an image, put together as two maps, read each other and enhance the plain view (Ma et al.,
arXiv 2407.16198).

    L, G           the maps of the n² blocks and of the n² strides, n * rows x n * columns patches, each at its place in the image
    G' = E(G, L)   in n² pieces, every n-th row and column          E(q, x) = LN(MHA(q, x, x) + q)
    L' = E(L, G)   in n² pieces, the blocks
    F  = LN([A L' ; B G'] + L' + G')                                A, B: linear maps to half of the width each
    out = plain view + mean of F over n x n patches

So a piece of the global map reads details from all over the image, and a block of the local one what the other knows of the same place.
A piece is as large as one view; n² of them cost n² times less than all at once.

The released code swaps the two cuts, maps to half of the width by way of a sixteenth with GELU, resizes bilinearly to 24 x 24, and takes
the mean of the two at the end; where they differ, this is the paper's. Which attention and norms these are we know from the code alone:
one attention of 8 heads for both, residual and norm behind it, and the norm over the sum. Settled here: several levels have weights of
their own each, and the biases of keys, which no softmax sees, are left out. Weights do not depend on n.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from foveate.bridges.cross_attention import MultiHead
from foveate.bridges.windows import Grid

_HEADS = 8


class DualPerspective(nn.Module):
    """One map of the plain view's patches of an image's 1 + 2 n² views, for any grid."""

    kind: ClassVar[str] = "dual_perspective"

    def __init__(self, *, levels: int, width: int) -> None:
        super().__init__()
        self.enhancers = nn.ModuleList(Enhancer(width) for _ in range(levels))

    def forward(self, features: list[Tensor], grid: Grid) -> list[Tensor]:
        """Of each level (images, 1 + 2 n², rows * columns, width) -> (images, rows * columns, width). Views: the plain one, the blocks, the
        strides by their first row and column; of both row after row."""
        return [enhancer(x, grid) for enhancer, x in zip(self.enhancers, features, strict=True)]


class Enhancer(nn.Module):
    """The lens of one level."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention, self.norm = MultiHead(width, math.gcd(width, _HEADS)), nn.LayerNorm(width)
        self.down_local, self.down_global = nn.Linear(width, width // 2), nn.Linear(width, width - width // 2)
        self.norm_fused = nn.LayerNorm(width)

    def forward(self, views: Tensor, grid: Grid) -> Tensor:
        n = math.isqrt(views.shape[1] // 2)
        plain, blocks, strides = views.split([1, n * n, n * n], dim=1)
        local, whole = from_blocks(blocks, grid), from_strides(strides, grid)
        enhanced_whole = from_strides(self._enhanced(strides, to_strides(local, n)), grid)
        enhanced_local = from_blocks(self._enhanced(blocks, to_blocks(whole, n)), grid)
        halves = torch.cat([self.down_local(enhanced_local), self.down_global(enhanced_whole)], dim=-1)
        fused = self.norm_fused(halves + enhanced_local + enhanced_whole)
        pooled = fused.unflatten(2, (-1, n)).unflatten(1, (-1, n)).mean((2, 4)).flatten(1, 2)
        return plain[:, 0] + pooled

    def _enhanced(self, pieces: Tensor, others: Tensor) -> Tensor:
        """(images, n², patches, width): each piece, having read the other map's at the same place."""
        own, other = pieces.flatten(0, 1), others.flatten(0, 1)
        read: Tensor = self.norm(self.attention(own, other, other) + own)
        return read.view_as(pieces)


# ---- pieces (B, n², rows * columns, D) and maps (B, n * rows, n * columns, D)


def from_blocks(pieces: Tensor, grid: Grid) -> Tensor:
    """The map of which these are the blocks, row after row."""
    n = math.isqrt(pieces.shape[1])
    apart = pieces.unflatten(2, grid).unflatten(1, (n, n))  # block's row and column, row and column in it
    return apart.permute(0, 1, 3, 2, 4, 5).flatten(3, 4).flatten(1, 2)


def from_strides(pieces: Tensor, grid: Grid) -> Tensor:
    """The map of which these are every n-th row and column, by the first row and column of each."""
    n = math.isqrt(pieces.shape[1])
    apart = pieces.unflatten(2, grid).unflatten(1, (n, n))  # first row and column, row and column of those taken
    return apart.permute(0, 3, 1, 4, 2, 5).flatten(3, 4).flatten(1, 2)


def to_blocks(whole: Tensor, n: int) -> Tensor:
    """The inverse of `from_blocks`."""
    apart = whole.unflatten(2, (n, -1)).unflatten(1, (n, -1))
    return apart.permute(0, 1, 3, 2, 4, 5).flatten(3, 4).flatten(1, 2)


def to_strides(whole: Tensor, n: int) -> Tensor:
    """The inverse of `from_strides`."""
    apart = whole.unflatten(2, (-1, n)).unflatten(1, (-1, n))
    return apart.permute(0, 2, 4, 1, 3, 5).flatten(3, 4).flatten(1, 2)
