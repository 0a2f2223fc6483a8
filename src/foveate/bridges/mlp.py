"""LLaVA-1.5's bridge: each patch through Linear, GELU, Linear.

Liu et al., "Improved Baselines with Visual Instruction Tuning", arXiv 2310.03744. Several feature levels are concatenated channel-wise.

`norm` is ours: a LayerNorm of each level in front, as InternVL's projector has one, for levels that differ in scale (those of a
convolutional network by eight times). Without it this is LLaVA's to the bit.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.bridges.base import Bridge
from foveate.bridges.windows import Box, Grid, window_boxes, window_grid
from foveate.errors import FoveateError


class MLP(Bridge):
    """One token per patch, for any grid. norm: normalise each level first; several towers' come as one (`comm` tells them apart)."""

    kind: ClassVar[str] = "mlp"

    def __init__(self, *, norm: bool = False, levels: int = 1, vision_width: int = 1024, text_width: int = 4096) -> None:
        super().__init__(levels=levels, vision_width=vision_width, text_width=text_width)
        if not isinstance(norm, bool):
            raise FoveateError(f"norm must be true or false, got {norm!r}")
        self.norms = nn.ModuleList(nn.LayerNorm(vision_width) for _ in range(levels if norm else 0))
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
        if self.norms:
            features = [norm(level) for norm, level in zip(self.norms, features, strict=True)]
        return self.linear_2(F.gelu(self.linear_1(torch.cat(features, dim=-1))))

    def config(self) -> dict[str, Any]:
        return super().config() | {"norm": len(self.norms) > 0}
