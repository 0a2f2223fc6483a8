"""What a method is that picks the tokens of a group together, each by those picked before or beside it: it says where it acts and picks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import Tensor

from foveate.contract import Cut, View, Workload
from foveate.reducers.base import Reducer
from foveate.reducers.common import choose, picked
from foveate.tokens import budget

Pick = Callable[[Tensor, int], Tensor]
"""(slots (n,), left) -> (left,) int64: which of a group's slots stay, by their places among them."""


class Picker(Reducer):
    """Keeps `keep` (share or number) of each group of visual tokens, in raster order; a group of which all stay is not asked about.

    A subclass names `keep` and `scope` as fields; `scopes` are those that it can have.
    """

    scopes: ClassVar[Sequence[str]] = ("crop", "image", "frame")
    keep: Any
    scope: str

    @abstractmethod
    def picking(self, view: View) -> Pick:
        """What picks the tokens of each group of a view; slots count over the batch."""

    def check(self) -> None:
        super().check()
        budget(self.keep, 1)
        choose(self, scope=self.scopes)

    def reduce(self, view: View, stage: int = 0) -> Cut:
        return Cut(picked(view.layout, self.keep, self.scope, self.picking(view)))

    def count(self, work: Workload, stage: int = 0) -> list[int]:
        return work.leaving(lambda arriving, _: budget(self.keep, arriving), self.scope)

    def reduced(self, sizes: Workload) -> list[tuple[int, int]]:
        """(tokens, how many of them stay) of each group that loses some."""
        return [(n, left) for n in sizes.groups(self.scope) if (left := budget(self.keep, n)) < n]
