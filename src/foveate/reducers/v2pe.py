"""V2PE: visual tokens take a fraction of a step each, so that long inputs stay inside the positions that were trained (arXiv 2412.09616).

text ends at p, N visual tokens follow:   p + δ, p + 2 δ, … p + N δ;   the next text token:   ceil(p + N δ) + 1

No token leaves. An image takes ceil(N δ) positions in place of N; δ = 1 is as ever. 256 tokens after p = 10: at δ = 1/4 they stand at
10.25 … 74, and the text goes on at 75. An answer goes on from the prompt's last position, one by one. Positions are float32 and go through
the model's rotary module as they are, which is exact for fractions of a power of two, such as the authors' 1, 1/2, … 1/256.

Where several images follow each other without text between them they are one run. The authors train with a δ drawn for each image and ask
at one that is fixed: here a stage's `reducers:` can take turns between several. Positions of several rows a token (M-RoPE) are places in a
grid, and are refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from foveate.contract import BeforeLM, Cut, Site, View, Workload
from foveate.errors import FoveateError
from foveate.reducers.base import Reducer
from foveate.tokens import TokenMap


@dataclass(frozen=True)
class V2PE(Reducer):
    """Places visual tokens a fraction of a step apart.

    delta  what a visual token takes of a step, in (0, 1]
    """

    name: ClassVar[str] = "v2pe"
    paper: ClassVar[str] = "2412.09616"
    amounts: ClassVar[tuple[str, ...]] = ()
    between: ClassVar[bool] = True
    examples: ClassVar[tuple[str, ...]] = ("v2pe:delta=0.25", "random:keep=0.5+v2pe:delta=0.1")
    keeps_all: ClassVar[tuple[str, ...]] = ("v2pe:delta=1.0",)
    delta: float = 0.25

    def check(self) -> None:
        super().check()
        if type(self.delta) is not float or not 0.0 < self.delta <= 1.0:
            raise FoveateError(
                f"v2pe: delta={self.delta!r} is not possible; give a share of a step above 0.0, 1.0 at most, as in delta=1/16"
            )
        if self.positions != "keep":
            raise FoveateError(f"v2pe: positions={self.positions!r} does nothing, since no token leaves; leave it out")

    def sites(self, layers: int) -> list[Site]:
        return [BeforeLM()]

    def reduce(self, view: View, stage: int = 0) -> Cut:
        visual = view.layout.visual
        return Cut(TokenMap.identity(view.layout), steps=torch.ones_like(visual, dtype=torch.float64).masked_fill(visual, self.delta))

    def count(self, work: Workload, stage: int = 0) -> list[int]:
        return list(work.arriving)
