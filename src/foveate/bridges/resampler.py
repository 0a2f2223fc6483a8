"""A plain resampler: N learnable queries read the whole image. The baseline "Resampler" of Chain-of-Sight (Huang et al., arXiv 2407.15819).

In the family of Flamingo's Perceiver Resampler (arXiv 2204.14198) and Qwen-VL's adapter (arXiv 2308.12966), but the queries read only the
patches, not each other, and it knows no positions: it is `chain_of_sight` with one scale of one window, and so it takes any grid. The
paper's baseline reads two levels.
"""

from typing import Any, ClassVar

from torch import Tensor, nn

from foveate.bridges.base import Bridge, positive
from foveate.bridges.cross_attention import WindowResampler, multiply_adds, reset_parameters
from foveate.bridges.windows import Box, Grid, window_grid


class Resampler(Bridge):
    """`queries` tokens, whatever the grid; one block of cross-attention and MLP per feature level, in sequence."""

    kind: ClassVar[str] = "resampler"

    def __init__(
        self,
        *,
        queries: int,
        levels: int = 1,
        vision_width: int = 1024,
        width: int = 1024,
        text_width: int = 4096,
        head_dim: int = 64,
    ) -> None:
        super().__init__(levels=levels, vision_width=vision_width, text_width=text_width)
        self.queries, self.width, self.head_dim = positive("queries", queries), positive("width", width), positive("head_dim", head_dim)
        self.resampler = WindowResampler(1, queries, levels, width, vision_width, head_dim)
        self.norm = nn.LayerNorm(width)
        self.proj = nn.Linear(width, text_width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        reset_parameters(self)

    def tokens(self, grid: Grid) -> int:
        window_grid(grid, 1)
        return self.queries

    def boxes(self, grid: Grid) -> list[Box]:
        rows, columns = window_grid(grid, 1)
        return [(0, 0, rows, columns)] * self.queries

    def flops(self, grid: Grid) -> int:
        rows, columns = window_grid(grid, 1)
        attention = multiply_adds(1, rows * columns, self.queries, self.levels, self.width, self.vision_width)
        return 2 * (attention + self.queries * self.width * self.text_width)

    def config(self) -> dict[str, Any]:
        return {**super().config(), "queries": self.queries, "width": self.width, "head_dim": self.head_dim}

    def forward(self, features: list[Tensor], grid: Grid) -> Tensor:
        self.check(features, grid)
        return self.proj(self.norm(self.resampler(features)))
