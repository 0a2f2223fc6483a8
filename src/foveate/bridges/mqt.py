"""MQT: a Matryoshka query transformer, whose first m learned queries are a bridge of m tokens. Hu et al., NeurIPS 2024, arXiv 2405.19315.

One layer of cross-attention, without MLP, residual or attention among the queries, so that no token depends on how many there are:

    q = LN(Q[:m] + P)    k = LN(P')    v = LN(X)    tokens = MHA(q, k, v) · W       Q: (queries, width), learned

P holds fixed 2-D sines and cosines of a square raster, one place a query, P' the same resized to the grid of patches. As released (and in
`keys="position"`, the default) the keys are those places alone: the attention is the same for every image, and the bridge is one learned
linear map of the normalised patches. The paper describes attention to the features: `keys="features"` has k = LN(X) + P'.

In training one m is drawn for a step (a stage's `view_tokens`), of any m; the authors draw even ones, in fine-tuning alone, and each
process for itself. Differences from the authors' code: several levels are concatenated, a linear map without bias takes them to another
width where there is one (as in Qwen-VL's adapter, arXiv 2308.12966, from which the layer comes), the places are computed in float32 and
not stored, and the biases of keys, which no softmax sees, are left out.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.bridges.base import ElasticBridge, positive
from foveate.bridges.cross_attention import attention, check_heads
from foveate.bridges.windows import Box, Grid, sines, window_grid
from foveate.errors import FoveateError

KEYS = ("position", "features")


class MQT(ElasticBridge):
    """Any number of tokens from 1 to `queries`, a square number, for any grid."""

    kind: ClassVar[str] = "mqt"

    def __init__(
        self,
        *,
        queries: int = 256,
        keys: str = "position",
        levels: int = 1,
        vision_width: int = 1024,
        width: int = 1024,
        text_width: int = 4096,
        head_dim: int = 64,
    ) -> None:
        super().__init__(levels=levels, vision_width=vision_width, text_width=text_width)
        self.queries, self.width, self.head_dim = positive("queries", queries), positive("width", width), positive("head_dim", head_dim)
        self.keys, self.side = keys, round(queries**0.5)
        if self.side**2 != queries:
            raise FoveateError(
                f"queries stand in a square raster, and {queries} is no square: take {self.side**2} or {(self.side + 1) ** 2}"
            )
        if keys not in KEYS:
            raise FoveateError(f"keys are of {' or '.join(KEYS)}, not {keys!r}")
        check_heads(width, head_dim)
        sines((self.side, self.side), width)
        self.query = nn.Parameter(torch.empty(queries, width))
        read = levels * vision_width
        self.to_width = nn.Identity() if read == width else nn.Linear(read, width, bias=False)
        self.norm_query, self.norm_value = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.norm_key = nn.LayerNorm(width, eps=1e-6, bias=False)
        self.to_q, self.to_k, self.to_v = nn.Linear(width, width), nn.Linear(width, width, bias=False), nn.Linear(width, width)
        self.mix = nn.Linear(width, width)
        self.proj = nn.Linear(width, text_width, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.trunc_normal_(part.weight, std=0.02)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)
            elif isinstance(part, nn.LayerNorm):
                part.reset_parameters()
        for matrix in (self.to_q.weight, self.to_k.weight, self.to_v.weight):  # torch's own, of one matrix for all three
            nn.init.uniform_(matrix, -((1.5 / self.width) ** 0.5), (1.5 / self.width) ** 0.5)
        nn.init.trunc_normal_(self.query, std=0.02)
        nn.init.normal_(self.proj.weight, std=self.text_width**-0.5)

    def tokens(self, grid: Grid) -> int:
        return self.budgets(grid)[-1]

    def budgets(self, grid: Grid) -> Sequence[int]:
        window_grid(grid, 1)
        return range(1, self.queries + 1)

    def boxes(self, grid: Grid) -> list[Box]:
        rows, columns = window_grid(grid, 1)
        return [(0, 0, rows, columns)] * self.queries

    def flops(self, grid: Grid, budget: int | None = None) -> int:
        m, patches, width = self.within(grid, budget), grid[0] * grid[1], self.width
        entering = 0 if isinstance(self.to_width, nn.Identity) else patches * self.levels * self.vision_width * width
        return 2 * (entering + 2 * (m + patches) * width**2 + 2 * m * patches * width + m * width * self.text_width)

    def config(self) -> dict[str, Any]:
        return {**super().config(), "queries": self.queries, "keys": self.keys, "width": self.width, "head_dim": self.head_dim}

    def forward(self, features: list[Tensor], grid: Grid, budget: int | None = None) -> Tensor:
        self.check(features, grid)
        m, x = self.within(grid, budget), self.to_width(torch.cat(features, dim=-1))
        place = sines((self.side, self.side), self.width).to(x.device)
        cells = place.T.view(1, self.width, self.side, self.side)
        beside = F.interpolate(cells, size=grid, mode="bicubic").flatten(2).transpose(1, 2).to(x.dtype)  # (1, patches, width)
        key = self.norm_key(beside) if self.keys == "position" else self.norm_key(x) + beside
        query = self._heads(self.to_q(self.norm_query(self.query[:m] + place[:m].to(x.dtype)))[None]).expand(len(x), -1, -1, -1)
        key, value = self._heads(self.to_k(key)).expand(len(x), -1, -1, -1), self._heads(self.to_v(self.norm_value(x)))
        return self.proj(self.mix(attention(query, key, value).transpose(1, 2).flatten(2)))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
