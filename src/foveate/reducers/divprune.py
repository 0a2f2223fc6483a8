"""DivPrune: the subset of visual tokens that is spread widest (arXiv 2503.02175).

Distances are 1 - cosine of the states in front of the language model. The first pick is the token whose nearest other token is
farthest away; each further pick is the token farthest from its nearest pick. This is the greedy 2-approximation of the max-min
problem. No text, no attention; the set for T tokens is part of the set for T + 1.

Where this differs from the authors' code: every image of every row is reduced on its own (theirs: batch element 0, at a fixed
offset); a token is never picked twice (theirs repeats index 0 when all distances are 0); newlines that the layout names as such are
not candidates (theirs are); T is rounded half up. `order="pick"` leaves the survivors in the order of the picks, as for the paper's
tables; the public code sorts them, which its author calls a small gain.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from foveate.contract import BeforeLM, Cut, Site, View, Workload, products
from foveate.reducers.common import choose, groups, into, states
from foveate.reducers.picker import Pick, Picker
from foveate.tokens import SCOPES, budget


@dataclass(frozen=True)
class DivPrune(Picker):
    """Keeps `keep` of each image's tokens, chosen for diversity, in raster order (or `order="pick"`).

    scope: whose tokens compete: "image" (all tiles together, the paper's), "crop", "frame" or "sample". `keep` is per such group.
    """

    name: ClassVar[str] = "divprune"
    paper: ClassVar[str] = "2503.02175"
    looks_at: ClassVar[frozenset[str]] = frozenset({"states"})
    examples: ClassVar[tuple[str, ...]] = ("divprune:keep=0.5", "divprune:keep=0.3,order=pick")
    keeps_all: ClassVar[tuple[str, ...]] = ("divprune:keep=1.0", "divprune:keep=1.0,order=pick")
    multiplies: ClassVar[tuple[str, ...]] = ("divprune:keep=0.5",)
    scopes: ClassVar[tuple[str, ...]] = SCOPES
    keep: float | int = 0.098
    order: str = "raster"
    scope: str = "image"
    positions: str = field(default="renumber", kw_only=True)

    def check(self) -> None:
        super().check()
        choose(self, order=("raster", "pick"))

    def sites(self, layers: int) -> list[Site]:
        return [BeforeLM()]

    def picking(self, view: View) -> Pick:
        x = states(self.name, view).detach().flatten(0, 1)
        return lambda slots, left: spread(x[slots], left)

    def reduce(self, view: View, stage: int = 0) -> Cut:
        if self.order == "raster":
            return super().reduce(view)
        layout, pick = view.layout, self.picking(view)
        place = torch.arange(layout.kind.numel(), device=layout.kind.device)
        home = torch.full_like(place, -1)
        for slots in groups(layout, self.scope):
            left = budget(self.keep, slots.numel())
            picks = slots[pick(slots, left)] if left < slots.numel() else slots
            home[picks] = picks
            place[picks] = picks.sort().values  # the k-th pick takes the k-th place that survives
        return Cut(into(layout, home, place=place))

    def score_flops(self, sizes: Workload, stage: int = 0) -> int:
        return products(((n, n) for n, _ in self.reduced(sizes)), sizes.width)


def spread(states_ND: Tensor, picks: int) -> Tensor:
    """(picks,) int64: indices in the order in which they are picked; ties go to the lower index."""
    unit = normalize(states_ND.to(torch.float32), dim=-1)
    # What is not a number is far from everything: it would make every nearest distance one like itself, and be picked again and again.
    distance = (1 - unit @ unit.T).nan_to_num(nan=float("inf"))
    # Nearest neighbours of each other tie: a matrix product may tell them apart by rounding, a symmetric matrix does not.
    distance = torch.maximum(distance, distance.T)
    # To itself a token is infinitely far before the first pick, and infinitely near once it is picked.
    nearest = distance.fill_diagonal_(float("inf")).min(0).values
    distance.fill_diagonal_(float("-inf"))
    chosen = []
    for step in range(picks):
        best = nearest.argmax(0, keepdim=True)
        chosen.append(best)
        row = distance.index_select(0, best)[0]
        nearest = row if step == 0 else torch.minimum(nearest, row)
    return torch.cat(chosen)
