"""FastVID: in each segment of a clip, salient tokens of every frame and a few anchors that the others are merged into (arXiv 2503.11187).

    segments: cut where cos(g_f, g_f+1) < tau, and at the least similar frames until there are 8     g: the mean of a frame's tokens
    a segment of L frames keeps T_s tokens: C = int(d T_s) context tokens and T_s - C salient ones
    salient: shared out evenly among its frames, those of the highest attention in each, unchanged
    anchor frames: the last one and every p-th before it; the C context tokens are shared out evenly among them, and are the density peaks
                   (k = 4) of what is not salient in that frame
    each token of the segment that is neither salient nor a context token of this anchor frame goes to the most similar (cosine) of them:
                   x <- w x + (1 - w) mean(G),  w = max(1 / (|G| + 1), beta),  of the G that came to it; a token may go to several anchors

Experimental: on SigLIP the authors take frame features and attention from the tower's pooling head, which the models of transformers do
not have. Here a frame's feature is its mean, as in their code for Qwen2.5-VL, and the attention that of [CLS], where there is none the
attention received; what that costs is not verified.

Where this differs from the authors' code, of which this is the form for LLaVA-Video: a clip keeps exactly T tokens, shared out among its
segments by their sizes and largest remainders; context tokens for which the anchors have no room stand in other frames; density peaks are
found without noise (see `foveate.reducers.density`); clips of fewer than eight frames, and budgets that leave a segment no context token,
are served (theirs raises). Cosines are rounded to six decimals. keep=1 leaves everything as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from foveate.contract import ClsAttention, Cut, Signal, View
from foveate.reducers.common import cosines, dealt, integers, meant, shares, states
from foveate.reducers.density import density_peaks
from foveate.reducers.frames import Edges, OverFrames, best, clips, mixed, quotas, selected, settled
from foveate.tokens import budget

_NEIGHBOURS = 4


@dataclass(frozen=True)
class FastVID(OverFrames):
    """Keeps `keep` (share or number) of each clip's tokens.

    segments, tau: how many at least, and the likeness of frames below which one ends. context: share of context tokens (d). step: frames
    from one anchor to the next (p). beta: weight that a context token keeps at least. layer: tower block of the attention. scope: see
    `foveate.reducers.frames`.
    """

    name: ClassVar[str] = "fastvid"
    paper: ClassVar[str] = "2503.11187"
    experimental: ClassVar[bool] = True
    looks_at: ClassVar[frozenset[str]] = frozenset({"states", "tower"})
    examples: ClassVar[tuple[str, ...]] = ("fastvid:keep=0.5",)
    keeps_all: ClassVar[tuple[str, ...]] = ("fastvid:keep=1.0",)
    multiplies: ClassVar[tuple[str, ...]] = ("fastvid:keep=0.5",)
    keep: float | int = 0.1
    segments: int = 8
    tau: float = 0.9
    context: float = 0.4
    step: int = 4
    beta: float = 0.6
    layer: int = -1
    scope: str = "image"

    def check(self) -> None:
        super().check()
        budget(self.keep, 1)
        integers(self, layer=None)
        integers(self, segments=1, step=1)
        cosines(self, "tau")
        shares(self, "context", "beta")

    def needs(self) -> tuple[Signal, ...]:
        return (ClsAttention(self.layer),)

    def left(self, frames: Sequence[int]) -> int:
        return budget(self.keep, sum(frames))

    def reduce(self, view: View, stage: int = 0) -> Cut:
        x, attention = states(self.name, view).detach().flatten(0, 1), view.signal(ClsAttention(self.layer)).flatten()
        found: list[Edges] = []
        for table in clips(view.layout, self.scope):
            for part, number in quotas(x, table, self.segments, self.tau, self.left([int((table >= 0).sum())])):
                found += self._segment(x, attention, part, number)
        return Cut(mixed(view.layout, found))

    def _segment(self, x: Tensor, attention: Tensor, table: Tensor, number: int) -> list[Edges]:
        """The edges of a segment of which so many tokens are to be left."""
        frames = [row[row >= 0] for row in table]
        sizes = [len(slots) for slots in frames]
        if number == sum(sizes):
            return [selected(torch.cat(frames))]
        context = int(meant(self.context) * number)
        salient = [best(attention[slots], n) for slots, n in zip(frames, _even(number - context, sizes), strict=True)]
        found = [selected(slots[at]) for slots, at in zip(frames, salient, strict=True)]
        rest = [slots[_without(len(slots), at)] for slots, at in zip(frames, salient, strict=True)]
        # The anchors from the segment's end on: what does not go out evenly goes to the last. Where they are too small, to other frames.
        order = sorted(range(len(rest)), key=lambda f: ((len(rest) - 1 - f) % self.step > 0, -f))
        anchors = order[: -(-len(rest) // self.step)]
        numbers = _even(context, [len(rest[f]) for f in anchors])
        for f in order[len(anchors) :]:
            if sum(numbers) < context:
                anchors.append(f)
                numbers.append(min(context - sum(numbers), len(rest[f])))
        pool = torch.cat(rest)
        for f, n in zip(anchors, numbers, strict=True):
            if n:
                found.append(self._merged(x, rest[f], pool, n))
        return found

    def _merged(self, x: Tensor, own: Tensor, pool: Tensor, number: int) -> Edges:
        """The edges of `number` context tokens out of an anchor's `own` tokens, with those of the pool that join them."""
        centres = own[density_peaks(x[own], number, _NEIGHBOURS)[0].sort().values]
        others = pool[~torch.isin(pool, centres)]
        a, b = (normalize(x[slots].double(), dim=-1) for slots in (others, centres))
        home = settled(torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").square()).argmin(1)  # 2 - 2 cosine
        count = torch.bincount(home, minlength=len(centres))
        keep = torch.where(count > 0, (1.0 / (count + 1)).clamp(min=self.beta), 1.0).double()
        weight = ((1 - keep) / count.clamp(min=1))[home]
        return torch.cat([centres, centres[home]]), torch.cat([centres, others]), torch.cat([keep, weight])


def _even(total: int, sizes: Sequence[int]) -> list[int]:
    """`total` tokens, evenly, the first getting what is left over; no more than there are."""
    return dealt(total, [1.0] * len(sizes), sizes)


def _without(length: int, places: Tensor) -> Tensor:
    """(length,) bool, False at the places."""
    kept = torch.ones(length, dtype=torch.bool, device=places.device)
    kept[places] = False
    return kept
