"""MG-LLaVA's conv-gate: a tower that sees the image small, and what one that sees it large adds, patch by patch. Zhao et al.,
arXiv 2406.17770.

    high = Linear2(GELU(Linear1(high)))                          to the low tower's width; Linear2 begins at zero
    low  = low + Linear(GELU(depthwise 7 x 7 convolution(low)))  which begins at zero
    gate = tanh(MLP(mean over tokens of [low ; high]))           one number an image
    tokens = LLaVA's MLP(low + gate * high)

So it begins as LLaVA with the low tower alone, to the last bit. Both towers have to give the same grid (CLIP-L at 336 and ConvNeXt-L at 768
pixels: 24 x 24). As in the released code; settled here, since only its outline is known to us: Linear1 already makes the low tower's width,
and the gate's MLP has one inner layer of it with GELU. Several levels of a tower are concatenated. Not here: the paper's objects, a token
for each box that a detector finds.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.bridges.base import Bridge
from foveate.bridges.mlp import MLP
from foveate.bridges.towers import Towers, read_towers, split
from foveate.bridges.windows import Box, Grid
from foveate.errors import FoveateError


class MGGate(Bridge):
    """One token per patch, for any grid. `towers`: [levels, width] of the low and of the high one, what the backbones have."""

    kind: ClassVar[str] = "mg_gate"

    def __init__(self, *, towers: Towers | None = None, levels: int = 1, vision_width: int = 1024, text_width: int = 4096) -> None:
        super().__init__(levels=levels, vision_width=vision_width, text_width=text_width)
        self.towers = read_towers(self.kind, towers, levels, vision_width)
        if len(self.towers) != 2:
            raise FoveateError(
                f"a mg_gate bridge joins two towers, the low one first, and there are {len(self.towers)}: give vision=[low, high]"
            )
        low, high = (count * width for count, width in self.towers)
        self.high_1, self.high_2 = nn.Linear(high, low), nn.Linear(low, low)
        self.around = nn.Conv2d(low, low, 7, padding=3, groups=low)
        self.low = nn.Linear(low, low)
        self.gate_1, self.gate_2 = nn.Linear(2 * low, low), nn.Linear(low, 1)
        self.mlp = MLP(levels=1, vision_width=low, text_width=text_width)
        self._zero()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.around.reset_parameters()
        self._zero()

    def _zero(self) -> None:
        for part in (self.high_2, self.low):
            nn.init.zeros_(part.weight)
            nn.init.zeros_(part.bias)

    def tokens(self, grid: Grid) -> int:
        return self.mlp.tokens(grid)

    def boxes(self, grid: Grid) -> list[Box]:
        return self.mlp.boxes(grid)

    def flops(self, grid: Grid) -> int:
        each = [part.weight.numel() for part in (self.high_1, self.high_2, self.around, self.low)]
        once = self.gate_1.weight.numel() + self.gate_2.weight.numel()
        return 2 * (self.tokens(grid) * sum(each) + once) + self.mlp.flops(grid)

    def config(self) -> dict[str, Any]:
        return {**super().config(), "towers": self.towers}

    def forward(self, features: list[Tensor], grid: Grid) -> Tensor:
        self.check(features, grid)
        low, high = (torch.cat(own, dim=-1) for own in split(features, self.towers))
        high = self.high_2(F.gelu(self.high_1(high)))
        around = self.around(low.transpose(1, 2).unflatten(2, grid)).flatten(2).transpose(1, 2)
        low = low + self.low(F.gelu(around))
        gate = self.gate_2(F.gelu(self.gate_1(torch.cat([low, high], dim=-1).mean(1, keepdim=True)))).tanh()
        tokens: Tensor = self.mlp([low + gate * high], grid)
        return tokens
