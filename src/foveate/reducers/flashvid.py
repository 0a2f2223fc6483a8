"""FlashVID, in front of the language model: diverse tokens that the tower attends to, and trees over time of the others (arXiv 2602.08024).

    segments: cut where cos(g_f, g_f+1) < tau, and at the least similar frames until there are 8     g: the mean of a frame's tokens
    a segment of L frames keeps T_s tokens, A = ceil(alpha T_s) of them selected, shared out evenly among its frames
    selection in a frame: max-min with d[i, j] a_j, d = 1 - cosine, a_j the attention that j receives in the tower: first the largest
                   distance to another token, then always the token farthest from what is selected
    trees: every other token points to the most similar one (cosine), at any place, among those of the frame before, if that is > edge;
           not more than leave T_s tokens, the most similar ones. A tree becomes the mean of its tokens at its root, its first frame's
    where there are more than T_s - A trees, they are clustered in each frame by density peaks, k = min(7, clusters); a cluster becomes the
    mean of its trees at its centre's place

Where this differs from the authors' code: a clip keeps exactly T tokens, shared out by largest remainders (theirs rounds up, frame by
frame); a tree's mean is over all of its tokens (theirs divides by its root's children only, so that three equal tokens in a chain become
one and a half); a segment of one frame does not cluster selected tokens again; density peaks are found without noise (see
`foveate.reducers.density`). The selection is that of their configuration's default, `attn_div`; `attn_div_v2`, which multiplies by a dot
product of either sign, is not built. They keep 1.25 times the budget here and cut once more at layer 20: that is
`flashvid:keep=0.3125+fastv:layer=20,keep=0.3` for a budget of a quarter. keep=1 leaves everything as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import ceil
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from foveate.contract import Cut, ReceivedAttention, Signal, View
from foveate.reducers.common import cosines, dealt, integers, meant, shares, states
from foveate.reducers.density import density_peaks
from foveate.reducers.frames import Edges, OverFrames, best, clips, mixed, quotas, selected, settled
from foveate.tokens import budget

_NEIGHBOURS = 7


@dataclass(frozen=True)
class FlashVID(OverFrames):
    """Keeps `keep` (share or number) of each clip's tokens, the share `alpha` of them selected, the others as trees.

    segments, tau: how many at least, and the likeness of frames below which one ends. edge: cosine above which tokens join. layer: tower
    block of the attention. scope: see `foveate.reducers.frames`.
    """

    name: ClassVar[str] = "flashvid"
    paper: ClassVar[str] = "2602.08024"
    looks_at: ClassVar[frozenset[str]] = frozenset({"states", "tower"})
    examples: ClassVar[tuple[str, ...]] = ("flashvid:keep=0.5",)
    keeps_all: ClassVar[tuple[str, ...]] = ("flashvid:keep=1.0",)
    multiplies: ClassVar[tuple[str, ...]] = ("flashvid:keep=0.5",)
    keep: float | int = 0.25
    alpha: float = 0.7
    segments: int = 8
    tau: float = 0.9
    edge: float = 0.8
    layer: int = -1
    scope: str = "image"
    positions: str = field(default="renumber", kw_only=True)

    def check(self) -> None:
        super().check()
        budget(self.keep, 1)
        integers(self, layer=None)
        integers(self, segments=1)
        cosines(self, "tau", "edge")
        shares(self, "alpha")

    def needs(self) -> tuple[Signal, ...]:
        return (ReceivedAttention(self.layer),)

    def left(self, frames: Sequence[int]) -> int:
        return budget(self.keep, sum(frames))

    def reduce(self, view: View, stage: int = 0) -> Cut:
        x, attention = states(self.name, view).detach().flatten(0, 1), view.signal(ReceivedAttention(self.layer)).flatten()
        found: list[Edges] = []
        for table in clips(view.layout, self.scope):
            for part, number in quotas(x, table, self.segments, self.tau, self.left([int((table >= 0).sum())])):
                found += self._segment(x, attention, [row[row >= 0] for row in part], number)
        return Cut(mixed(view.layout, found))

    def _segment(self, x: Tensor, attention: Tensor, frames: list[Tensor], number: int) -> list[Edges]:
        """The edges of a segment of which so many tokens are to be left."""
        sizes = [len(slots) for slots in frames]
        if number == sum(sizes):
            return [selected(torch.cat(frames))]
        numbers = dealt(ceil(meant(self.alpha) * number), [1.0] * len(sizes), sizes)
        found, rest = [], []
        for slots, n in zip(frames, numbers, strict=True):
            picked = torch.zeros(len(slots), dtype=torch.bool, device=slots.device)
            picked[diverse(x[slots], attention[slots], n)] = True
            found.append(selected(slots[picked]))
            rest.append(slots[~picked])
        member, root = self._trees(x, rest, sum(sizes) - number)
        roots, tree, size = root.unique(return_inverse=True, return_counts=True)
        values = torch.zeros((len(roots), x.shape[1]), dtype=torch.float64, device=x.device)
        values = values.index_add(0, tree, x[member].double()) / size[:, None]
        own = [torch.isin(roots, slots) for slots in rest]
        counts = [int(mask.sum()) for mask in own]
        for mask, n in zip(own, dealt(number - sum(numbers), counts, counts), strict=True):
            here = mask.nonzero()[:, 0]
            if not n:
                continue
            if n < len(here):
                centres, label = density_peaks(values[here], n, min(_NEIGHBOURS, n))
            else:
                centres = label = torch.arange(len(here), device=x.device)
            into = torch.full_like(roots, -1)
            into[here] = roots[here[centres[label]]]
            share = torch.zeros(len(roots), dtype=torch.float64, device=x.device)
            share[here] = 1.0 / torch.bincount(label, minlength=len(centres))[label].double()
            joins = into[tree] >= 0
            found.append((into[tree][joins], member[joins], (share / size)[tree][joins]))
        return found

    def _trees(self, x: Tensor, frames: list[Tensor], most: int) -> tuple[Tensor, Tensor]:
        """(slot, the root of its tree) of the tokens of some frames; at most so many of them are no root."""
        member = torch.cat(frames)
        parent, cosine = torch.full_like(member, -1), torch.full((len(member),), float("-inf"), dtype=torch.float64, device=x.device)
        start = len(frames[0])
        for before, now in pairwise(frames):
            if len(before) and len(now):
                near, at = likeness(x[now], x[before]).max(1)
                cosine[start : start + len(now)], parent[start : start + len(now)] = near, before[at]
            start += len(now)
        kept = torch.zeros_like(member, dtype=torch.bool)
        kept[best(cosine, most)] = True
        parent = torch.where(kept & (cosine > self.edge), parent, member)
        root = dict(zip(member.tolist(), member.tolist(), strict=True))
        for slot, above in zip(member.tolist(), parent.tolist(), strict=True):  # frame after frame: a parent comes before its children
            root[slot] = root[above]
        return member, torch.tensor([root[slot] for slot in member.tolist()], dtype=torch.int64, device=x.device)


def likeness(a: Tensor, b: Tensor) -> Tensor:
    """(m, n) float64 cosines between the rows of a and b; what is not a number is like nothing."""
    a, b = (normalize(part.double(), dim=-1) for part in (a, b))
    return settled(1 - torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").square() / 2).nan_to_num(nan=-1.0)


def diverse(states: Tensor, weight: Tensor, number: int) -> Tensor:
    """(number,) int64 the tokens that are spread widest, distances to a token times its weight; of equal ones the first."""
    apart = 1 - likeness(states, states)
    nearest = apart.clone().fill_diagonal_(float("inf")).min(0).values if len(states) > 1 else torch.ones_like(weight).double()
    scale = weight.double().nan_to_num()
    chosen: list[int] = []
    for step in range(number):
        score = nearest * scale
        score[chosen] = float("-inf")
        pick = int(score.argmax())
        chosen.append(pick)
        nearest = apart[pick] if step == 0 else torch.minimum(nearest, apart[pick])
    return torch.tensor(chosen, dtype=torch.int64, device=states.device)
