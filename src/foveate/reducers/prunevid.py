"""PruneVid, in front of the language model: scenes, in which what stands still is merged over time and all is clustered (arXiv
2412.16117).

    windows: the frames' means in int(0.25 F) clusters by density peaks (k = 7); runs of one cluster, smoothed (see `smoothed`)
    static places of a window of L frames: (sum over all pairs of frames f, g of cos(x[f, p], x[g, p]) - L) / (L (L - 1)) > tau
    they become their means over the window; the other places are taken frame by frame
    each of these groups of n > 14 tokens is clustered to int(ratio n) by density peaks (k = 7), a cluster becomes its mean

How many tokens leave follows from the content: a clip that stands still leaves few, one in which everything moves int(ratio P) a frame.

Where this differs from the authors' code: tokens are in raster order, a static one at its centre's place in the window's first frame
(theirs: by window, static ones first, clusters by their rank); density peaks are found without noise (see `foveate.reducers.density`);
clips of fewer than seven frames are served (theirs raises), in windows by as many neighbours as there are frames. A place that some frame
of a window lacks is not static. The second stage, which selects by a question's attention at layer 10, is not built; `fastv:layer=10` and
the like come near to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.nn.functional import normalize

from foveate.contract import Cut, View, Workload
from foveate.errors import FoveateError
from foveate.reducers.common import meant, states
from foveate.reducers.density import density_peaks
from foveate.reducers.frames import Edges, OverFrames, clips, means, mixed, selected, settled
from foveate.tokens import budget

_NEIGHBOURS, _SMALL = 7, 14


@dataclass(frozen=True)
class PruneVid(OverFrames):
    """Clusters static and moving tokens of each scene to the share `ratio`; 1.0 changes nothing.

    tau: mean cosine from which on a place stands still. scenes: clusters of frames, as a share of them. scope: see
    `foveate.reducers.frames`.
    """

    name: ClassVar[str] = "prunevid"
    paper: ClassVar[str] = "2412.16117"
    amounts: ClassVar[tuple[str, ...]] = ("ratio",)
    looks_at: ClassVar[frozenset[str]] = frozenset({"states"})
    examples: ClassVar[tuple[str, ...]] = ("prunevid:ratio=0.5",)
    keeps_all: ClassVar[tuple[str, ...]] = ("prunevid:ratio=1.0",)
    ratio: float = 0.5
    tau: float = 0.8
    scenes: float = 0.25
    scope: str = "image"
    positions: str = field(default="renumber", kw_only=True)

    def check(self) -> None:
        super().check()
        for option in ("ratio", "tau", "scenes"):
            value = getattr(self, option)
            if type(value) is not float or not (0.0 < value <= 1.0 or (option == "tau" and -1.0 <= value <= 1.0)):
                raise FoveateError(f"prunevid: {option}={value!r} is not possible; give a share in (0, 1] as a float")

    def at(self, keep: float) -> Self:
        """At most about so many: those of a clip in which everything moves."""
        budget(float(keep), 1)
        return replace(self, ratio=float(keep))

    def _clustered(self, tokens: int) -> int:
        return max(1, int(meant(self.ratio) * tokens)) if tokens > _SMALL else tokens

    def left(self, frames: Sequence[int]) -> int:
        """At most: windows have two frames at least, over which each static place counts once."""
        if self.ratio == 1.0 or len(frames) < 2:
            return sum(frames) if self.ratio == 1.0 else sum(map(self._clustered, frames))
        P = max(frames)
        most = [max(min(n, _SMALL), self._clustered(n)) for n in range(P + 1)]  # of so many tokens or fewer
        worst = max(most[S] + 2 * most[P - S] for S in range(P + 1))
        return min(sum(frames), -(-len(frames) * worst // 2))

    def exact(self, work: Workload) -> bool:
        return self.ratio == 1.0 or not sum(work.leaving_clips(lambda frames: int(len(frames) > 1), self.scope))

    def reduce(self, view: View, stage: int = 0) -> Cut:
        x = states(self.name, view).detach().flatten(0, 1)
        if self.ratio == 1.0:
            return Cut(mixed(view.layout, [selected(view.layout.visual.flatten().nonzero()[:, 0])]))
        return Cut(mixed(view.layout, [edges for table in clips(view.layout, self.scope) for edges in self._groups(x, table)]))

    def _groups(self, x: Tensor, table: Tensor) -> list[Edges]:
        """The edges of each group of a clip's tokens."""
        found = []
        for window in scenes(means(x, table), self.scenes):
            own = table[window[0] : window[-1] + 1]
            static = standing(x, own) > self.tau if len(own) > 1 else torch.zeros_like(own[0], dtype=torch.bool)
            groups = [own[:, static], *(row[(row >= 0) & ~static][None] for row in own)]
            found += [merged(x, slots, self._clustered(slots.shape[1])) for slots in groups if slots.shape[1]]
        return found


def merged(x: Tensor, slots: Tensor, number: int) -> Edges:
    """Edges of the places (L, n) of some frames: means over the frames, and clusters of them where there are more than `number`."""
    L, n = slots.shape
    if number < n:
        centres, label = density_peaks(x[slots].double().mean(0), number, _NEIGHBOURS)
    else:
        centres = label = torch.arange(n, device=slots.device)
    weight = 1.0 / (L * torch.bincount(label, minlength=len(centres))[label].double())
    return slots[0, centres[label]].expand(L, n).flatten(), slots.flatten(), weight.expand(L, n).flatten()


def standing(x: Tensor, table: Tensor) -> Tensor:
    """(P,) float64 the mean cosine between the states of each place in all pairs of frames; -inf where a frame lacks the place."""
    L = len(table)
    unit = normalize(x[table.clamp(min=0)].double(), dim=-1)
    pairs = (unit.sum(0).square().sum(-1) - unit.square().sum((0, 2))) / (L * (L - 1))
    return torch.where((table >= 0).all(0), settled(pairs), float("-inf"))


def scenes(frames: Tensor, share: float) -> list[range]:
    """The windows of a clip, from its frames' means (F, D)."""
    F = len(frames)
    if F < 2:
        return [range(F)]
    label = density_peaks(frames, int(meant(share) * F), _NEIGHBOURS)[1].tolist()
    return runs(smoothed(label))


def runs(labels: Sequence[int]) -> list[range]:
    """The stretches of equal labels."""
    starts = [i for i, label in enumerate(labels) if i == 0 or label != labels[i - 1]]
    return [range(a, b) for a, b in zip(starts, [*starts[1:], len(labels)], strict=True)]


def smoothed(labels: Sequence[int]) -> list[int]:
    """Labels of frames without flicker. Of each label its longest runs stay, unless they are of one frame; from left to right, each stretch
    of frames that has lost its label takes that of the longer run beside it, of equal ones the left one, which counts what it was given.
    Where none is left, all are one."""
    longest: dict[int, int] = {}
    for run in runs(labels):
        longest[labels[run[0]]] = max(longest.get(labels[run[0]], 0), len(run))
    parts: list[tuple[int, int]] = []  # (label, -1 for none; frames), no two without label side by side
    for run in runs(labels):
        label = labels[run[0]] if 1 < len(run) == longest[labels[run[0]]] else -1
        if parts and label == parts[-1][0] == -1:
            parts[-1] = -1, parts[-1][1] + len(run)
        else:
            parts.append((label, len(run)))
    if len(parts) == 1:
        return [max(parts[0][0], 0)] * len(labels)
    found: list[tuple[int, int]] = []
    for i, (label, length) in enumerate(parts):
        if label < 0:
            left, right = found[-1] if found else (-1, 0), parts[i + 1] if i + 1 < len(parts) else (-1, 0)
            label = left[0] if left[1] >= right[1] else right[0]
        before = found.pop()[1] if found and found[-1][0] == label else 0
        found.append((label, before + length))
    return [label for label, length in found for _ in range(length)]
