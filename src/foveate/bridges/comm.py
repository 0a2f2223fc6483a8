"""COMM: a learned sum of several levels of each vision tower, and the towers side by side. Jiang et al., arXiv 2310.08825.

    v_t = sum over levels i of a_i * Linear_i(LN_i(x_ti))        a_i: learned, one number a level
    tokens = Linear([v_1 ; MLP_2(v_2) ; …])                      by channels; as many tokens as patches

The paper's towers are CLIP (all 24 levels) and DINOv2 (the last 6 of 24), the MLP has two layers and widens 4 to 8 times. With one tower it
is the paper's "multi-level" row, the larger part of what it gains. The released repository holds no model code; settled here: each level
has a norm and a linear map of its own, the numbers a_i begin equal with a sum of 1 and are not held to it, all `channels` are as many as
the first tower's width, and the MLP's activation is GELU.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from foveate.bridges.base import Bridge, positive
from foveate.bridges.towers import Towers, read_towers, split
from foveate.bridges.windows import Box, Grid, window_boxes, window_grid


class COMM(Bridge):
    """One token per patch, for any grid. `towers`: [levels, width] of each, what the backbones have; `ratio`: how much the MLPs widen."""

    kind: ClassVar[str] = "comm"

    def __init__(
        self,
        *,
        towers: Towers | None = None,
        channels: int | None = None,
        ratio: int = 4,
        levels: int = 1,
        vision_width: int = 1024,
        text_width: int = 4096,
    ) -> None:
        super().__init__(levels=levels, vision_width=vision_width, text_width=text_width)
        self.towers = read_towers(self.kind, towers, levels, vision_width)
        self.channels = positive("channels", self.towers[0][1] if channels is None else channels)
        self.ratio = positive("ratio", ratio)
        each, inner = self.channels, self.ratio * self.channels
        self.norms = nn.ModuleList(nn.ModuleList(nn.LayerNorm(width) for _ in range(count)) for count, width in self.towers)
        self.maps = nn.ModuleList(nn.ModuleList(nn.Linear(width, each) for _ in range(count)) for count, width in self.towers)
        self.weights = nn.ParameterList(torch.full((count,), 1 / count) for count, _ in self.towers)
        self.mlps = nn.ModuleList(nn.Sequential(nn.Linear(each, inner), nn.GELU(), nn.Linear(inner, each)) for _ in self.towers[1:])
        self.proj = nn.Linear(len(self.towers) * each, text_width)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for weight in self.weights:
            nn.init.constant_(weight, 1 / len(weight))

    def tokens(self, grid: Grid) -> int:
        rows, columns = window_grid(grid, 1)
        return rows * columns

    def boxes(self, grid: Grid) -> list[Box]:
        return window_boxes(grid, 1)

    def flops(self, grid: Grid) -> int:
        matrices = [part.weight.numel() for part in self.modules() if isinstance(part, nn.Linear)]
        return 2 * self.tokens(grid) * sum(matrices)

    def config(self) -> dict[str, Any]:
        return {**super().config(), "towers": self.towers, "channels": self.channels, "ratio": self.ratio}

    def forward(self, features: list[Tensor], grid: Grid) -> Tensor:
        self.check(features, grid)
        found: list[Tensor] = []
        for tower, own in enumerate(split(features, self.towers)):
            norms: Any = self.norms[tower]
            maps: Any = self.maps[tower]
            weights: Any = self.weights[tower]
            parts = zip(weights, maps, norms, own, strict=True)
            merged = torch.stack([weight * linear(norm(x)) for weight, linear, norm, x in parts]).sum(0)
            found.append(merged if tower == 0 else self.mlps[tower - 1](merged))
        mixed: Tensor = self.proj(torch.cat(found, dim=-1))
        return mixed
