"""Chain-of-Sight: multi-scale windowed resamplers, pre-trained with few visual tokens and fine-tuned with many.

Huang et al., "Accelerating Pre-training of Multimodal LLMs via Chain-of-Sight", NeurIPS 2024, arXiv 2407.15819. The authors have published
no code; biases, norms and their order are those of the bridge in the code of Skip-Vision (arXiv 2503.21817), which shares authors with the
paper and gives its published parameter count. Left out of that code: the summary token that Skip-Vision appends to each fine scale.

A scale (window, queries) cuts the grid into windows of window x window patches; each window has `queries` learnable queries of its own,
which read the window's patches level by level (shallow before deep). All windows of a scale share the other weights. The scales' tokens are
concatenated, the coarsest first; the paper reports that the opposite order costs a lot.

A budget takes the first scales alone: the coarsest, the two coarsest, and so on to all of them. That is not of the paper, which grows the
bridge between two trainings; a scale never reads another, so that the others need not run.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from foveate.bridges.base import ElasticBridge, positive
from foveate.bridges.cross_attention import WindowResampler, multiply_adds, reset_parameters
from foveate.bridges.windows import Box, Grid, window_boxes, window_grid, window_partition
from foveate.errors import FoveateError

Scale = tuple[int, int]


class ChainOfSight(ElasticBridge):
    """`scales` as (window side in patches, queries per window), coarse to fine, for a square grid of `grid` x `grid` patches.

    The queries belong to windows, so a bridge is made for one grid; `scaled` gives a copy for another grid or other windows.
    """

    kind: ClassVar[str] = "chain_of_sight"

    def __init__(
        self,
        scales: Sequence[Sequence[int]],
        *,
        grid: int = 16,
        levels: int = 2,
        vision_width: int = 1024,
        width: int = 1024,
        text_width: int = 4096,
        head_dim: int = 64,
    ) -> None:
        super().__init__(levels=levels, vision_width=vision_width, text_width=text_width)
        self.grid, self.width, self.head_dim = positive("grid", grid), positive("width", width), positive("head_dim", head_dim)
        self.scales = check_scales(scales, grid)
        self.resamplers = nn.ModuleList(
            WindowResampler((grid // window) ** 2, queries, levels, width, vision_width, head_dim) for window, queries in self.scales
        )
        self.norm = nn.LayerNorm(width)
        self.proj = nn.Linear(width, text_width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        reset_parameters(self)

    def tokens(self, grid: Grid) -> int:
        return self.budgets(grid)[-1]

    def budgets(self, grid: Grid) -> Sequence[int]:
        self._check_grid(grid)
        return list(accumulate((self.grid // window) ** 2 * queries for window, queries in self.scales))

    def boxes(self, grid: Grid) -> list[Box]:
        self._check_grid(grid)
        return [box for window, queries in self.scales for box in window_boxes(grid, window) for _ in range(queries)]

    def _check_grid(self, grid: Grid) -> None:
        if tuple(grid) != (self.grid, self.grid):
            raise FoveateError(
                f"this chain_of_sight bridge is made for a grid of {self.grid} x {self.grid} patches, got {grid[0]} x {grid[1]}; "
                "use images of that size, or make a bridge for a square grid with .scaled(scales=..., grid=...)"
            )

    def flops(self, grid: Grid, budget: int | None = None) -> int:
        attention = sum(
            multiply_adds((self.grid // window) ** 2, window**2, queries, self.levels, self.width, self.vision_width)
            for window, queries in self.scales[: self._scales(grid, budget)]
        )
        return 2 * (attention + self.within(grid, budget) * self.width * self.text_width)

    def _scales(self, grid: Grid, budget: int | None) -> int:
        """How many scales a budget takes."""
        return 1 + list(self.budgets(grid)).index(self.within(grid, budget))

    def config(self) -> dict[str, Any]:
        own = {"scales": [list(scale) for scale in self.scales], "grid": self.grid, "width": self.width, "head_dim": self.head_dim}
        return {**super().config(), **own}

    def forward(self, features: list[Tensor], grid: Grid, budget: int | None = None) -> Tensor:
        self.check(features, grid)
        parts = list(zip(self.resamplers, self.scales, strict=True))[: self._scales(grid, budget)]
        tokens = [part([window_partition(x, grid, window) for x in features]) for part, (window, _) in parts]
        return self.proj(self.norm(torch.cat(tokens, dim=1)))

    def scaled(self, *, scales: Sequence[Sequence[int]], grid: int, sources: Sequence[int] | None = None) -> Self:
        """A copy with other windows or another grid, its weights inflated from this bridge's; this bridge stays as it is.

        Each target scale copies the weights of a source scale, and each of its windows the queries of the source window that it lies in
        (nearest neighbour). `sources` names the source scale of each target by its index; without it, `default_sources` chooses.
        Same device and dtype. FoveateError where queries per window differ or the windows do not grow by a whole factor a side.
        """
        target = check_scales(scales, positive("grid", grid))
        chosen = default_sources(self.scales, self.grid, target, grid) if sources is None else list(sources)
        if len(chosen) != len(target) or not all(0 <= s < len(self.scales) for s in chosen):
            raise FoveateError(f"sources {chosen} must name a source scale (0 to {len(self.scales) - 1}) for each of {len(target)} scales")
        state = {name: x.clone() for name, x in self.state_dict().items() if not name.startswith("resamplers.")}
        for t, s in enumerate(chosen):
            factor = growth(self.scales[s], self.grid, target[t], grid)
            inflated = {name: x.clone() for name, x in self.resamplers[s].state_dict().items()}
            inflated["queries"] = inflate_queries(inflated["queries"], factor)
            state |= {f"resamplers.{t}.{name}": x for name, x in inflated.items()}
        with torch.device("meta"):  # no random numbers are drawn for weights that are replaced at once
            copy = type(self)(**{k: v for k, v in self.config().items() if k not in ("kind", "scales", "grid")}, scales=target, grid=grid)
        copy.load_state_dict(state, assign=True)
        return copy.train(self.training)


def check_scales(scales: Sequence[Sequence[int]], grid: int) -> tuple[Scale, ...]:
    """`scales` as pairs, if each window divides the grid and none is larger than the one before; otherwise a FoveateError."""
    if not scales or not all(isinstance(scale, Sequence) and len(scale) == 2 for scale in scales):
        raise FoveateError(f"scales must be a list of (window, queries per window), for example [[16, 16], [4, 4]]; got {scales!r}")
    pairs = tuple((positive("window", window), positive("queries per window", queries)) for window, queries in scales)
    windows = [window for window, _ in pairs]
    if windows != sorted(windows, reverse=True):
        raise FoveateError(f"scales must go from the coarsest to the finest, got windows {windows}; order: {sorted(windows, reverse=True)}")
    for window in windows:
        window_grid((grid, grid), window)
    return pairs


def default_sources(source: Sequence[Scale], source_grid: int, target: Sequence[Scale], grid: int) -> list[int]:
    """The source scale of each target: of those with as many queries per window, the one whose windows grow least.

    Queries per window never change in scaling, so they tell global and local scales apart: from [(16, 16), (4, 4)] to
    [(32, 16), (8, 16), (2, 4)] the sources are [0, 0, 1]. Growing least keeps an unchanged scale itself; a tie, between two equal scales,
    goes to the nearer place in the list.
    """
    chosen = []
    for place, (window, queries) in enumerate(target):
        same = [s for s, scale in enumerate(source) if scale[1] == queries]
        if not same:
            raise FoveateError(
                f"scale {(window, queries)} has {queries} queries per window, but the scales to grow from, {list(source)}, have "
                f"{' and '.join(str(n) for _, n in source)}; scaling adds windows, it never changes the queries per window"
            )
        fitting = [s for s in same if (grid // window) % (source_grid // source[s][0]) == 0]
        candidates = fitting or same[:1]  # where none fits, `growth` says why
        chosen.append(min(candidates, key=lambda s: (growth(source[s], source_grid, (window, queries), grid), abs(s - place))))
    return chosen


def growth(source: Scale, source_grid: int, target: Scale, grid: int) -> int:
    """How many windows a side come from one window; FoveateError if that is not a whole number or the queries per window differ."""
    if source[1] != target[1]:
        raise FoveateError(
            f"scale {target} has {target[1]} queries per window but its source {source} has {source[1]}; "
            "scaling adds windows, it never changes the queries per window"
        )
    before, after = source_grid // source[0], grid // target[0]
    if after % before:
        raise FoveateError(
            f"scale {target} has {after} x {after} windows on a grid of {grid}, its source {source} has {before} x {before} on a grid of "
            f"{source_grid}; a bridge only scales up, by a whole factor a side: choose a window that gives a multiple of {before}"
        )
    return after // before


def parents(
    source: Sequence[Sequence[int]],
    source_grid: int,
    target: Sequence[Sequence[int]],
    grid: int,
    sources: Sequence[int] | None = None,
) -> Tensor:
    """(tokens of `target`,) int64: which token of the `source` scales each is inflated from, as `ChainOfSight.scaled` does it."""
    before, after = check_scales(source, source_grid), check_scales(target, grid)
    counts = [(source_grid // window) ** 2 * queries for window, queries in before]
    own = [part.view(-1, queries, 1) for part, (_, queries) in zip(torch.arange(sum(counts)).split(counts), before, strict=True)]
    chosen = default_sources(before, source_grid, after, grid) if sources is None else sources
    factors = [growth(before[s], source_grid, scale, grid) for s, scale in zip(chosen, after, strict=True)]
    return torch.cat([inflate_queries(own[s], factor).flatten() for s, factor in zip(chosen, factors, strict=True)])


def inflate_queries(queries: Tensor, factor: int) -> Tensor:
    """(windows, queries, width) of a square grid of windows -> (windows * factor², queries, width), nearest neighbour on that grid."""
    side = round(queries.shape[0] ** 0.5)
    square = queries.unflatten(0, (side, side))
    return square.repeat_interleave(factor, 0).repeat_interleave(factor, 1).flatten(0, 1)
