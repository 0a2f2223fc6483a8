"""Wide windows: queries of a window that also read what lies around it, at a cost that does not depend on how far they look.

The idea is that of varying window attention in VWFormer (Yan et al., ICLR 2024, arXiv 2404.16573): queries of a small window attend to a
larger one around it, made as small as their own before. There it is a decoder for segmentation. This bridge and its details are our own,
written from that idea as we know it and not from the paper's text: its rule for making the area small is not followed.

    windows of window x window patches, each with `queries` learned queries of its own, as in `chain_of_sight.py`
    for each ratio r: the area of r times the window's side around it, as means of r x r patches: window² keys again

The queries read the ratios' keys one after the other, the widest first, each by a block of its own. Around the map there are no patches:
windows at its edge take the area that is nearest and lies inside. r = 1 is the window itself.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.bridges.base import Bridge, positive
from foveate.bridges.cross_attention import WindowResampler, multiply_adds, reset_parameters
from foveate.bridges.windows import Box, Grid, square_only, window_boxes, window_grid
from foveate.errors import FoveateError


class WideWindows(Bridge):
    """`queries` tokens per window of a square grid of `grid` x `grid` patches; `ratios` from the widest to the window itself."""

    kind: ClassVar[str] = "wide_windows"

    def __init__(
        self,
        *,
        window: int = 2,
        queries: int = 1,
        ratios: Sequence[int] = (4, 2, 1),
        grid: int = 24,
        levels: int = 1,
        vision_width: int = 1024,
        width: int = 1024,
        text_width: int = 4096,
        head_dim: int = 64,
    ) -> None:
        super().__init__(levels=levels, vision_width=vision_width, text_width=text_width)
        self.window, self.queries, self.grid = positive("window", window), positive("queries", queries), positive("grid", grid)
        self.width, self.head_dim = positive("width", width), positive("head_dim", head_dim)
        self.ratios = [positive("ratios", ratio) for ratio in ratios]
        windows, _ = window_grid((grid, grid), window)
        if not self.ratios or self.ratios != sorted(set(self.ratios), reverse=True) or self.ratios[0] * window > grid:
            raise FoveateError(
                f"ratios {list(ratios)} must go from the widest to the narrowest, and {window} patches times each fit into a grid of {grid}"
            )
        self.resampler = WindowResampler(windows**2, queries, len(self.ratios), width, levels * vision_width, head_dim)
        self.norm = nn.LayerNorm(width)
        self.proj = nn.Linear(width, text_width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        reset_parameters(self)

    def tokens(self, grid: Grid) -> int:
        return len(self.boxes(grid))

    def boxes(self, grid: Grid) -> list[Box]:
        square_only(self.kind, self.grid, grid)
        return [box for box in window_boxes(grid, self.window) for _ in range(self.queries)]

    def flops(self, grid: Grid) -> int:
        tokens, read = self.tokens(grid), self.levels * self.vision_width
        reading = multiply_adds(tokens // self.queries, self.window**2, self.queries, len(self.ratios), self.width, read)
        return 2 * (reading + tokens * self.width * self.text_width)

    def config(self) -> dict[str, Any]:
        own = {"window": self.window, "queries": self.queries, "ratios": self.ratios, "grid": self.grid}
        return {**super().config(), **own, "width": self.width, "head_dim": self.head_dim}

    def forward(self, features: list[Tensor], grid: Grid) -> Tensor:
        self.check(features, grid)
        whole = torch.cat(features, dim=-1).transpose(1, 2).unflatten(2, grid)
        contexts = [around(whole, self.window, ratio) for ratio in self.ratios]
        return self.proj(self.norm(self.resampler(contexts)))


def around(x: Tensor, window: int, ratio: int) -> Tensor:
    """(N, C, side, side) -> (N * windows, window², C): for each window the area of `ratio` times its side around it, as means."""
    side, wide = x.shape[-1], window * ratio
    starts = [min(max(at + (window - wide) // 2, 0), side - wide) for at in range(0, side, window)]
    means = F.avg_pool2d(x, ratio, stride=1)  # of the r x r patches from each place on
    at = (torch.tensor(starts, device=x.device)[:, None] + torch.arange(0, wide, ratio, device=x.device)).flatten()
    picked = means[:, :, at][:, :, :, at].unflatten(3, (-1, window)).unflatten(2, (-1, window))  # (N, C, down, window, across, window)
    return picked.permute(0, 2, 4, 3, 5, 1).reshape(-1, window**2, x.shape[1])
