"""AIM: merging before the language model, then pruning layer by layer inside it (arXiv 2412.03248).

    merge   bipartite matching on the cosine of the embeddings, halving each frame (an image is one) until `keep` is met: plain means
    prune   in front of layer l:  M = softmax(logits / temperature) of the layer before, x <- 1/n, five times x <- x M in each head;
            importance sqrt(mean over heads of x^2); of the N visual tokens after merging the best r_l N stay, text always does

The card's schedule is for 28 layers: r falls by 1/8 a layer from layer 14 (.875) to layer 21 (0). Here `start` and `stop` are shares of
the depth, so that the `steps` falls are spread over as many layers as that leaves; at least one layer lies between two of them, and
those that a shallow model has no layer for never happen. Vicuna in the authors' code: start=13, stop=20.

Unverified: the paper's own importance formula (a second-hand note has the mean attention received, weighted by the senders' scores);
that r_l is what enters layer l rather than what leaves it; the published settings for images (their code covers video only).

Where this differs from the authors' code: pruned tokens really go (theirs are masked); passes stop at `keep` exactly (theirs halve
n0 // 2, n0 // 4, … times); counts are rounded half up (theirs truncates); every image is ranked on its own (theirs: all visual tokens
of a sequence), by a walk over the prompt alone, never the answer; raster order is restored after merging (`order="matching"`: theirs,
unmerged tokens by similarity, then destinations). `weighted=True` counts a token merged twice as often as it has patches; theirs and the
default do not.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor

from foveate.contract import Attention, AttentionRows, BeforeLM, Cut, FromLayer, Question, Site, View, Workload
from foveate.errors import FoveateError
from foveate.reducers.base import Reducer
from foveate.reducers.common import asked, attention_before, choose, integers, states
from foveate.reducers.tome import merge_flops, merge_groups
from foveate.tokens import SCOPES, TokenMap, budget, top

MOST = 1000  # steps and walks
ELEMENTS = 1 << 26  # of the attention map that are held at once


@dataclass(frozen=True)
class AIM(Reducer):
    """Merges to `keep` of each frame before the language model (stage 0), prunes in `steps` stages inside it (stages 1 to `steps`).

    start, stop: layers of the first and the last pruning, as a share of the depth (float) or an index (int). steps=0: merging only.
    keep=1.0: pruning only. walks, temperature: of the walk over the attention map.
    positions: of the merged tokens; pruning leaves ids unchanged (`positions_at`).
    """

    name: ClassVar[str] = "aim"
    paper: ClassVar[str] = "2412.03248"
    looks_at: ClassVar[frozenset[str]] = frozenset({"text", "attention", "states"})
    examples: ClassVar[tuple[str, ...]] = ("aim:keep=0.5,steps=2", "aim:keep=0.5,start=1,stop=3,steps=3")
    keeps_all: ClassVar[tuple[str, ...]] = ("aim:keep=1.0,steps=0",)
    multiplies: ClassVar[tuple[str, ...]] = ("aim:keep=0.5,steps=2",)
    beyond: ClassVar[bool] = True
    keep: float | int = 0.125
    start: float | int = 0.5
    stop: float | int = 0.75
    steps: int = 8
    walks: int = 5
    temperature: float = 0.1
    weighted: bool = False
    order: str = "raster"
    scope: str = "frame"
    positions: str = field(default="renumber", kw_only=True)

    def check(self) -> None:
        super().check()
        budget(self.keep, 1)
        integers(self, steps=0, walks=1)
        if max(self.steps, self.walks) > MOST:
            raise FoveateError(f"aim: steps={self.steps}, walks={self.walks} would not end; give at most {MOST} (the authors: 8 and 5)")
        choose(self, weighted=(True, False), order=("raster", "matching"), scope=SCOPES)
        for option in ("start", "stop"):
            value = getattr(self, option)
            if not (type(value) is int and value >= 1) and not (type(value) is float and 0 < value <= 1):
                raise FoveateError(f"aim: {option}={value!r} is not possible; give a share of the depth in (0, 1] or a layer index >= 1")
        if type(self.start) is type(self.stop) and self.stop < self.start:
            raise FoveateError(f"aim: stop={self.stop!r} lies before start={self.start!r}; give a stop of at least {self.start!r}")
        if type(self.temperature) not in (int, float) or not 0 < self.temperature < 1e9:
            raise FoveateError(
                f"aim: temperature={self.temperature!r} is not possible; give a number > 0 and below 1e9 (the authors use 0.1)"
            )

    def sites(self, layers: int) -> list[Site]:
        first, last = (round(at * layers) if isinstance(at, float) else at for at in (self.start, self.stop))
        found: list[Site] = [BeforeLM()]
        before = 0
        for step in range(self.steps):
            planned = first + Fraction((last - first) * step, max(1, self.steps - 1))
            before = max(before + 1, round(planned))
            found.append(FromLayer(before, (Attention(before - 1),)))
        return found

    def share(self, stage: int) -> float:
        """Of the tokens after merging, the share that stage 1 to `steps` leaves."""
        return float(Fraction(self.steps - stage, self.steps))

    def positions_at(self, stage: int) -> str:
        return "keep" if stage else self.positions

    def reduce(self, view: View, stage: int = 0) -> Cut:
        layout = view.layout
        if stage == 0:
            x, raster = states(self.name, view), self.order == "raster"
            return Cut(merge_groups(layout, x, self.keep, scope=self.scope, weighted=self.weighted, raster=raster))
        share = self.share(stage)
        if share == 0:
            return Cut(TokenMap.keep(layout, torch.zeros_like(layout.visual)))
        attention = attention_before(self, view, stage)

        def score(question: Question) -> Tensor:
            walked = walk(attention, question.prompt, walks=self.walks, temperature=self.temperature)
            return attention.mean(walked.square()).sqrt()

        return Cut(TokenMap.keep(layout, top(layout, asked(self.name, view, score), share, original_BN=self._merged(view))))

    def count(self, work: Workload, stage: int = 0) -> list[int]:
        if stage == 0:
            return work.leaving(lambda arriving, _: budget(self.keep, arriving), self.scope)
        if stage >= self.steps:
            return [0] * len(work.images)
        merged = self.count(replace(work, arriving=tuple(image.tokens for image in work.images)))
        return [min(arriving, budget(self.share(stage), n)) for arriving, n in zip(work.arriving, merged, strict=True)]

    def score_flops(self, sizes: Workload, stage: int = 0) -> int:
        """In the language model that of one prompt alone: a batch may be too large to hold its attention maps between the steps."""
        if stage == 0:
            return sum(merge_flops(n, budget(self.keep, n), sizes.width) for n in sizes.groups(self.scope))
        if self.share(stage) == 0:
            return 0
        whole = sizes.heads * sizes.keys * sizes.slots <= ELEMENTS
        return sizes.rows(sizes.slots) * (1 if whole else self.walks) + 2 * self.walks * sizes.heads * sizes.slots**2

    def _merged(self, view: View) -> Tensor:
        """(B, N) int64: how many tokens the slot's image had after merging."""
        first = (view.first or view).layout
        group, image = first.groups(self.scope), first.image
        left = torch.zeros(max(1, int(image.max()) + 1), dtype=torch.int64, device=image.device)
        for g, tokens in enumerate(torch.bincount(group[group >= 0]).tolist()):
            left[int(image[group == g][0])] += budget(self.keep, tokens)
        return left[view.layout.image.clamp(min=0)]


def walk(attention: AttentionRows, valid_BN: Tensor, *, walks: int = 5, temperature: float = 0.1) -> Tensor:
    """(B, H, N) where a walk over the attention map ends: x <- x M, `walks` times, from 1/n on each of the n valid slots.

    softmax(logits / temperature) is the ordinary softmax to the power 1 / temperature, normalised again. Each step goes through blocks of
    the map's rows; a map that is one block is computed once, others anew at each step, so that they are never held whole.
    """
    B, N = valid_BN.shape
    slots = torch.arange(N, device=valid_BN.device).expand(B, N) if attention.slots is None else attention.slots
    layer = replace(attention, slots=None)  # all its keys: what flows to cached or dropped ones is lost, but has its share of each row
    full = layer.weights
    H, K = (layer.query.shape[1], layer.key.shape[2]) if full is None else (full.shape[1], full.shape[3])
    columns = slots + (K - N if attention.slots is None else attention.start)
    padding = torch.zeros((B, K), dtype=torch.int8, device=slots.device)
    padding = padding.scatter_reduce(1, columns, (~valid_BN).to(torch.int8), "amin", include_self=False).to(torch.bool)[:, None, None]
    block = max(1, ELEMENTS // max(1, B * H * K))
    x = (valid_BN / valid_BN.sum(1, keepdim=True).clamp(min=1)).to(torch.float32)[:, None].expand(B, H, N)

    def sharpened(rows: slice) -> Tensor:
        m = layer.rows(slots[:, rows]).masked_fill(padding, 0.0)
        m = (m.log() / temperature).softmax(-1).gather(3, columns[:, None, None].expand(B, H, m.shape[2], N))
        # Neither the rows nor the columns of padding slots: several may stand for one key.
        return torch.where((valid_BN[:, rows, None] & valid_BN[:, None])[:, None], m, 0.0)

    blocks = [slice(start, min(start + block, N)) for start in range(0, N, block)]
    once = sharpened(blocks[0]) if len(blocks) == 1 else None
    for _ in range(walks):
        after = torch.zeros_like(x)
        for rows in blocks:
            after = after + (x[..., None, rows] @ (sharpened(rows) if once is None else once))[..., 0, :]
        x = after
    return x
