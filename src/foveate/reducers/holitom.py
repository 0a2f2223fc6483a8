"""HoliTom, in front of the language model: what stands still is merged over time, the rest is chosen by attention (arXiv 2505.21334).

    z[f, p] = cos(x[f, p], x[f + 1, p]) > tau
    windows: the cut of the clip into runs of frames that saves most tokens; a run s .. e saves (e - s) tokens for each place that is
             static in it, which has z true from s to e - 1
    static places of a window: the mean over its frames, then clustered by density peaks, k = min(7, clusters); a cluster becomes
             beta * centre + (1 - beta) * mean of the others
    the other places, frame by frame: those that receive most attention in the tower, unchanged

Where this differs from the authors' code: the budget of T tokens is shared out among the windows' static places and the frames' other
ones by their numbers and largest remainders (theirs rounds each group apart, mostly upwards), so that never more than T leave; fewer do
where so much stands still that all of it, merged, is less than T. A static token stands at its centre's place in the window's first frame
and all are in raster order, as in their code for models with newlines (in the other, static tokens come first). Density peaks are found
without noise (see `foveate.reducers.density`). A window of one frame has no static place. Clustering dynamic tokens, which in the released
code raises, and its second stage, which merges inside the language model, are not built. keep=1 leaves everything as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from foveate.contract import Cut, ReceivedAttention, Signal, View, Workload
from foveate.reducers.common import cosines, dealt, integers, shares, states
from foveate.reducers.density import density_peaks
from foveate.reducers.frames import Edges, OverFrames, best, clips, mixed, selected, unlike
from foveate.tokens import budget

_NEIGHBOURS = 7


@dataclass(frozen=True)
class HoliTom(OverFrames):
    """Keeps at most `keep` (share or number) of each clip's tokens.

    tau: cosine from which on a place stands still. beta: weight of a cluster's centre. layer: tower block of the attention. scope: see
    `foveate.reducers.frames`.
    """

    name: ClassVar[str] = "holitom"
    paper: ClassVar[str] = "2505.21334"
    looks_at: ClassVar[frozenset[str]] = frozenset({"states", "tower"})
    examples: ClassVar[tuple[str, ...]] = ("holitom:keep=0.5",)
    keeps_all: ClassVar[tuple[str, ...]] = ("holitom:keep=1.0",)
    multiplies: ClassVar[tuple[str, ...]] = ("holitom:keep=0.5",)
    keep: float | int = 0.25
    tau: float = 0.8
    beta: float = 0.6
    layer: int = -1
    scope: str = "image"
    positions: str = field(default="renumber", kw_only=True)

    def check(self) -> None:
        super().check()
        budget(self.keep, 1)
        integers(self, layer=None)
        cosines(self, "tau")
        shares(self, "beta")

    def needs(self) -> tuple[Signal, ...]:
        return (ReceivedAttention(self.layer),)

    def left(self, frames: Sequence[int]) -> int:
        return budget(self.keep, sum(frames))

    def exact(self, work: Workload) -> bool:
        return not sum(work.leaving_clips(lambda frames: int(len(frames) > 1 and self.left(frames) < sum(frames)), self.scope))

    def reduce(self, view: View, stage: int = 0) -> Cut:
        x, attention = states(self.name, view).detach().flatten(0, 1), view.signal(ReceivedAttention(self.layer)).flatten()
        tables = clips(view.layout, self.scope)
        return Cut(mixed(view.layout, [edges for table in tables for edges in self._groups(x, attention, table)]))

    def _groups(self, x: Tensor, attention: Tensor, table: Tensor) -> list[Edges]:
        """The edges of each group of a clip's tokens."""
        total = int((table >= 0).sum())
        left = self.left([total])
        if left >= total:
            return [selected(table[table >= 0])]
        still = 1 - unlike(x, table[:-1], table[1:]) > self.tau
        parts: list[tuple[Tensor, bool]] = []  # static places over a window's frames (L, S), or the other slots of one frame (n,)
        for window in windows(still):
            static = still[window[0] : window[-1]].all(0) if len(window) > 1 else torch.zeros_like(table[0], dtype=torch.bool)
            if bool(static.any()):
                parts.append((table[window[0] : window[-1] + 1, static], True))
            rest = [row[(row >= 0) & ~static] for row in table[window[0] : window[-1] + 1]]
            parts += [(slots, False) for slots in rest if len(slots)]
        sizes = [part.shape[-1] for part, _ in parts]
        found = []
        for (part, static_), number in zip(parts, dealt(left, sizes, sizes), strict=True):
            if number and static_:
                found.append(self._merged(x, part, number))
            elif number:
                found.append(selected(part[best(attention[part], number)]))
        return found

    def _merged(self, x: Tensor, slots: Tensor, number: int) -> Edges:
        """The static places (L, S) of a window as so many tokens."""
        L, S = slots.shape
        if number < S:
            centres, label = density_peaks(x[slots].double().mean(0), number, min(_NEIGHBOURS, number))
        else:
            centres = label = torch.arange(S, device=x.device)
        others = torch.bincount(label, minlength=len(centres)) - 1
        place = torch.arange(S, device=x.device)
        is_centre = centres[label] == place
        alone = others[label] == 0
        weight = torch.where(is_centre, torch.where(alone, 1.0, self.beta), (1 - self.beta) / others[label].clamp(min=1)).double()
        return slots[0, centres[label]].expand(L, S).flatten(), slots.flatten(), (weight / L).expand(L, S).flatten()


def windows(still: Tensor) -> list[range]:
    """The cut of F frames into windows that saves most tokens; still: (F - 1, P) bool, whether a place stands still until the next frame.
    Of equal cuts the one whose last windows are shortest."""
    F = len(still) + 1
    gain = [[0] * F for _ in range(F)]
    for s in range(F - 1):
        static = still[s:].to(torch.int64).cumprod(0).sum(1)
        for step, places in enumerate(static.tolist(), start=1):
            gain[s][s + step] = step * places
    saved, first = [0] * (F + 1), list(range(-1, F))  # of the first i frames, and where their last window begins
    for i in range(1, F + 1):
        saved[i], first[i] = saved[i - 1], i - 1
        for s in range(i - 2, -1, -1):
            if saved[s] + gain[s][i - 1] > saved[i]:
                saved[i], first[i] = saved[s] + gain[s][i - 1], s
    found, end = [], F
    while end:
        found.append(range(first[end], end))
        end = first[end]
    return found[::-1]
