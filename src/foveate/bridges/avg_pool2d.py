"""Average pooling of neighbouring patches, then LLaVA's MLP: the parameter-free compressor of Yao et al., "DeCo", arXiv 2405.20985.

DeCo pools adaptively to a wanted number of tokens; here the pooling window is given and has to divide the grid, so that every token stands
for the same number of patches.
"""

from typing import Any, ClassVar

from torch import Tensor

from foveate.bridges.base import Bridge, positive
from foveate.bridges.mlp import MLP
from foveate.bridges.windows import Box, Grid, window_boxes, window_grid, window_partition


class AvgPool2d(Bridge):
    """One token per `pool` x `pool` patches: the MLP of their mean."""

    kind: ClassVar[str] = "avg_pool2d"

    def __init__(self, *, pool: int = 2, levels: int = 1, vision_width: int = 1024, text_width: int = 4096) -> None:
        super().__init__(levels=levels, vision_width=vision_width, text_width=text_width)
        self.pool = positive("pool", pool)
        self.mlp = MLP(levels=levels, vision_width=vision_width, text_width=text_width)

    def tokens(self, grid: Grid) -> int:
        return self.mlp.tokens(window_grid(grid, self.pool, "pool"))

    def boxes(self, grid: Grid) -> list[Box]:
        window_grid(grid, self.pool, "pool")
        return window_boxes(grid, self.pool)

    def flops(self, grid: Grid) -> int:
        return self.mlp.flops(window_grid(grid, self.pool, "pool"))

    def config(self) -> dict[str, Any]:
        return {**super().config(), "pool": self.pool}

    def forward(self, features: list[Tensor], grid: Grid) -> Tensor:
        self.check(features, grid)
        pooled = [window_partition(x, grid, self.pool).mean(dim=1).unflatten(0, (x.shape[0], -1)) for x in features]
        return self.mlp(pooled, window_grid(grid, self.pool))
