"""What every bridge from vision features to visual tokens can do."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from foveate.bridges.windows import Box, Grid
from foveate.errors import FoveateError


class Bridge(nn.Module, ABC):
    """A trained module from the features of a vision tower to the visual tokens of a language model.

    A grid is (rows, columns) of patches of one image. All constructor arguments are attributes and come back from `config()`;
    everything but `forward` works on the meta device and costs nothing.
    """

    kind: ClassVar[str]
    levels: int
    vision_width: int
    text_width: int

    def __init__(self, *, levels: int, vision_width: int, text_width: int) -> None:
        super().__init__()
        self.levels = positive("levels", levels)
        self.vision_width = positive("vision_width", vision_width)
        self.text_width = positive("text_width", text_width)

    @abstractmethod
    def tokens(self, grid: Grid) -> int:
        """Number of visual tokens for one image. FoveateError if the bridge cannot take this grid."""

    @abstractmethod
    def boxes(self, grid: Grid) -> list[Box]:
        """For each token the patches that it stands for: (row0, column0, row1, column1), half-open.

        It is made from these, and from no others unless the method says that it looks around them."""

    @abstractmethod
    def flops(self, grid: Grid) -> int:
        """FLOPs of one image's forward pass, 2 per multiply-add of all matrix products, attention included."""

    @abstractmethod
    def forward(self, features: list[Tensor], grid: Grid) -> Tensor:
        """(B, tokens(grid), text_width) from `levels` tensors (B, rows * columns, vision_width), no CLS, raster order, shallow to deep. One
        that makes no tokens says itself what it makes."""

    def budgets(self, grid: Grid) -> Sequence[int]:
        """Numbers of tokens that one image may become, ascending; the last is `tokens(grid)`, which alone is left in most methods."""
        return (self.tokens(grid),)

    def within(self, grid: Grid, budget: int | None) -> int:
        """`budget` if one image may become so many tokens, all of them for None. FoveateError that names those that it may become."""
        found = self.budgets(grid)
        if budget is None:
            return found[-1]
        if budget not in found or isinstance(budget, bool):
            few = f"{found[0]} to {found[-1]}" if isinstance(found, range) else " or ".join(map(str, found))
            more = "" if isinstance(self, ElasticBridge) else "; a bridge of kind mqt or chain_of_sight makes as many as it is asked for"
            raise FoveateError(f"the {self.kind} bridge makes {few} tokens of a view of {grid[0]} x {grid[1]} patches, not {budget}{more}")
        return budget

    def config(self) -> dict[str, Any]:
        """JSON-able {"kind": ..., constructor arguments} for `build_bridge`. Subclasses add their own arguments."""
        return {"kind": self.kind, "levels": self.levels, "vision_width": self.vision_width, "text_width": self.text_width}

    def scaled(self, *, scales: Sequence[Sequence[int]], grid: int, sources: Sequence[int] | None = None) -> Self:
        """A copy with more tokens, where the method allows it; `ChainOfSight.scaled` says what the arguments mean."""
        raise FoveateError(f"a {self.kind} bridge has no scales to grow (asked for {scales} at grid {grid}); chain_of_sight has")

    def reset_parameters(self) -> None:
        """Draw the initial weights. Here PyTorch's own; a method whose paper says otherwise overrides it."""
        for part in self.modules():
            if isinstance(part, nn.Linear | nn.LayerNorm):
                part.reset_parameters()

    def check(self, features: list[Tensor], grid: Grid) -> None:
        """FoveateError unless `features` are what `forward` expects for this grid."""
        if len(features) != self.levels:
            raise FoveateError(f"the {self.kind} bridge reads {self.levels} feature levels, got {len(features)}")
        self.tokens(grid)
        expected = (grid[0] * grid[1], self.vision_width)
        for level, x in enumerate(features):
            if tuple(x.shape[1:]) != expected:
                raise FoveateError(
                    f"feature level {level} has shape {tuple(x.shape)}; the {self.kind} bridge expects "
                    f"(images, {expected[0]}, {expected[1]}): {grid[0]} x {grid[1]} patches without CLS, vision_width {expected[1]}"
                )


class ElasticBridge(Bridge):
    """A bridge that makes fewer tokens where it is asked to. The tokens of a smaller budget are the first of those of a larger one."""

    @abstractmethod
    def flops(self, grid: Grid, budget: int | None = None) -> int:
        """Those of as many tokens as `budget` says, all of them for None."""

    @abstractmethod
    def forward(self, features: list[Tensor], grid: Grid, budget: int | None = None) -> Tensor:
        """(B, budget or tokens(grid), text_width), see Bridge. FoveateError for a budget that is none of `budgets(grid)`."""


def positive(name: str, value: Any) -> int:
    """`value` if it is a whole number of at least 1, otherwise a FoveateError that names it."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise FoveateError(f"{name} must be a whole number of at least 1, got {value!r}")
    return value
