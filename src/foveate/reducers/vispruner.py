"""VisPruner: the patches that [CLS] attends to, and of the others those that are least alike (arXiv 2412.01818 v2).

    s_n = mean over heads of the attention [CLS] -> patch n;  T = T_imp + T_div, T_imp = floor(important * T)
    important   the T_imp largest s_n of the tile
    diverse     the list of all others, by descending s; until T_div are left: its even places are a, its odd places b; the r of a
                with the highest cosine to any of b leave; the list goes on as what stays of a, most similar first, then b

r is `step`, less where fewer have to leave. The important ones take no part in the second half; survivors stand in raster order.

Where this differs from the authors' code: cosines are of the states in front of the language model, theirs of the tower's features in
front of the projector. A list of any length is thinned: where r is more than there are even places, all of these leave and the rest
follows in the next round (theirs fails there and at odd lengths). Their code takes all attention maps from an eager tower; one row is
enough. Newline tokens, where a model has them, stay. In a tower without [CLS] the score is the attention received (see `ClsAttention`),
as an author advises.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from foveate.contract import BeforeLM, ClsAttention, Site, View, Workload, products
from foveate.reducers.common import integers, meant, shares, states
from foveate.reducers.picker import Pick, Picker


@dataclass(frozen=True)
class VisPruner(Picker):
    """Keeps `keep` of each tile's patches: the share `important` by [CLS] attention in tower block `layer`, the rest for diversity.

    step: how many leave the list at most in one round. scope: what `keep` counts in, "crop" (tile), "image" or "frame".
    """

    name: ClassVar[str] = "vispruner"
    paper: ClassVar[str] = "2412.01818"
    looks_at: ClassVar[frozenset[str]] = frozenset({"tower", "states"})
    examples: ClassVar[tuple[str, ...]] = ("vispruner:keep=0.5",)
    keeps_all: ClassVar[tuple[str, ...]] = ("vispruner:keep=1.0",)
    multiplies: ClassVar[tuple[str, ...]] = ("vispruner:keep=0.5",)
    keep: float | int = 0.25
    important: float = 0.5
    step: int = 8
    layer: int = -2
    scope: str = "crop"
    positions: str = field(default="renumber", kw_only=True)

    def check(self) -> None:
        super().check()
        shares(self, "important")
        integers(self, step=1, layer=None)

    def sites(self, layers: int) -> list[Site]:
        return [BeforeLM((ClsAttention(self.layer),))]

    def picking(self, view: View) -> Pick:
        score, x = view.signal(ClsAttention(self.layer)).flatten(), states(self.name, view).detach().flatten(0, 1)

        def pick(slots: Tensor, left: int) -> Tensor:
            order = torch.argsort(score[slots], descending=True, stable=True)
            first = self._important(left)
            others = order[first:]
            unit = normalize(x[slots[others]].to(torch.float32), dim=-1)
            return torch.cat([order[:first], others[thinned(unit @ unit.T, left - first, self.step)]])

        return pick

    def score_flops(self, sizes: Workload, stage: int = 0) -> int:
        others = [n - self._important(left) for n, left in self.reduced(sizes)]
        return products(((n, n) for n in others), sizes.width)

    def _important(self, left: int) -> int:
        return int(meant(self.important) * left)


def thinned(similarity_RR: Tensor, left: int, step: int) -> Tensor:
    """(left,) int64: what is left of a list of R, by their places in it; of equally similar ones the first leaves."""
    places = torch.arange(len(similarity_RR), device=similarity_RR.device)
    while len(places) > max(left, 1):
        a, b = places[::2], places[1::2]
        nearest = similarity_RR[a][:, b].max(-1).values
        a = a[torch.argsort(nearest, descending=True, stable=True)]
        places = torch.cat([a[min(step, len(places) - left, len(a)) :], b])
    return places[:left]
