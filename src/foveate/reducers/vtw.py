"""VTW: from some decoder layer on there are no visual tokens, since by then the text has what it needs of them (arXiv 2405.05803).

    in front of layer K every visual token goes
    K = the smallest for which the mean over prompts of KL(p || p_K) is at most eta
    p: the next token's distribution at the last position; p_K: the same without visual tokens from layer K on

eta = 0.003 (LLaVA-1.5 7B), 0.0005 (13B), 0.0001 (LLaVA-NeXT 7B), on about 20 prompts, K from 5 up: `foveate.search.calibrate.vtw` finds it
for a model. The authors' are 15 or 16 of 32 layers and 20 of 40, hence the default, half of the depth. Neither a score nor attention is
looked at, so any attention backend serves. At K = 16 a prompt of 612 tokens, 576 of them visual, costs 52.9 % of the tokens' passes.

Where this differs from the authors' code, which has no licence and was not copied: images of any number and place go, in any batch (theirs:
576 tokens behind 35 of text, batch 1). Which of the two distributions stands in front in KL was not verified; here it is the whole model's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from math import floor
from typing import ClassVar, Self

import torch

from foveate.contract import Cut, FromLayer, Site, View, Workload
from foveate.errors import FoveateError
from foveate.reducers.base import Reducer
from foveate.reducers.common import meant
from foveate.tokens import TokenMap, budget


@dataclass(frozen=True)
class VTW(Reducer):
    """Withdraws all visual tokens in front of decoder layer `layer`, an index (int) or a share of the depth (float; 1.0: never)."""

    name: ClassVar[str] = "vtw"
    paper: ClassVar[str] = "2405.05803"
    amounts: ClassVar[tuple[str, ...]] = ("layer",)
    examples: ClassVar[tuple[str, ...]] = ("vtw", "vtw:layer=1,positions=renumber")
    keeps_all: ClassVar[tuple[str, ...]] = ("vtw:layer=1.0", "vtw:layer=4")
    layer: int | float = 0.5

    def check(self) -> None:
        super().check()
        index = type(self.layer) is int and 0 <= self.layer < 1 << 63
        if not index and not (type(self.layer) is float and 0.0 < self.layer <= 1.0):
            raise FoveateError(
                f"vtw: layer={self.layer!r} is not possible; give a share of the depth in (0, 1], as in layer=0.5, or a layer index >= 0"
            )

    @classmethod
    def within(cls, divergences: Mapping[int, float], eta: float) -> Self:
        """The first of some layers from which on, without visual tokens, the answers' distributions differ by no more than `eta`."""
        found = [layer for layer, divergence in divergences.items() if divergence <= eta]
        if not found:
            raise FoveateError(
                f"vtw: no layer is within eta={eta:g}, the nearest differs by {min(divergences.values()):.3g}; give a larger eta"
            )
        return cls(layer=min(found))

    def at(self, keep: float) -> Self:
        """With the visual tokens in a share of the layers, so that this is what is left on the mean over them."""
        budget(float(keep), 1)
        return replace(self, layer=float(keep))

    def sites(self, layers: int) -> list[Site]:
        first = self.layer if isinstance(self.layer, int) else floor(meant(self.layer) * layers + Fraction(1, 2))
        return [] if first == layers else [FromLayer(first)]

    def reduce(self, view: View, stage: int = 0) -> Cut:
        return Cut(TokenMap.keep(view.layout, torch.zeros_like(view.layout.visual)))

    def count(self, work: Workload, stage: int = 0) -> list[int]:
        return [0] * len(work.arriving)
