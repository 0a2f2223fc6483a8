"""VidCom2: more tokens for unusual frames, and in each frame the tokens least like frame and clip (arXiv 2505.14454).

    y = unit vectors of the states on the half of their channels that varies least over the clip (population variance)
    K(z, m) = sum over k = -3 .. 1 of exp(-|z - m|^2 / (2 * 2^k))
    a[f, p] = K(y[f, p], mean of y over the clip)      b[f, p] = K(y[f, p], mean of y over frame f)
    w = softmax over frames of (-mean over p of a[f, p]) / 0.01
    share of frame f = min(r (1 + w_f - 1/F), 1)       r: the share that is kept
    each frame keeps the tokens of the lowest a + b

The temperature is so low that mostly one frame takes the whole bonus. No text, no attention.

Where this differs from the authors' code: a clip keeps exactly T tokens, shared out by the frames' shares and largest remainders, where
theirs rounds each frame apart (21 in place of 20 in their default on 4 frames of 20); every clip of every row is reduced on its own
(theirs switches itself off for batches). Scores are rounded to six decimals, so that equal tokens tie and the first of them goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from foveate.contract import Cut, View
from foveate.reducers.common import dealt, states
from foveate.reducers.frames import OverFrames, best, clips, settled
from foveate.tokens import TokenMap, budget

_TEMPERATURE = 0.01
_WIDTHS = [2.0 * 2.0**k for k in range(-3, 2)]


@dataclass(frozen=True)
class VidCom2(OverFrames):
    """Keeps `keep` (share or number) of each clip's tokens, at least one of each frame where that is enough. scope: see
    `foveate.reducers.frames`."""

    name: ClassVar[str] = "vidcom2"
    paper: ClassVar[str] = "2505.14454"
    looks_at: ClassVar[frozenset[str]] = frozenset({"states"})
    examples: ClassVar[tuple[str, ...]] = ("vidcom2:keep=0.5",)
    keeps_all: ClassVar[tuple[str, ...]] = ("vidcom2:keep=1.0",)
    keep: float | int = 0.25
    scope: str = "image"

    def check(self) -> None:
        super().check()
        budget(self.keep, 1)

    def left(self, frames: Sequence[int]) -> int:
        return budget(self.keep, sum(frames))

    def reduce(self, view: View, stage: int = 0) -> Cut:
        x = states(self.name, view).detach().flatten(0, 1)
        kept = torch.zeros_like(view.layout.visual).flatten()
        for table in clips(view.layout, self.scope):
            frames = (table >= 0).sum(1).tolist()
            left = self.left(frames)
            to_clip, to_frame = likeness(x[table[table >= 0]], frames)
            shares = frame_shares([float(a.mean()) for a in to_clip.split(frames)], left / sum(frames))
            numbers = dealt(left, [share * n for share, n in zip(shares, frames, strict=True)], frames, least=1)
            scores = -settled(to_clip + to_frame)
            for row, score, number in zip(table, scores.split(frames), numbers, strict=True):
                kept[row[row >= 0][best(score, number)]] = True
        return Cut(TokenMap.keep(view.layout, kept.view(view.layout.shape)))


def likeness(states: Tensor, frames: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(n,) float64 each: how like the clip's mean and its frame's mean each state (n, D) is; `frames` are the tokens of each frame."""
    x = states.double()
    calm = settled(x.var(0, correction=0)).argsort(stable=True)[: max(1, x.shape[1] // 2)]
    y = normalize(x[:, calm.sort().values], dim=-1)
    own = torch.cat([part.mean(0, keepdim=True).expand(len(part), -1) for part in y.split(list(frames))])
    return kernel((y - y.mean(0)).square().sum(-1)), kernel((y - own).square().sum(-1))


def kernel(squared: Tensor) -> Tensor:
    """The sum of the five Gaussians, of squared distances."""
    return torch.stack([(-squared / width).exp() for width in _WIDTHS]).sum(0)


def frame_shares(likeness: Sequence[float], keep: float) -> list[float]:
    """The share of its tokens that each frame keeps, from the mean likeness of its tokens to the clip."""
    weight = (-settled(torch.tensor(likeness, dtype=torch.float64)) / _TEMPERATURE).softmax(0)
    return (keep * (1 + weight - 1 / len(likeness))).clamp(max=1.0).tolist()
