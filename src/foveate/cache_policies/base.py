"""What every cache policy is: a frozen dataclass that scores what a layer has cached and says how much of it stays."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Self

import torch
from torch import Tensor

from foveate.contract import CacheView, Evict, InCache
from foveate.errors import FoveateError
from foveate.reducers.spelling import Spelled
from foveate.tokens import budget


@dataclass(frozen=True)
class CachePolicy(Spelled, ABC):
    """One method: what stays of what a layer has cached.

    It decides once a prompt has gone through a layer, of a second turn too, and while decoding again after every `every` tokens (0: not
    again, so that what is generated stays). A share counts all tokens that the layer has been given so far.

    name, paper   its spelling, and its arXiv number ("-": a baseline)
    experimental  whether its rule rests on an abstract or another's words alone, and may change when the source can be read
    together      whether it decides on all layers at once, after the last one: while the prompt runs, everything is cached then
    tells_images  whether it treats tokens of images otherwise than text
    examples      spellings that evict, and `keeps_all` spellings that do not, for the common tests: prompts of about 20 to 40 tokens
    """

    paper: ClassVar[str]
    experimental: ClassVar[bool] = False
    together: ClassVar[bool] = False
    tells_images: ClassVar[bool] = False
    examples: ClassVar[tuple[str, ...]] = ()
    keeps_all: ClassVar[tuple[str, ...]] = ()
    every: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Raises FoveateError where an option is not possible."""
        self.least(0, "every")

    def sites(self, layers: int) -> list[InCache]:
        """Where it acts in a language model of `layers` decoder layers. Layers that recur or reach back over a window are left out by the
        engine: what they keep is bounded already."""
        return [InCache(layer) for layer in range(layers)]

    @property
    def observes(self) -> int | None:
        """Of how many queries, the last ones, it looks at the attention; None: of all that came."""
        return None

    @property
    @abstractmethod
    def keeps_everything(self) -> bool:
        """Whether its options alone say that nothing goes."""

    @abstractmethod
    def decide(self, view: CacheView) -> Evict:
        """What stays in one layer."""

    def count(self, tokens: int, number: int, layers: int) -> int | None:
        """How many of `tokens` stay in the `number`-th of `layers` caches; None where that depends on more than sizes."""
        return None

    def score_flops(self, tokens: int, width: int, keys: int) -> int:
        """What its own matrix products in one layer take for a prompt; of a layer with heads of `width` and key heads of `keys` values."""
        rows = tokens if self.observes is None else min(self.observes, tokens)
        return 2 * rows * tokens * width

    def at(self, keep: float) -> Self:
        """The same method at another share. FoveateError where it has no such setting."""
        raise FoveateError(f"{self.name} has no option keep: how much stays follows from its other options")


@dataclass(frozen=True)
class Keeping(CachePolicy):
    """A method that scores each slot and keeps the best `keep`, a share of the row's tokens or a number. Subclasses give `score`."""

    keep: float | int = 0.5

    def check(self) -> None:
        super().check()
        budget(self.keep, 1)

    @property
    def keeps_everything(self) -> bool:
        return isinstance(self.keep, float) and self.keep == 1.0

    @abstractmethod
    def score(self, view: CacheView) -> Tensor:
        """(B, 1 or G, K) float32: what each slot is worth; the highest stay, of equal ones the first. Empty slots may have any score."""

    def decide(self, view: CacheView) -> Evict:
        return Evict(highest(view, self.score(view), self.lengths(view)))

    def decide_together(self, views: Sequence[CacheView], scores: Sequence[Tensor]) -> list[Evict]:
        """What stays in each layer, where all are decided on at once; the views have no attention any more."""
        raise NotImplementedError

    def lengths(self, view: CacheView) -> Tensor:
        """(B, 1) int64: how many slots stay."""
        number, layers = view.layers.index(view.layer), len(view.layers)
        return torch.tensor([[self.count(n, number, layers)] for n in view.tokens.tolist()], device=view.tokens.device)

    def count(self, tokens: int, number: int, layers: int) -> int | None:
        return budget(self.keep, tokens)

    def at(self, keep: float) -> Self:
        return dataclasses.replace(self, keep=float(keep))


def highest(view: CacheView, score: Tensor, lengths: Tensor) -> Tensor:
    """(B, 1 or G, K) bool: of each head the `lengths` (B, 1 or G) slots with the highest scores. A score that is not a number counts as
    the highest: what a broken model would show is not hidden."""
    score, there = torch.broadcast_tensors(score.nan_to_num(nan=float("inf")), view.there)
    order = score.masked_fill(~there, float("-inf")).argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(-1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order))
    return there & (rank < lengths[..., None])
