"""Space to depth, then LayerNorm and MLP: the bridge of InternVL 1.5 (Chen et al., arXiv 2404.16821).

Neighbouring `ratio` x `ratio` patches become one token with `ratio`² times the channels, patch by patch in raster order, which is what the
views and transposes in the code of InternVL and Idefics3 (Laurençon et al., arXiv 2408.12637) amount to. After it Idefics3 has one Linear
without bias; here, as in InternVL, come LayerNorm, Linear, GELU, Linear.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from foveate.bridges.base import Bridge, positive
from foveate.bridges.mlp import MLP
from foveate.bridges.windows import Box, Grid, window_boxes, window_grid, window_partition


class PixelShuffle(Bridge):
    """One token per `ratio` x `ratio` patches: the MLP of their concatenation."""

    kind: ClassVar[str] = "pixel_shuffle"

    def __init__(self, *, ratio: int = 2, levels: int = 1, vision_width: int = 1024, text_width: int = 4096) -> None:
        super().__init__(levels=levels, vision_width=vision_width, text_width=text_width)
        self.ratio = positive("ratio", ratio)
        width = ratio * ratio * levels * vision_width
        self.norm = nn.LayerNorm(width)
        self.mlp = MLP(vision_width=width, text_width=text_width)

    def tokens(self, grid: Grid) -> int:
        return self.mlp.tokens(window_grid(grid, self.ratio, "ratio"))

    def boxes(self, grid: Grid) -> list[Box]:
        window_grid(grid, self.ratio, "ratio")
        return window_boxes(grid, self.ratio)

    def flops(self, grid: Grid) -> int:
        return self.mlp.flops(window_grid(grid, self.ratio, "ratio"))

    def config(self) -> dict[str, Any]:
        return {**super().config(), "ratio": self.ratio}

    def forward(self, features: list[Tensor], grid: Grid) -> Tensor:
        self.check(features, grid)
        images = features[0].shape[0]
        deep = window_partition(torch.cat(features, dim=-1), grid, self.ratio).flatten(1).unflatten(0, (images, -1))
        return self.mlp([self.norm(deep)], window_grid(grid, self.ratio))
