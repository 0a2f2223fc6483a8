"""VLoRA: an image becomes weights of the language model, and no token of its prompt. Ma et al., NeurIPS 2024, arXiv 2405.20339.

    X    = Linear(features) + P                   P: a learned place of each patch
    H_t  = LN(blocks_t(Q_t, X))                   for each kind t of target (q, k, v, o, m) weights of its own; Q_t: a query for each layer
    A_tl = Linear_t(H_tl)                         (inputs, rank), of the image and layer l
    y    = W_tl x + B_tl A_tlᵀ x                  B_tl: (outputs, rank), learned, the same for all images; it begins at zero

A block is attention among the queries, attention to X, and an MLP that widens 4 times, all pre-norm. The paper has 8 blocks of width 512,
rank 64 with a scale of 1, and every fourth layer of 32 (3, 7, …, 31), so that 8 queries make 10.5 million numbers of an image. q, k, v, o
are the attention's maps, m is a branch beside the whole MLP. The weights of several images in a prompt add up, and so does A: B is shared.

Beyond the paper, whose targets are square: inputs and outputs are each target's own, as for keys and values of fewer heads. Settled here:
several levels are concatenated, each block norms X for itself, the last linear map of a target has no bias and gives A at first the spread
of LoRA's, 1 / (3 inputs), and the other weights begin as those of the resamplers here.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from foveate.bridges.base import Bridge, positive
from foveate.bridges.cross_attention import CrossAttentionBlock, attention, multiply_adds, reset_parameters
from foveate.bridges.windows import Box, Grid, square_only, window_grid
from foveate.errors import FoveateError

RANK = 64  # the paper's, unless a bridge says another


class VLoRA(Bridge):
    """Low-rank weights of linear maps in the decoder, for images of one grid, and no tokens. `layers`: decoder layers, counted from 0;
    `targets`: by the name of a map in them its [inputs, outputs], what the language model has."""

    kind: ClassVar[str] = "vlora"

    def __init__(
        self,
        *,
        targets: Mapping[str, Sequence[int]],
        layers: Sequence[int],
        grid: int,
        rank: int = RANK,
        depth: int = 8,
        channels: int = 512,
        heads: int = 16,
        levels: int = 1,
        vision_width: int = 1024,
        text_width: int = 4096,
    ) -> None:
        super().__init__(levels=levels, vision_width=vision_width, text_width=text_width)
        self.targets, self.layers = read_targets(targets), read_layers(layers)
        self.grid, self.rank, self.depth = positive("grid", grid), positive("rank", rank), positive("depth", depth)
        self.channels, self.heads = positive("channels", channels), positive("heads", heads)
        if channels % heads:
            raise FoveateError(f"vlora: {heads} heads do not divide {channels} channels; choose a divisor or other channels")
        self.to_channels = nn.Linear(levels * vision_width, channels)
        self.place = nn.Parameter(torch.empty(grid * grid, channels))
        self.generators = nn.ModuleDict(
            {of(name): Generator(len(self.layers), inputs * rank, depth, channels, heads) for name, (inputs, _) in self.targets.items()}
        )
        self.outputs = nn.Parameter(torch.empty(len(self.layers), sum(outputs for _, outputs in self.targets.values()), rank))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        reset_parameters(self)
        nn.init.trunc_normal_(self.place, std=0.02)
        for name, (inputs, _) in self.targets.items():
            generator: Any = self.generators[of(name)]
            nn.init.trunc_normal_(generator.query, std=0.02)
            nn.init.normal_(generator.head.weight, std=(3 * inputs * self.channels) ** -0.5)
        nn.init.zeros_(self.outputs)

    def tokens(self, grid: Grid) -> int:
        window_grid(grid, 1)
        square_only(self.kind, self.grid, grid)
        return 0

    def boxes(self, grid: Grid) -> list[Box]:
        self.tokens(grid)
        return []

    def flops(self, grid: Grid) -> int:
        self.tokens(grid)
        patches, queries, width = self.grid**2, len(self.layers), self.channels
        among = 4 * queries * width**2 + 2 * queries**2 * width
        blocks = self.depth * (among + multiply_adds(1, patches, queries, 1, width, width))
        heads = sum(inputs for inputs, _ in self.targets.values()) * self.rank * queries * width
        return 2 * (patches * self.levels * self.vision_width * width + len(self.targets) * blocks + heads)

    def config(self) -> dict[str, Any]:
        own = ("targets", "layers", "grid", "rank", "depth", "channels", "heads")
        return {**super().config(), **{name: getattr(self, name) for name in own}}

    def forward(self, features: list[Tensor], grid: Grid) -> Tensor:
        """(B, layers, inputs of all targets, rank): A of each image, target after target."""
        self.check(features, grid)
        x = self.to_channels(torch.cat(features, dim=-1)) + self.place
        made = [generator(x).unflatten(-1, (-1, self.rank)) for generator in self.generators.values()]
        return torch.cat(made, dim=2)


class Generator(nn.Module):
    """Queries, one a layer, that read an image (B, patches, width) and become `numbers` each: (B, queries, numbers)."""

    def __init__(self, queries: int, numbers: int, depth: int, width: int, heads: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(queries, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, numbers, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q = self.query.expand(len(x), -1, -1)
        for block in self.blocks:
            q = block(q, x)
        made: Tensor = self.head(self.norm(q))
        return made


class Block(nn.Module):
    """q + attention among the queries, then a `CrossAttentionBlock` to the image."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.cross = heads, CrossAttentionBlock(width, width, width // heads)
        self.norm = nn.LayerNorm(width)
        self.to_qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, q: Tensor, x: Tensor) -> Tensor:
        """(B, queries, width) and (B, patches, width) -> (B, queries, width)."""
        query, key, value = self.to_qkv(self.norm(q)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q = q + self.proj(attention(query, key, value).transpose(1, 2).flatten(2))
        read: Tensor = self.cross(q, x)
        return read


def of(name: str) -> str:
    """What the generator of a target is called: not as the target, by which adapters look for linear maps in a whole model."""
    return f"of_{name}"


def read_targets(given: Any) -> dict[str, list[int]]:
    """`given`, checked, in the order of the names. FoveateError where it is not names with two sizes each."""
    if (
        not isinstance(given, Mapping)
        or not given
        or not all("." not in name and isinstance(size, Sequence) and len(size) == 2 for name, size in given.items())
    ):
        raise FoveateError(
            f"vlora: targets={given!r} is not possible; give [inputs, outputs] of each, as in {{q_proj: [4096, 4096]}}, or in a model "
            "names alone, as in [q_proj, mlp]"
        )
    sizes = sorted(given.items())  # a saved configuration is in this order too
    return {name: [positive(f"inputs of {name}", size[0]), positive(f"outputs of {name}", size[1])] for name, size in sizes}


def read_layers(given: Any) -> list[int]:
    """`given`, checked. FoveateError where it is not ascending numbers of layers."""
    known = isinstance(given, Sequence) and all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in given)
    if not known or not given or list(given) != sorted(set(given)):
        raise FoveateError(f"vlora: layers={given!r} is not possible; give decoder layers in ascending order, counted from 0, as in [3, 7]")
    return list(given)
