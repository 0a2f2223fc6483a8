"""What a method is that leaves all tokens where they are and says which of them see which."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from foveate.contract import Site, Visibility, Workload
from foveate.errors import FoveateError
from foveate.reducers.base import Reducer
from foveate.reducers.common import integers


@dataclass(frozen=True)
class Seeing(Reducer):
    """A method that decides `Visible`. layer: the first decoder layer in which its rule holds."""

    amounts: ClassVar[tuple[str, ...]] = ()
    layer: int = 0

    def check(self) -> None:
        super().check()
        integers(self, layer=0)
        if self.positions != "keep":
            raise FoveateError(f"{self.name}: positions={self.positions!r} does nothing, since no token leaves; leave it out")

    def sites(self, layers: int) -> list[Site]:
        return [Visibility(self.layer)]

    def count(self, work: Workload, stage: int = 0) -> list[int]:
        return list(work.arriving)
