"""LDPv2: the lightweight bridge of MobileVLM V2. Chu et al., arXiv 2402.03766.

    z = adaptive mean over side x side windows of MLP(x)        tokens = z + depthwise 3 x 3 convolution of z, zeros around the map

The MLP goes over all patches first, as in the authors' code: its cost is that of LLaVA's bridge. The convolution lets each token see its
neighbours, and its zero border lets it know where the map ends. The first version (LDP, arXiv 2312.16886) has two inverted residual blocks
in the place of the mean and the convolution.
"""

from typing import Any, ClassVar

from torch import Tensor, nn

from foveate.bridges.base import Bridge, positive
from foveate.bridges.mlp import MLP
from foveate.bridges.windows import Box, Grid, adaptive_boxes, adaptive_pool


class LDPv2(Bridge):
    """`side` x `side` tokens of any grid that has as many rows and columns. A token also sees the windows around its own."""

    kind: ClassVar[str] = "ldpv2"

    def __init__(self, *, side: int = 12, levels: int = 1, vision_width: int = 1024, text_width: int = 4096) -> None:
        super().__init__(levels=levels, vision_width=vision_width, text_width=text_width)
        self.side = positive("side", side)
        self.mlp = MLP(levels=levels, vision_width=vision_width, text_width=text_width)
        self.around = nn.Conv2d(text_width, text_width, 3, padding=1, groups=text_width)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.around.reset_parameters()

    def tokens(self, grid: Grid) -> int:
        return len(self.boxes(grid))

    def boxes(self, grid: Grid) -> list[Box]:
        return adaptive_boxes(grid, self.side)

    def flops(self, grid: Grid) -> int:
        return self.mlp.flops(grid) + 2 * 9 * self.tokens(grid) * self.text_width

    def config(self) -> dict[str, Any]:
        return {**super().config(), "side": self.side}

    def forward(self, features: list[Tensor], grid: Grid) -> Tensor:
        self.check(features, grid)
        z = adaptive_pool(self.mlp(features, grid).transpose(1, 2).unflatten(2, grid), self.side)
        return (z + self.around(z)).flatten(2).transpose(1, 2)
