"""What a method is that ranks tokens by one score, as most do: it says where it acts and how it scores."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import Tensor

from foveate.contract import Cut, View, Workload
from foveate.reducers.base import Reducer
from foveate.reducers.common import OF, choose, leaving
from foveate.tokens import TokenMap, budget, top


class Ranker(Reducer):
    """Keeps the best of each group of visual tokens by `score`; ties go to the lower raster index, survivors stay in raster order.

    A subclass makes an option of each of these by naming it as a field:

    keep   share or number of a group's tokens that stay
    of     what a share is one of: the tokens that arrive, or the "original" ones in front of the first layer
    scope  what is ranked, and what `keep` counts in: "image", "crop", "frame" or "sample"

    One that counts in another way says so in `left`, and has no `keep`.
    """

    keep: Any
    of: str = "arriving"
    scope: str = "image"

    @abstractmethod
    def score(self, view: View, stage: int = 0) -> Tensor:
        """(B, N) the score of each visual slot; the highest stay."""

    def left(self, arriving: int, original: int, stage: int = 0) -> int:
        """Tokens that stay of one group, when `arriving` of its `original` tokens come to the site."""
        return min(arriving, budget(self.keep, original if self.of == "original" else arriving))

    def check(self) -> None:
        super().check()
        if type(self).left is Ranker.left:
            budget(self.keep, 1)
        choose(self, of=OF)

    def reduce(self, view: View, stage: int = 0) -> Cut:
        number = leaving(view, lambda arriving, original: self.left(arriving, original, stage), self.scope)
        return Cut(TokenMap.keep(view.layout, top(view.layout, self.score(view, stage), 1.0, scope=self.scope, original_BN=number)))

    def count(self, work: Workload, stage: int = 0) -> list[int]:
        return work.leaving(lambda arriving, original: self.left(arriving, original, stage), self.scope)
