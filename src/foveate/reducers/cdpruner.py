"""CDPruner: visual tokens that are relevant to the question and unlike each other, by a determinantal point process (arXiv 2506.10967).

    kernel = diag(r) S diag(r)        S: cosine of the tokens' states, r: their relevance, min-max normalised
    repeat T times: pick the largest gain g_j;  e_i = (kernel_ji - <c_j, c_i>) / sqrt(g_j);  g_i -= e_i^2   (greedy MAP, g starts as r^2)

Ours: the relevance. The paper takes it from CLIP's text tower, which most models do not carry; here it is the cosine between a
token's state and the mean state of the prompt's text in front of the language model (the paper's variant for models without CLIP also
uses the language model's embeddings, but its code was not published, so whether the two agree is unverified). Another relevance is
handed in as the `Relevance` signal: higher is more relevant, at any scale.

Where this differs from the authors' code: they normalise over the whole batch, here each image alone; relevance enters with the paper's
sign (theirs is negated, by the author's word for CLIP only); a gain that has fallen to rounding noise counts as 0 and divides nothing;
constant relevance is 1 everywhere. The exponent on r that theirs has commented out is not offered.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from foveate.contract import BeforeLM, Signal, Site, View, Workload, products
from foveate.errors import FoveateError
from foveate.reducers.common import asked, groups, states
from foveate.reducers.picker import Pick, Picker
from foveate.tokens import SCOPES

NOISE = 1e-6  # share of a token's first gain below which what is left of it is rounding


@dataclass(frozen=True)
class Relevance(Signal):
    """(B, N) how much each token has to do with the question. Not handed in: cosine with the mean state of the prompt's text."""

    def compute(self, view: View) -> Tensor:
        if view.tokens is None:
            raise FoveateError(
                "cdpruner compares the tokens with the question, and the view has no states: make it with View.of(tokens, text=…), or "
                "hand in signals={Relevance(): …}"
            )
        x_BND = view.tokens.detach().to(torch.float32)
        return asked("cdpruner", view, lambda question: _similar(x_BND, question.text))


def _similar(x_BND: Tensor, text_BN: Tensor) -> Tensor:
    """(B, N) cosine of each state with the mean of the text's; row by row, since a sum over another row's padding may round differently."""
    means = [x[text].mean(0) if bool(text.any()) else x.new_zeros(x.shape[1]) for x, text in zip(x_BND, text_BN, strict=True)]
    return cosine_similarity(x_BND, torch.stack(means)[:, None], dim=-1)


@dataclass(frozen=True)
class CDPruner(Picker):
    """Keeps `keep` of each crop's tokens, relevant and diverse, in raster order.

    scope: whose tokens compete, and what `keep` counts: "crop" (the paper's: T per tile), "image", "frame" or "sample".
    """

    name: ClassVar[str] = "cdpruner"
    paper: ClassVar[str] = "2506.10967"
    looks_at: ClassVar[frozenset[str]] = frozenset({"text", "states"})
    examples: ClassVar[tuple[str, ...]] = ("cdpruner:keep=0.5",)
    keeps_all: ClassVar[tuple[str, ...]] = ("cdpruner:keep=1.0",)
    multiplies: ClassVar[tuple[str, ...]] = ("cdpruner:keep=0.5",)
    scopes: ClassVar[tuple[str, ...]] = SCOPES
    keep: float | int = 64
    scope: str = "crop"
    positions: str = field(default="renumber", kw_only=True)

    def sites(self, layers: int) -> list[Site]:
        return [BeforeLM((Relevance(),))]

    def picking(self, view: View) -> Pick:
        layout, x = view.layout, states(self.name, view).detach().flatten(0, 1)
        relevance = view.signal(Relevance()).detach().flatten().clone()
        for slots in groups(layout, "image"):
            relevance[slots] = min_max(relevance[slots])

        def pick(slots: Tensor, left: int) -> Tensor:
            unit, r = normalize(x[slots].to(torch.float32), dim=-1), relevance[slots]
            similarity = (unit @ unit.T).fill_diagonal_(1.0)  # exactly, so that equal relevance ties
            return greedy_map(r[:, None] * similarity * r, left)[0]

        return pick

    def score_flops(self, sizes: Workload, stage: int = 0) -> int:
        reduced = self.reduced(sizes)
        picking = sum(left * (left - 1) * n for n, left in reduced)  # the k-th pick multiplies n columns with the k - 1 before it
        return products(((n, n) for n, _ in reduced), sizes.width) + picking


def min_max(relevance_L: Tensor) -> Tensor:
    """Of one image, to (0, 1]; the least relevant token keeps a trace, so that its diversity still tells ties apart."""
    low, high = relevance_L.min(), relevance_L.max()
    return torch.where(high > low, (relevance_L - low + 1e-6) / (high - low), 1.0)


def greedy_map(kernel_NN: Tensor, picks: int) -> tuple[Tensor, Tensor]:
    """(picks,) int64 indices in the order of the picks, and their gains; ties go to the lower index."""
    gain = kernel_NN.diagonal().clone()
    noise, taken = gain * NOISE, torch.zeros_like(gain, dtype=torch.bool)
    factor = kernel_NN.new_zeros(picks, gain.shape[0])  # row t: what pick t explains of every token
    chosen, gains = [], []
    for step in range(picks):
        best = gain.masked_fill(taken, float("-inf")).argmax(0, keepdim=True)
        won = gain.index_select(0, best)
        before = factor[:step]
        rest = kernel_NN.index_select(0, best)[0] - before.index_select(1, best)[:, 0] @ before
        factor[step] = torch.where(won > 0, rest / won.clamp(min=torch.finfo(won.dtype).tiny).sqrt(), 0.0)
        gain = gain - factor[step] ** 2
        gain = torch.where(gain <= noise, 0.0, gain)  # what is not a number stays so, and is picked next
        taken = taken.index_fill(0, best, True)
        chosen.append(best)
        gains.append(won)
    return torch.cat(chosen), torch.cat(gains)
