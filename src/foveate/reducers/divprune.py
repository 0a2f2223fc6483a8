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

from foveate.errors import FoveateError
from foveate.reducers.base import Reducer
from foveate.signals import View
from foveate.sites import BeforeLM, Cut, Site
from foveate.tokens import SCOPES, Layout, TokenMap, budget


@dataclass(frozen=True)
class DivPrune(Reducer):
    """Keeps `keep` of each image's tokens, chosen for diversity, in raster order (or `order="pick"`).

    scope: whose tokens compete: "image" (all tiles together, the paper's), "crop", "frame" or "sample". `keep` is per such group.
    """

    name: ClassVar[str] = "divprune"
    paper: ClassVar[str] = "2503.02175"
    keep: float | int = 0.098
    order: str = "raster"
    scope: str = "image"
    positions: str = field(default="renumber", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        budget(self.keep, 1)
        for option, possible in (("order", ("raster", "pick")), ("scope", SCOPES)):
            if getattr(self, option) not in possible:
                raise FoveateError(f"divprune: {option}={getattr(self, option)!r} is not possible; choose one of {', '.join(possible)}")

    def sites(self, layers: int) -> list[Site]:
        return [BeforeLM()]

    def reduce(self, view: View, stage: int = 0) -> Cut:
        if view.tokens is None:
            raise FoveateError("divprune looks at the tokens' states and the view has none: make it with View.of(tokens, …)")
        layout, states = view.layout, view.tokens.detach().flatten(0, 1)
        B, N = layout.shape
        kept = torch.zeros(B * N, dtype=torch.bool, device=states.device)
        source = torch.arange(B * N, device=states.device)
        for slots in _slots(layout, self.scope):
            left = budget(self.keep, slots.numel())
            picks = slots[spread(states[slots], left)] if left < slots.numel() else slots
            kept[picks] = True
            source[picks.sort().values] = picks  # the k-th place that survives takes the k-th pick
        token_map = TokenMap.keep(layout, kept.view(B, N))
        if self.order == "raster":
            return Cut(token_map)
        place = token_map.representative
        picked = torch.where(place >= 0, (source.view(B, N) % N).gather(1, place.clamp(min=0)), -1)
        return Cut(TokenMap.merge(layout, picked[..., None], None, picked))

    def count(self, arriving: int, original: int, stage: int = 0) -> int:
        return budget(self.keep, arriving)


def spread(states_ND: Tensor, picks: int) -> Tensor:
    """(picks,) int64: indices in the order in which they are picked; ties go to the lower index."""
    unit = normalize(states_ND.to(torch.float32), dim=-1)
    distance = 1 - unit @ unit.T
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


def _slots(layout: Layout, scope: str) -> list[Tensor]:
    """The slots of each group, ascending, counted over the whole batch."""
    owner = layout.groups(scope).flatten()
    order = owner.argsort(stable=True)[int((owner < 0).sum()) :]
    return list(order.split(torch.unique_consecutive(owner[order], return_counts=True)[1].tolist())) if order.numel() else []
