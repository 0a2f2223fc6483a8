"""LLaVA-1.5's bridge: each patch through Linear, GELU, Linear.

Liu et al., "Improved Baselines with Visual Instruction Tuning", arXiv 2310.03744. Several feature levels are concatenated channel-wise.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.bridges.base import Bridge
from foveate.bridges.windows import Box, Grid, window_boxes, window_grid


class MLP(Bridge):
    """One token per patch, for any grid."""

    kind: ClassVar[str] = "mlp"

    def __init__(self, *, levels: int = 1, vision_width: int = 1024, text_width: int = 4096) -> None:
        super().__init__(levels=levels, vision_width=vision_width, text_width=text_width)
        self.linear_1 = nn.Linear(levels * vision_width, text_width)
        self.linear_2 = nn.Linear(text_width, text_width)

    def tokens(self, grid: Grid) -> int:
        rows, columns = window_grid(grid, 1)
        return rows * columns

    def boxes(self, grid: Grid) -> list[Box]:
        return window_boxes(grid, 1)

    def flops(self, grid: Grid) -> int:
        return 2 * self.tokens(grid) * (self.linear_1.weight.numel() + self.linear_2.weight.numel())

    def forward(self, features: list[Tensor], grid: Grid) -> Tensor:
        self.check(features, grid)
        return self.linear_2(F.gelu(self.linear_1(torch.cat(features, dim=-1))))
