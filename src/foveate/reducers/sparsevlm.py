"""SparseVLM: visual tokens ranked by the text tokens that matter for the image, the dropped ones partly recycled (arXiv 2410.04417, v1).

    raters   once, on the input embeddings:  P = softmax over text (H_v H_q^T),  r = mean over visual rows of P,  rater iff r >= mean of r
    score    s_n = mean over raters and heads of A[layer - 1][h, rater, n]
    recycle  of n dropped tokens the best n' = floor(0.3 n) + 1, in floor(n' / 10) + 1 clusters, one token each

in front of decoder layer indices 3, 7 and 16: the code's list 2, 6, 15 names the layers *after* which it acts, with their own maps.
A recycled token is the sum of its cluster (`merge="sum"`, the paper) or the mean ("mean", the code). Clusters are density peaks:
distances are Euclidean over the square root of the width; density is exp(-mean squared distance to the k nearest tokens), k the number
of clusters, the token itself being the nearest (so that all are equally dense where there is one cluster); centres have the largest
product of density and distance to the nearest denser token (the densest: to the farthest of all); every other token joins its nearest
centre. So it is in the code; the paper leaves it to its reference.

The budgets are the code's lists for 576 tokens, by name: "v1-192", "v1-128", "v1-96", "v1-64", "v2-192", "v2-128", "v2-96", "v2-64".
Of version 2.0 only the lists are here, not its score (gravity correction, 14 heads); it recycles nothing and keeps positions, so write
recycle=false,positions=keep with its lists. The nominal number counts neither the full layers nor the recycled tokens: "v1-192" runs
576 x 3, 309 x 4, 204 x 9 and 113 x 16 in 32 layers, 206.5 on average.

Where this differs from the paper: it removes a multiple of N - rank(P) tokens, a number that is known only after looking; here, as in the
code, the budget is given. Where this differs from the authors' code: a budget as large as the image drops nothing (theirs always drops
one); a rater may equal the mean (theirs must exceed it, so that a single text token or equal ones leave no rater at all); clusters are
deterministic (theirs adds random noise of 1e-6), ties going to the lower raster index; a recycled token stands at its centre's place, and
behind the image's kept ones, the highest peak first, only with order="append" (theirs); each image has raters and clusters of its own, in
any batch. Only text behind an image rates it, since in a causal model other text cannot see it; an image that no text follows is rated by
the prompt's last slot. Sums that float16 cannot hold are an error (`TokenMap.apply`): load the model in bfloat16, or take merge="mean".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from foveate.contract import Attention, AttentionRows, Cut, FromLayer, Site, View, Workload, products
from foveate.errors import FoveateError
from foveate.reducers.base import Reducer
from foveate.reducers.common import OF, check_entries, choose, cutting_layers, images, into, leaving, numbers, questions, spelled
from foveate.reducers.density import density_peaks
from foveate.tokens import TokenMap, budget, top

LISTS = {
    "v1-192": (300, 200, 110),
    "v1-128": (303, 110, 36),
    "v1-96": (238, 48, 26),
    "v1-64": (66, 30, 17),
    "v2-192": (300, 200, 118),
    "v2-128": (238, 108, 60),
    "v2-96": (246, 54, 28),
    "v2-64": (66, 34, 20),
}


@dataclass(frozen=True)
class SparseVLM(Reducer):
    """Keeps `keep` of each image's tokens in front of each decoder layer of `layers`, and recycles some of the rest.

    keep     a name of LISTS, or one entry a layer, "300-200-110" or (0.5, 0.35, 0.2), without the recycled; one entry holds at each
    layers   indices (0-based, at least 1, ascending): "3-7-16" or (3, 7, 16); a layer that the model does not have never acts
    recycle  whether dropped tokens come back in clusters;  merge  "sum" or "mean" of a cluster;  order  "raster" or "append"
    of       whether a share is one of what the image had in front of the first layer, or of the tokens that arrive
    """

    name: ClassVar[str] = "sparsevlm"
    paper: ClassVar[str] = "2410.04417"
    beyond: ClassVar[bool] = True
    looks_at: ClassVar[frozenset[str]] = frozenset({"text", "attention", "states"})
    examples: ClassVar[tuple[str, ...]] = (
        "sparsevlm:keep=0.5,layers=3",
        "sparsevlm:keep=8-4,layers=1-3",
        "sparsevlm:keep=8-4,layers=1-3,merge=mean,order=append,positions=keep",
    )
    keeps_all: ClassVar[tuple[str, ...]] = ("sparsevlm:keep=1.0,layers=3", "sparsevlm:keep=1.0,layers=1-3,order=append")
    multiplies: ClassVar[tuple[str, ...]] = ("sparsevlm:keep=0.5,layers=1",)
    keep: float | int | str | Sequence[float | int] = "v1-192"
    layers: int | str | Sequence[int] = "3-7-16"
    recycle: bool = True
    merge: str = "sum"
    order: str = "raster"
    of: str = "original"
    positions: str = field(default="renumber", kw_only=True)

    def check(self) -> None:
        super().check()
        layers = self._layers
        if isinstance(self.keep, str) and self.keep.startswith("v") and self.keep not in LISTS:
            raise FoveateError(f"sparsevlm: keep={self.keep!r} is no list of the code's; choose one of {', '.join(LISTS)}, or give numbers")
        check_entries(self.name, self.keep, self._entries, layers)
        choose(self, recycle=(True, False), merge=("sum", "mean"), order=("raster", "append"), of=OF)

    def canonical(self) -> dict[str, Any]:
        keep = self.keep if isinstance(self.keep, str) and self.keep in LISTS else spelled(self._entries)
        return {"keep": keep, "layers": spelled(self._layers)}

    @property
    def _entries(self) -> list[int | float]:
        return list(LISTS[self.keep]) if isinstance(self.keep, str) and self.keep in LISTS else numbers(self.name, "keep", self.keep)

    @property
    def _layers(self) -> list[int]:
        return cutting_layers(self.name, self.layers)

    def sites(self, layers: int) -> list[Site]:
        return [FromLayer(k, (Attention(k - 1),)) for k in self._layers]

    def reduce(self, view: View, stage: int = 0) -> Cut:
        score = self._score(view, view.signal(Attention(self._layers[stage] - 1)))
        kept = top(view.layout, score, 1.0, original_BN=leaving(view, lambda a, o: self._kept(a, o, stage)))
        if not self.recycle or not bool((view.layout.visual & ~kept).any()):
            return Cut(TokenMap.keep(view.layout, kept))
        return Cut(self._recycled(view, kept, score))

    def count(self, work: Workload, stage: int = 0) -> list[int]:
        def left(arriving: int, original: int) -> int:
            kept = self._kept(arriving, original, stage)
            return kept + (_clusters(arriving - kept) if self.recycle else 0)

        return work.leaving(left)

    def score_flops(self, sizes: Workload, stage: int = 0) -> int:
        """At most: as if all text came behind every image and rated it. How much does is known only after looking."""
        return products(((image.tokens, sizes.text) for image in sizes.images), sizes.width) + len(sizes.images) * sizes.rows(sizes.text)

    def _kept(self, arriving: int, original: int, stage: int) -> int:
        entries = self._entries
        entry = entries[0] if len(entries) == 1 else entries[stage]
        return min(arriving, budget(entry, original if self.of == "original" else arriving))

    def _score(self, view: View, attention: AttentionRows) -> Tensor:
        """(B, N) attention from the raters of the slot's image."""
        score = torch.zeros(view.layout.shape, device=view.layout.kind.device)
        for rows, slots in _raters(view):
            score = torch.where(slots, attention.received(rows), score)
        return score

    def _recycled(self, view: View, kept_BN: Tensor, score_BN: Tensor) -> TokenMap:
        """Everything but the dropped, each cluster at its centre."""
        layout, tokens = view.layout, view.tokens
        if tokens is None:
            raise FoveateError("sparsevlm: recycling needs the tokens' states; give View(tokens=…), or recycle=False")
        slot = torch.arange(layout.shape[1], device=kept_BN.device).expand(layout.shape)
        home, place = torch.where(kept_BN, slot, -1), slot * layout.shape[1]
        weight = torch.ones(layout.shape, dtype=torch.float64, device=slot.device)
        for b, image in images(layout):
            kept, dropped = image[kept_BN[b, image]], image[~kept_BN[b, image]]
            best = torch.argsort(score_BN[b, dropped], descending=True, stable=True)[: _candidates(len(dropped))]
            slots = dropped[best.sort().values]
            if len(slots):
                centres, peak = peaks(tokens[b, slots].to(torch.float32), _clusters(len(dropped)))
                home[b, slots] = slots[peak]
                place[b, slots[centres]] = place[b, kept[-1]] + 1 + torch.arange(len(centres), device=slot.device)  # behind the kept
                weight[b, slots] = 1 / peak.bincount()[peak].to(torch.float64)
        return into(layout, home, weight if self.merge == "mean" else None, place if self.order == "append" else None)


def _candidates(dropped: int) -> int:
    """How many of the dropped are clustered; in integers, since int(0.3 * n) has float traps."""
    return 3 * dropped // 10 + 1 if dropped else 0


def _clusters(dropped: int) -> int:
    return _candidates(dropped) // 10 + 1 if dropped else 0


def _raters(view: View) -> list[tuple[Tensor, Tensor]]:
    """(B, N) bool raters and (B, N) bool slots that they rate: first those of each row's first image, then of its second, …"""
    first = view.first or view
    if first.tokens is None:
        raise FoveateError("sparsevlm: raters need the input embeddings; make the view by View.of, or give View(tokens=…)")
    asked, asked_first = questions("sparsevlm", view), questions("sparsevlm", first)
    found: list[tuple[Tensor, Tensor]] = []
    done = [0] * view.layout.shape[0]
    now = torch.where(view.layout.visual, view.layout.image, -1)
    for b, image in images(first.layout):
        left = now[b] == first.layout.image[b, image[0]]
        question = next((q for q in asked if bool((q.about[b] & left).any())), None)
        if question is None:
            continue  # nothing is left of it to be rated
        text = next(q for q in asked_first if bool(q.about[b, image[0]])).text
        before, here = text[b].nonzero()[:, 0], question.text[b].nonzero()[:, 0]
        if len(before) != len(here):
            raise FoveateError(f"sparsevlm: {len(before)} text slots in front of the first layer, {len(here)} here; text is never dropped")
        behind = before > image[-1]
        if len(found) == done[b]:
            found.append((torch.zeros_like(view.layout.valid), torch.zeros_like(view.layout.valid)))
        rows, slots = found[done[b]]
        done[b] += 1
        slots[b] = left
        if bool(behind.any()):
            visual, states = first.tokens[b, image].to(torch.float32), first.tokens[b, before[behind]].to(torch.float32)
            rows[b, here[behind][raters(visual, states)]] = True
        else:
            rows[b, question.asking[b]] = True
    return found


def relevance(visual_LD: Tensor, text_TD: Tensor) -> Tensor:
    """(T,) how much of an image each text token takes; sums to 1."""
    return (visual_LD @ text_TD.T).softmax(-1).mean(0)


def raters(visual_LD: Tensor, text_TD: Tensor) -> Tensor:
    """(T,) bool: the text tokens whose relevance is at least the mean, which is 1 / T (equal ones differ in their last bit)."""
    return relevance(visual_LD, text_TD) * len(text_TD) >= 1 - 1e-5


def peaks(x_TD: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """(clusters,) int64: the density peaks, the highest first, and (T,) the one that each of T tokens belongs to, as indices into them."""
    centres, label = density_peaks(x_TD, clusters, clusters)
    return centres, centres[label]
