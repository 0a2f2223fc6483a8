"""HoloV: a share of the budget for every part of the picture, by what is in it (arXiv 2510.02912). Experimental.

    V_n = variance of the cosines of patch n with the patches of its part;  A_n = attention [CLS] -> patch n, mean over heads
    H = gamma V + A,  gamma = mean |A| / mean |V| over the tile
    a part's share of the budget is in proportion to the mean of its H^tau; in each part the largest H stay

In raster order. Parts are `parts` runs of patches in raster order, as in the authors' code for LLaVA (16 of 36). The budget is shared out
by largest remainders, and no part gets more than it has; both are this library's.

Unverified: tau, whose value our reference does not give (1 here), and whether the variance is the population's (as here). The step of the
paper that brings visual context back in is left out: no formula of it was available.

Where this differs from the authors' code: there H, with other weights, sets the shares alone and attention ranks within a part; kept
patches of a part stand by descending attention, and what a part lacks is filled with zeros. Cosines are of the states in front of the
language model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from foveate.contract import BeforeLM, ClsAttention, Site, View, Workload, products
from foveate.reducers.common import above_zero, dealt, integers, states
from foveate.reducers.picker import Pick, Picker


@dataclass(frozen=True)
class HoloV(Picker):
    """Keeps `keep` of each tile's patches, shared out among `parts` runs of them by attention and variety.

    layer: tower block of the attention. scope: what `keep` counts in, "crop" (tile), "image" or "frame". tau: unverified, see the module.
    """

    name: ClassVar[str] = "holov"
    paper: ClassVar[str] = "2510.02912"
    experimental: ClassVar[bool] = True
    looks_at: ClassVar[frozenset[str]] = frozenset({"tower", "states"})
    examples: ClassVar[tuple[str, ...]] = ("holov:keep=0.5,parts=4",)
    keeps_all: ClassVar[tuple[str, ...]] = ("holov:keep=1.0,parts=4",)
    multiplies: ClassVar[tuple[str, ...]] = ("holov:keep=0.5,parts=4",)
    keep: float | int = 64
    parts: int = 16
    tau: float = 1.0
    layer: int = -2
    scope: str = "crop"
    positions: str = field(default="renumber", kw_only=True)

    def check(self) -> None:
        super().check()
        integers(self, parts=1, layer=None)
        above_zero(self, "tau")

    def sites(self, layers: int) -> list[Site]:
        return [BeforeLM((ClsAttention(self.layer),))]

    def picking(self, view: View) -> Pick:
        score, x = view.signal(ClsAttention(self.layer)).flatten(), states(self.name, view).detach().flatten(0, 1)

        def pick(slots: Tensor, left: int) -> Tensor:
            lengths = self._lengths(len(slots))
            attention, unit = score[slots], normalize(x[slots].to(torch.float32), dim=-1)
            variance = torch.cat([(part @ part.T).var(1, correction=0) for part in unit.split(lengths)])
            gamma = attention.abs().mean() / variance.abs().mean().clamp(min=torch.finfo(torch.float32).tiny)
            worth = (gamma * variance + attention).split(lengths)
            quotas = dealt(left, [float(part.pow(self.tau).mean()) for part in worth], lengths)
            starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
            best = [torch.argsort(part, descending=True, stable=True)[:quota] for part, quota in zip(worth, quotas, strict=True)]
            return torch.cat([start + of for start, of in zip(starts, best, strict=False)])

        return pick

    def score_flops(self, sizes: Workload, stage: int = 0) -> int:
        return products(((part, part) for n, _ in self.reduced(sizes) for part in self._lengths(n)), sizes.width)

    def _lengths(self, patches: int) -> list[int]:
        """Of each part, as equal as can be; of fewer patches than parts each is one."""
        parts = min(self.parts, patches)
        return [patches * (i + 1) // parts - patches * i // parts for i in range(parts)]
