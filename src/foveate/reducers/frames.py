"""What the methods for videos share: clips as tables of frames and places, what changes between frames, and budgets of frames.

A clip is a video; where a model takes the frames of a video for the crops of one picture (SmolVLM), these. With scope="sample" all
pictures of a prompt are the frames of one clip, for models that have no videos and take their frames for pictures (InternVL,
PerceptionLM, Video-LLaVA).

As a table a clip is (F, P) int64: the slot of each place (row, column) in each frame, counted over the batch, and -1 where the frame lacks
the place, as when the processor has left out what did not change (VideoLLaMA 3). Frames stand in their order, places in raster order;
where rows and columns are not known, a place is the rank in its frame.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize, pad

from foveate.contract import BeforeLM, Signal, Site, Workload
from foveate.reducers.base import Reducer
from foveate.reducers.common import choose, dealt, groups
from foveate.tokens import Layout, TokenMap

_DECIMALS = 6  # of cosines and scores, so that what is equal but for rounding ties


class OverFrames(Reducer):
    """A method that acts once, in front of the language model, on each clip by itself.

    scope  "image": each item of the prompt is a clip; "sample": all of a prompt's pictures are the frames of one
    """

    video = True
    scope: str = "image"

    @abstractmethod
    def left(self, frames: Sequence[int]) -> int:
        """Tokens that are left of a clip whose frames have so many each; where the content decides, how many at most."""

    def needs(self) -> tuple[Signal, ...]:
        """What it looks at beside the states."""
        return ()

    def check(self) -> None:
        super().check()
        choose(self, scope=("image", "sample"))

    def sites(self, layers: int) -> list[Site]:
        return [BeforeLM(self.needs())]

    def count(self, work: Workload, stage: int = 0) -> list[int]:
        return work.leaving_clips(self.left, self.scope)


# ---- clips


def clips(layout: Layout, scope: str = "image") -> list[Tensor]:
    """The table (F, P) of each clip of the batch."""
    place, found = layout.place.flatten(0, 1), []
    for slots in groups(layout, scope):
        frame = torch.unique(place[slots, :3], dim=0, return_inverse=True)[1]
        cell = place[slots, 3:]
        if bool((cell < 0).any()) or len(torch.unique(torch.cat([frame[:, None], cell], 1), dim=0)) < len(slots):
            order = frame.argsort(stable=True)
            first = torch.searchsorted(frame[order], frame[order])
            cell = torch.empty_like(frame).scatter(0, order, torch.arange(len(frame), device=frame.device) - first)[:, None]
        cells, where = torch.unique(cell, dim=0, return_inverse=True)
        table = slots.new_full((int(frame.max()) + 1, len(cells)), -1)
        table[frame, where] = slots
        found.append(table)
    return found


def earlier(table: Tensor) -> Tensor:
    """(F, P) int64: the slot of the same place in the nearest frame before that has it, -1 where none has."""
    frame = torch.arange(len(table), device=table.device)[:, None]
    last = pad(torch.where(table >= 0, frame, -1).cummax(0).values, (0, 0, 1, 0), value=-1)[:-1]
    return torch.where(last >= 0, table.gather(0, last.clamp(min=0)), -1)


def unlike(states: Tensor, slots: Tensor, others: Tensor) -> Tensor:
    """1 - cosine of the states of slots and others, two tensors of one shape, float64; infinite where either is -1. A broken state (NaN)
    is unlike any. states: (slots, D)."""
    a, b = (normalize(states[at.clamp(min=0)].double(), dim=-1) for at in (slots, others))
    distance = settled(1 - (a * b).sum(-1)).nan_to_num(nan=float("inf"))
    return torch.where((slots >= 0) & (others >= 0), distance, float("inf"))


def settled(scores: Tensor) -> Tensor:
    """Scores in which what is equal but for rounding is equal."""
    return scores.double().round(decimals=_DECIMALS)


def means(states: Tensor, table: Tensor) -> Tensor:
    """(F, D) float64 the mean of each frame's tokens."""
    there = (table >= 0)[..., None]
    total = torch.where(there, states[table.clamp(min=0)].double(), 0.0).sum(1)
    return total / there.sum(1).clamp(min=1)


def best(scores: Tensor, number: int) -> Tensor:
    """(number,) int64 the places of the highest scores, ascending; of equal ones the first. What is not a number counts as the highest."""
    return scores.argsort(descending=True, stable=True)[:number].sort().values


# ---- budgets


def spaced(frames: int, number: int) -> list[int]:
    """Which of so many frames stand in the middle of `number` equal parts."""
    return [(2 * i + 1) * frames // (2 * number) for i in range(number)]


# ---- segments


def segments(similarity: Sequence[float], at_least: int, below: float) -> list[range]:
    """Frames in segments: cut behind each frame whose similarity to the next one is lower than `below`, and, where that gives fewer than
    `at_least` segments, behind the least similar of the others, of equal ones the first. similarity: (F - 1) numbers."""
    cuts = {f for f, value in enumerate(similarity) if not value >= below}
    for f in sorted(range(len(similarity)), key=lambda f: (similarity[f], f)):
        if len(cuts) < at_least - 1:
            cuts.add(f)
    ends = [*sorted(cuts), len(similarity)]
    starts = [0, *(cut + 1 for cut in ends[:-1])]
    return [range(start, end + 1) for start, end in zip(starts, ends, strict=True)]


def quotas(states: Tensor, table: Tensor, at_least: int, below: float, left: int) -> list[tuple[Tensor, int]]:
    """The segments of a clip, cut where the mean states of two frames in a row are less alike than `below` (see `segments`), each with its
    share of the `left` tokens by how many it has. states: (slots, D)."""
    mean = means(states, table)
    like = settled(cosine_similarity(mean[:-1], mean[1:], dim=-1)).tolist()
    parts = [table[part[0] : part[-1] + 1] for part in segments(like, at_least, below)]
    sizes = [int((part >= 0).sum()) for part in parts]
    return list(zip(parts, dealt(left, sizes, sizes), strict=True))


# ---- maps


Edges = tuple[Tensor, Tensor, Tensor]
"""Of edges between visual slots, counted over the batch: target, source, and the weight (float64) of the source in it; (E,) each."""


def selected(slots: Tensor) -> Edges:
    """The edges of tokens that stay as they are."""
    return slots, slots, torch.ones(len(slots), dtype=torch.float64, device=slots.device)


def mixed(layout: Layout, edges: Sequence[Edges]) -> TokenMap:
    """The map with these edges; a source may go into several targets. A target stands at its slot; visual slots that are no target go. All
    else stays."""
    B, N = layout.shape
    nothing = selected(layout.kind.new_zeros(0))
    target, source, weight = (torch.cat(parts) for parts in zip(nothing, *edges, strict=True))
    if not len(target) or bool(((target == source) & (weight == 1)).all()):
        kept = torch.zeros(B * N, dtype=torch.bool, device=layout.kind.device)
        kept[target] = True
        return TokenMap.keep(layout, kept.view(B, N))
    other = (~layout.visual & layout.valid).flatten().nonzero()[:, 0]
    edge, owner = torch.unique(torch.cat([target, other]) * (B * N) + torch.cat([source, other]), return_inverse=True)
    weight = torch.zeros(len(edge), dtype=torch.float64, device=edge.device).index_add(
        0, owner, torch.cat([weight.double(), torch.ones(len(other), dtype=torch.float64, device=edge.device)])
    )
    target, source = edge // (B * N), edge % (B * N)
    slot, at, counts = torch.unique(target, return_inverse=True, return_counts=True)
    row = slot // N
    column = torch.arange(len(slot), device=slot.device) - torch.searchsorted(row, row)
    rank = torch.arange(len(target), device=slot.device) - (counts.cumsum(0) - counts)[at]
    M, E = int(column.max()) + 1, int(counts.max())
    member = slot.new_full((B, M, E), -1)
    share = torch.zeros((B, M, E), dtype=torch.float64, device=slot.device)
    member[row[at], column[at], rank] = source % N
    share[row[at], column[at], rank] = weight
    representative = slot.new_full((B, M), -1)
    representative[row, column] = slot % N
    return TokenMap.merge(layout, member, share, representative)
