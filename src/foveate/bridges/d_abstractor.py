"""The D-Abstractor of Honeybee: queries that look at a few points of the image each. Cha et al., CVPR 2024, arXiv 2312.06742.

    queries = adaptive mean of x to side x side + learned queries        x: features + learned places
    `depth` layers of attention among the queries, deformable attention to x, MLP, each followed by a norm
    Linear

Deformable attention (Deformable DETR, arXiv 2010.04159): every head of a query reads the map at POINTS places, its reference point and an
offset from it, bilinearly, and adds the values up by weights of a softmax; offsets and weights are linear in the query. Reference points
are learned for each query, from an even grid on. The number of tokens is a square.

From the card of the authors' code come the number of layers, what queries are made of and how reference points begin. Our reading, not
verified: the layer and its initial weights are those of Deformable DETR (MLP four times as wide as the state; offsets begin around the
reference point, each head in a direction of its own), at one scale, and one linear map leads to the language model. A learned place of each
patch binds a bridge to one grid. Several levels are concatenated.
"""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.bridges.base import Bridge, positive
from foveate.bridges.cross_attention import attention, check_heads
from foveate.bridges.windows import Box, Grid, adaptive_boxes, adaptive_pool, square_only

POINTS = 4


class DAbstractor(Bridge):
    """`side` x `side` tokens of a square grid of `grid` x `grid` patches; a token has seen all patches through the other queries."""

    kind: ClassVar[str] = "d_abstractor"

    def __init__(
        self,
        *,
        side: int = 12,
        depth: int = 6,
        grid: int = 24,
        levels: int = 1,
        vision_width: int = 1024,
        width: int = 1024,
        text_width: int = 4096,
        head_dim: int = 64,
    ) -> None:
        super().__init__(levels=levels, vision_width=vision_width, text_width=text_width)
        self.side, self.depth, self.grid = positive("side", side), positive("depth", depth), positive("grid", grid)
        self.width, self.head_dim = positive("width", width), positive("head_dim", head_dim)
        adaptive_boxes((grid, grid), side)
        check_heads(width, head_dim)
        self.places = nn.Parameter(torch.empty(grid * grid, levels * vision_width))
        self.enter = nn.Linear(levels * vision_width, width)
        self.queries = nn.Parameter(torch.empty(side * side, width))
        self.reference = nn.Parameter(torch.empty(side * side, 2))
        self.layers = nn.ModuleList(DeformableLayer(width, head_dim) for _ in range(depth))
        self.proj = nn.Linear(width, text_width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.trunc_normal_(self.places, std=0.02)
        nn.init.trunc_normal_(self.queries, std=0.02)
        at = (torch.arange(self.side, device=self.reference.device) + 0.5) / self.side
        with torch.no_grad():
            self.reference.copy_(torch.cartesian_prod(at, at).flip(-1).logit())  # (column, row) in shares of the map
        for layer in self.layers:
            assert isinstance(layer, DeformableLayer)
            layer.look_around()

    def tokens(self, grid: Grid) -> int:
        square_only(self.kind, self.grid, grid)
        return self.side**2

    def boxes(self, grid: Grid) -> list[Box]:
        square_only(self.kind, self.grid, grid)
        return adaptive_boxes(grid, self.side)

    def flops(self, grid: Grid) -> int:
        queries, patches, width, heads = self.tokens(grid), self.grid**2, self.width, self.width // self.head_dim
        among = 4 * queries * width**2 + 2 * queries**2 * width
        points = 3 * heads * POINTS * queries * width
        layer = among + points + patches * width**2 + queries * width**2 + 8 * queries * width**2
        return 2 * (patches * self.levels * self.vision_width * width + self.depth * layer + queries * width * self.text_width)

    def config(self) -> dict[str, Any]:
        own = {"side": self.side, "depth": self.depth, "grid": self.grid, "width": self.width, "head_dim": self.head_dim}
        return {**super().config(), **own}

    def forward(self, features: list[Tensor], grid: Grid) -> Tensor:
        self.check(features, grid)
        x = self.enter(torch.cat(features, dim=-1) + self.places)
        q = adaptive_pool(x.transpose(1, 2).unflatten(2, grid), self.side).flatten(2).transpose(1, 2) + self.queries
        for layer in self.layers:
            q = layer(q, x, grid, self.reference.sigmoid())
        return self.proj(q)


class DeformableLayer(nn.Module):
    """Attention among the queries, deformable attention to the map, MLP; a norm after each."""

    def __init__(self, width: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim, heads = head_dim, width // head_dim
        self.to_qkv, self.mix = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.offsets, self.weights = nn.Linear(width, 2 * heads * POINTS), nn.Linear(width, heads * POINTS)
        self.to_value, self.read = nn.Linear(width, width), nn.Linear(width, width)
        self.linear_1, self.linear_2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm_among, self.norm_read, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)

    def look_around(self) -> None:
        """The first points: one head after the other goes around the reference point, one step of a patch further with each point."""
        nn.init.zeros_(self.offsets.weight), nn.init.zeros_(self.weights.weight), nn.init.zeros_(self.weights.bias)
        heads, device = self.weights.out_features // POINTS, self.offsets.bias.device
        angle = torch.arange(heads, device=device) * (2 * math.pi / heads)
        way = torch.stack([angle.cos(), angle.sin()], dim=-1)
        way = way / way.abs().amax(-1, keepdim=True)
        with torch.no_grad():
            self.offsets.bias.copy_((way[:, None] * torch.arange(1, POINTS + 1, device=device)[:, None]).flatten())

    def forward(self, q: Tensor, x: Tensor, grid: Grid, reference: Tensor) -> Tensor:
        """(N, queries, width), the map (N, patches, width) of `grid`, (queries, 2) in shares of it -> (N, queries, width)."""
        query, key, value = self.to_qkv(q).unflatten(-1, (3, -1, self.head_dim)).permute(2, 0, 3, 1, 4)
        q = self.norm_among(q + self.mix(attention(query, key, value).transpose(1, 2).flatten(2)))
        step = reference.new_tensor([1 / grid[1], 1 / grid[0]])
        offsets = self.offsets(q).unflatten(-1, (-1, POINTS, 2))  # (N, queries, heads, points, 2), in patches
        at = (2 * (reference[:, None, None] + offsets * step) - 1).transpose(1, 2).flatten(0, 1)
        maps = self.to_value(x).unflatten(-1, (-1, self.head_dim)).permute(0, 2, 3, 1).flatten(0, 1).unflatten(2, grid)
        found = F.grid_sample(maps, at, align_corners=False).unflatten(0, (len(q), -1))  # (N, heads, head_dim, queries, points)
        share = self.weights(q).unflatten(-1, (-1, POINTS)).softmax(-1).transpose(1, 2)[:, :, None]
        q = self.norm_read(q + self.read((found * share).sum(-1).permute(0, 3, 1, 2).flatten(2)))
        done: Tensor = self.norm_mlp(q + self.linear_2(F.relu(self.linear_1(q))))
        return done
