"""PPE: merged tokens keep several of their members' positions (arXiv 2510.22936).

of a frame's n tokens c = ceil(keep n) are centres by density peaks (5 neighbours; c < 5: min(3, max(c // 2, 1))), every token joins the
nearest, a cluster becomes its mean, and clusters stand in the order of their rank
position j of a cluster, j = 0 … k - 1: its members' from the last one backwards, and round again
each section of the rotary embedding's frequencies (M-RoPE has three, others one) in k equal parts: part j turns by position j

A token of one member has k equal positions, which is as ever; k = 1 is Chat-UniVi's merging, whose token stands where its last member did.
Clusters of labels 1 0 1 0 1 2 at k = 5: 3 1 3 1 3, 4 2 0 4 2 and 5 five times. Text and what is decoded stand where they were.

Where this differs from the authors' code: a k that does not divide every section is refused (theirs then interleaves rows in another way),
density peaks are found without noise (see `foveate.reducers.density`), the mean divides by n and not by n + 1e-6, and any prompt is served.
Their cascade, which merges again inside the language model of a video, is not here.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import ClassVar

import torch

from foveate.contract import BeforeLM, Cut, Site, View, Workload
from foveate.errors import FoveateError
from foveate.reducers.base import Reducer
from foveate.reducers.common import choose, groups, integers, into, meant, states
from foveate.reducers.density import density_peaks
from foveate.tokens import SCOPES

MOST = 1024  # positions of a token


@dataclass(frozen=True)
class PPE(Reducer):
    """Merges tokens into clusters that keep several of their members' positions.

    keep   the share of each group's tokens that stays, as clusters
    k      positions of a token, dividing the frequencies of the rotary embedding
    scope  what is clustered by itself: "frame", "crop", "image" or "sample"
    """

    name: ClassVar[str] = "ppe"
    paper: ClassVar[str] = "2510.22936"
    looks_at: ClassVar[frozenset[str]] = frozenset({"states"})
    between: ClassVar[bool] = True
    examples: ClassVar[tuple[str, ...]] = ("ppe:keep=0.45,k=1", "ppe:keep=0.3,k=2,scope=image")
    keeps_all: ClassVar[tuple[str, ...]] = ("ppe:keep=1.0,k=1", "ppe:keep=1.0,k=2")
    keep: float = 0.45
    k: int = 8
    scope: str = "frame"

    def check(self) -> None:
        super().check()
        integers(self, k=1)
        choose(self, scope=SCOPES)
        if self.k > MOST:
            raise FoveateError(
                f"ppe: k={self.k} is not possible: no rotary embedding has as many frequencies; give a number that divides them"
            )
        if type(self.keep) is not float or not 0.0 < self.keep <= 1.0:
            raise FoveateError(f"ppe: keep={self.keep!r} is not possible; give a share above 0.0, 1.0 at most, as in keep=0.45")
        if self.positions != "keep":
            raise FoveateError(f"ppe: positions={self.positions!r} is not possible, since its tokens stand where they were; leave it out")

    def sites(self, layers: int) -> list[Site]:
        return [BeforeLM()]

    def reduce(self, view: View, stage: int = 0) -> Cut:
        layout, x = view.layout, states(self.name, view).flatten(0, 1)
        home = torch.arange(layout.kind.numel(), device=x.device)
        place, weight = home.clone(), torch.ones(len(home), dtype=torch.float64, device=x.device)
        for slots in groups(layout, self.scope):
            left = self._left(slots.numel())
            if left == slots.numel():
                continue
            _, label = density_peaks(x[slots].detach().float(), left, 5 if left >= 5 else min(3, max(left // 2, 1)))
            last = torch.zeros(left, dtype=torch.int64, device=x.device).scatter_reduce(0, label, slots, "amax")
            home[slots], weight[slots] = last[label], 1 / label.bincount(minlength=left)[label].double()
            place[last] = slots[:left]
        return Cut(into(layout, home, weight, place), several=self.k)

    def count(self, work: Workload, stage: int = 0) -> list[int]:
        return work.leaving(lambda arriving, _: self._left(arriving), self.scope)

    def _left(self, tokens: int) -> int:
        return min(tokens, max(1, ceil(meant(self.keep) * tokens)))
