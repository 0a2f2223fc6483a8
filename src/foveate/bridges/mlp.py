"""LLaVA-1.5's bridge: each patch through Linear, GELU, Linear.

Liu et al., "Improved Baselines with Visual Instruction Tuning", arXiv 2310.03744. Several feature levels are concatenated channel-wise.

`norm` is ours: a LayerNorm of each level in front, as InternVL's projector has one, for levels that differ in scale (those of a
convolutional network by eight times).

`places` is ours too: each token is told where it is, by a linear map (zero at first) of sines and cosines of its centre, in shares of the
image, so that it holds for any grid. A tower of convolutions sees the same thing alike everywhere, and a language model that counts through
a row of tokens does not learn soon what is on top and what is left. Without the two this is LLaVA's to the bit.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.bridges.base import Bridge
from foveate.bridges.windows import WAVES, Box, Grid, waves, window_boxes, window_grid
from foveate.errors import FoveateError


class MLP(Bridge):
    """One token per patch, for any grid. norm: normalise each level first; several towers' come as one (`comm` tells them apart).
    places: tell each token where it is."""

    kind: ClassVar[str] = "mlp"

    def __init__(
        self, *, norm: bool = False, places: bool = False, levels: int = 1, vision_width: int = 1024, text_width: int = 4096
    ) -> None:
        super().__init__(levels=levels, vision_width=vision_width, text_width=text_width)
        for name, value in (("norm", norm), ("places", places)):
            if not isinstance(value, bool):
                raise FoveateError(f"{name} must be true or false, got {value!r}")
        self.norms = nn.ModuleList(nn.LayerNorm(vision_width) for _ in range(levels if norm else 0))
        self.linear_1 = nn.Linear(levels * vision_width, text_width)
        self.linear_2 = nn.Linear(text_width, text_width)
        self.place = nn.Linear(4 * WAVES, text_width, bias=False) if places else None
        self._zero()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self._zero()

    def _zero(self) -> None:
        if self.place is not None:
            nn.init.zeros_(self.place.weight)

    def tokens(self, grid: Grid) -> int:
        rows, columns = window_grid(grid, 1)
        return rows * columns

    def boxes(self, grid: Grid) -> list[Box]:
        return window_boxes(grid, 1)

    def flops(self, grid: Grid) -> int:
        maps = [self.linear_1, self.linear_2, *([] if self.place is None else [self.place])]
        return 2 * self.tokens(grid) * sum(part.weight.numel() for part in maps)

    def forward(self, features: list[Tensor], grid: Grid) -> Tensor:
        self.check(features, grid)
        if self.norms:
            features = [norm(level) for norm, level in zip(self.norms, features, strict=True)]
        tokens: Tensor = self.linear_2(F.gelu(self.linear_1(torch.cat(features, dim=-1))))
        return tokens if self.place is None else tokens + self.place(waves(grid, tokens).expand(len(tokens), -1, -1))

    def config(self) -> dict[str, Any]:
        return super().config() | {"norm": len(self.norms) > 0, "places": self.place is not None}
