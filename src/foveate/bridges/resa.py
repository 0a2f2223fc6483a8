"""ReSA: resample, then rearrange. The bridge of TextHawk (arXiv 2404.09204) and TextHawk2 (arXiv 2410.05261), Yu et al.: 256 -> 64 -> 16.

    queries     maximum over 2 x 2 patches of MLP(x), then a linear map, x the deepest level: they depend on the image
    resample    layers of attention among the queries (not in the first), attention to the patches of one level, MLP
    rearrange   2 x 2 neighbouring queries side by side by channels, then a linear map to the language model's width

Sines and cosines of their places are added to the patches, learned places to the queries, so that a bridge is made for one square grid.
`reads` says which level each layer attends to, 0 the shallowest; TextHawk's, of four levels, is READS.

The authors have published no code. From the text of TextHawk: layers, `reads`, the width (the tower's), the hidden width (four times) and
the order of the parts. Our own choices, which it does not settle: norms in front of each part, the residual maps and initial weights of
`cross_attention.py`, and neighbours in a square (the paper says reading order, which may also mean four in a row). TextHawk2 says nothing
else of its bridge that could be checked. Left out: the scalable positions of cells, which belong to a tiling of theirs, and the detection
head.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from foveate.bridges.base import Bridge, positive
from foveate.bridges.cross_attention import CrossAttentionBlock, attention, multiply_adds, reset_parameters
from foveate.bridges.windows import Box, Grid, sines, square_only, window_boxes, window_grid, window_partition
from foveate.errors import FoveateError

READS = (3, 3, 3, 2, 2, 2, 1, 0)


class ReSA(Bridge):
    """One token per 4 x 4 patches of a square grid of `grid` x `grid`; every token has seen all patches."""

    kind: ClassVar[str] = "resa"

    def __init__(
        self,
        *,
        grid: int = 16,
        reads: Sequence[int] | None = None,
        levels: int = 4,
        vision_width: int = 1152,
        text_width: int = 4096,
        head_dim: int = 72,
    ) -> None:
        super().__init__(levels=levels, vision_width=vision_width, text_width=text_width)
        self.grid, self.head_dim = positive("grid", grid), positive("head_dim", head_dim)
        even = [levels - 1 - layer * levels // len(READS) for layer in range(len(READS))]
        self.reads = list(reads) if reads is not None else list(READS) if levels == 4 else even
        if not self.reads or not all(0 <= level < levels for level in self.reads):
            raise FoveateError(f"reads {self.reads} must name for each layer one of the {levels} levels, 0 to {levels - 1}")
        width, (rows, columns) = vision_width, window_grid((grid, grid), 4, "a block of patches of side")
        self.propose = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.to_query = nn.Linear(width, width)
        self.places = nn.Parameter(torch.empty(4 * rows * columns, width))
        self.blocks = nn.ModuleList(CrossAttentionBlock(width, width, head_dim) for _ in self.reads)
        self.among = nn.ModuleList(SelfAttention(width, head_dim) for _ in self.reads[1:])
        self.norm = nn.LayerNorm(4 * width)
        self.proj = nn.Linear(4 * width, text_width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        reset_parameters(self)
        nn.init.trunc_normal_(self.places, std=0.02)

    def tokens(self, grid: Grid) -> int:
        square_only(self.kind, self.grid, grid)
        return (self.grid // 4) ** 2

    def boxes(self, grid: Grid) -> list[Box]:
        square_only(self.kind, self.grid, grid)
        return window_boxes(grid, 4)

    def flops(self, grid: Grid) -> int:
        width, tokens = self.vision_width, self.tokens(grid)
        patches, queries = self.grid**2, 4 * tokens
        proposing = 8 * patches * width**2 + queries * width**2
        reading = len(self.reads) * multiply_adds(1, patches, queries, 1, width, width)
        among = (len(self.reads) - 1) * (4 * queries * width**2 + 2 * queries**2 * width)
        return 2 * (proposing + reading + among + tokens * 4 * width * self.text_width)

    def config(self) -> dict[str, Any]:
        return {**super().config(), "grid": self.grid, "reads": self.reads, "head_dim": self.head_dim}

    def forward(self, features: list[Tensor], grid: Grid) -> Tensor:
        self.check(features, grid)
        images, half = features[0].shape[0], (grid[0] // 2, grid[1] // 2)
        most = window_partition(self.propose(features[-1]), grid, 2).amax(1).unflatten(0, (images, -1))
        q = self.to_query(most) + self.places
        place = sines(grid, self.vision_width).to(features[0].device, features[0].dtype)
        for layer, (block, level) in enumerate(zip(self.blocks, self.reads, strict=True)):
            q = block(self.among[layer - 1](q) if layer else q, features[level] + place)
        deep = window_partition(q, half, 2).flatten(1).unflatten(0, (images, -1))
        return self.proj(self.norm(deep))


class SelfAttention(nn.Module):
    """q + Attention(q): norm in front, no mask, no bias in front of the softmax."""

    def __init__(self, width: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.norm = nn.LayerNorm(width)
        self.to_qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, q: Tensor) -> Tensor:
        """(N, queries, width) -> the same."""
        query, key, value = self.to_qkv(self.norm(q)).unflatten(-1, (3, -1, self.head_dim)).permute(2, 0, 3, 1, 4)
        return q + self.proj(attention(query, key, value).transpose(1, 2).flatten(2))
