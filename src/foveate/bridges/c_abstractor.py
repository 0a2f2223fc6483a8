"""The C-Abstractor of Honeybee: convolutions, a mean, convolutions. Cha et al., CVPR 2024, arXiv 2312.06742.

    x + learned places -> `depth` bottlenecks -> adaptive mean to side x side -> `depth` bottlenecks -> Linear, SiLU, Linear

A bottleneck is RegNet's (arXiv 2003.13678), with layer norms over the channels and SiLU in the place of batch norms and ReLU: 1 x 1, 3 x 3
and 1 x 1 convolutions with squeeze and excitation between the last two, added to its input (behind a 1 x 1 convolution where the width
changes), and SiLU. Squeeze and excitation sees the whole map, so that every token has seen all patches. The number of tokens is a square.

The authors take the bottleneck from timm, by whose defaults the 3 x 3 convolution goes channel by channel and the excitation is a quarter
as wide as what comes in; that they leave both at that is our reading. The learned place of each patch binds a bridge to one grid. Several
levels are concatenated, which the paper does not have. Left out: the learned tokens that its code can put after an image.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.bridges.base import Bridge, positive
from foveate.bridges.windows import Box, Grid, adaptive_boxes, adaptive_pool, square_only


class CAbstractor(Bridge):
    """`side` x `side` tokens of a square grid of `grid` x `grid` patches."""

    kind: ClassVar[str] = "c_abstractor"

    def __init__(
        self,
        *,
        side: int = 12,
        depth: int = 3,
        grid: int = 24,
        levels: int = 1,
        vision_width: int = 1024,
        width: int = 1024,
        text_width: int = 4096,
    ) -> None:
        super().__init__(levels=levels, vision_width=vision_width, text_width=text_width)
        self.side, self.depth, self.grid, self.width = (
            *(positive("side", side), positive("depth", depth)),
            *(positive("grid", grid), positive("width", width)),
        )
        adaptive_boxes((grid, grid), side)
        read = levels * vision_width
        self.places = nn.Parameter(torch.empty(grid * grid, read))
        self.before = nn.Sequential(*(Bottleneck(width if layer else read, width) for layer in range(depth)))
        self.after = nn.Sequential(*(Bottleneck(width, width) for _ in range(depth)))
        self.linear_1 = nn.Linear(width, text_width)
        self.linear_2 = nn.Linear(text_width, text_width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for part in self.modules():
            if isinstance(part, nn.Conv2d):
                part.reset_parameters()
        nn.init.trunc_normal_(self.places, std=0.02)

    def tokens(self, grid: Grid) -> int:
        square_only(self.kind, self.grid, grid)
        return self.side**2

    def boxes(self, grid: Grid) -> list[Box]:
        square_only(self.kind, self.grid, grid)
        return adaptive_boxes(grid, self.side)

    def flops(self, grid: Grid) -> int:
        tokens = self.tokens(grid)
        convolving = sum(multiply_adds(part, self.grid**2) for part in self.before)
        convolving += sum(multiply_adds(part, tokens) for part in self.after)
        return 2 * (convolving + tokens * (self.linear_1.weight.numel() + self.linear_2.weight.numel()))

    def config(self) -> dict[str, Any]:
        return {**super().config(), "side": self.side, "depth": self.depth, "grid": self.grid, "width": self.width}

    def forward(self, features: list[Tensor], grid: Grid) -> Tensor:
        self.check(features, grid)
        x = (torch.cat(features, dim=-1) + self.places).transpose(1, 2).unflatten(2, grid)
        x = self.after(adaptive_pool(self.before(x), self.side)).flatten(2).transpose(1, 2)
        return self.linear_2(F.silu(self.linear_1(x)))


class Bottleneck(nn.Module):
    """RegNet's bottleneck with squeeze and excitation; see above."""

    def __init__(self, read: int, width: int) -> None:
        super().__init__()
        few = max(1, round(read / 4))
        self.enter, self.norm_enter = nn.Conv2d(read, width, 1, bias=False), nn.LayerNorm(width)
        self.around, self.norm_around = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False), nn.LayerNorm(width)
        self.squeeze, self.excite = nn.Conv2d(width, few, 1), nn.Conv2d(few, width, 1)
        self.leave, self.norm_leave = nn.Conv2d(width, width, 1, bias=False), nn.LayerNorm(width)
        same = read == width
        self.beside: nn.Module = nn.Identity() if same else nn.Conv2d(read, width, 1, bias=False)
        self.norm_beside: nn.Module = nn.Identity() if same else nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """(N, read, rows, columns) -> (N, width, rows, columns)."""
        y = F.silu(_norm(self.norm_enter, self.enter(x)))
        y = F.silu(_norm(self.norm_around, self.around(y)))
        y = y * self.excite(F.silu(self.squeeze(y.mean((2, 3), keepdim=True)))).sigmoid()
        y = _norm(self.norm_leave, self.leave(y))
        return F.silu(y + _norm(self.norm_beside, self.beside(x)))


def multiply_adds(bottleneck: nn.Module, places: int) -> int:
    """Of the convolutions over a map of so many places; those with a bias, of squeeze and excitation, see one alone."""
    convolutions = [part for part in bottleneck.modules() if isinstance(part, nn.Conv2d)]
    return sum(part.weight.numel() * (places if part.bias is None else 1) for part in convolutions)


def _norm(norm: nn.Module, x: Tensor) -> Tensor:
    """A norm over the channels of each place."""
    normed: Tensor = norm(x.movedim(1, -1))
    return normed.movedim(-1, 1)
