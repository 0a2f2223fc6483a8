"""FastV: visual tokens ranked by the attention that they receive in an early decoder layer (arXiv 2403.06764).

    s_n = mean over heads of A[layer - 1][h, last prompt token, n]        keep the best `keep` of each image

in front of decoder layer index `layer`: the first `layer` layers see every token. The paper's R is the share removed, 1 - keep.
Survivors stay in raster order and keep their positions, as in the authors' in-place and Hugging Face variants.

The paper and the code are two rules under one name. The paper scores by the average attention received from all other tokens
(`rows="all"`: every query of the prompt but the token itself, and the answer is never looked at); the code by the last row alone
(`rows="last"`, the default here, and what is meant in nearly every comparison).

Where this differs from the authors' code: each image is ranked on its own, in any batch and under any padding (theirs: batch 1, start
and length of the image fixed in the source); newline tokens stay, theirs compete like patches; only the rows that are read are computed,
theirs is eager in every layer; half a token rounds up, not to even; layer 0, where there is no map yet and theirs draws at random, is
an error that says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foveate.contract import BLOCK, Attention, AttentionRows, FromLayer, Question, Site, View, Workload
from foveate.errors import FoveateError
from foveate.reducers.common import asked, choose
from foveate.reducers.ranker import Ranker


@dataclass(frozen=True)
class FastV(Ranker):
    """Keeps `keep` of each image's tokens in front of decoder layer index `layer` (0-based, at least 1).

    rows  "last": the row of the last prompt token; "all": the mean of all other prompt tokens' rows
    of    whether a share is one of the tokens that arrive or of those that the image had in front of the first layer
    """

    name: ClassVar[str] = "fastv"
    paper: ClassVar[str] = "2403.06764"
    looks_at: ClassVar[frozenset[str]] = frozenset({"text", "attention"})
    examples: ClassVar[tuple[str, ...]] = ("fastv:keep=0.5,layer=2", "fastv:keep=0.3,layer=1,rows=all,positions=renumber")
    keeps_all: ClassVar[tuple[str, ...]] = ("fastv:keep=1.0,layer=2", "fastv:keep=16,rows=all")
    multiplies: ClassVar[tuple[str, ...]] = ("fastv:keep=0.5,layer=1", "fastv:keep=0.5,layer=1,rows=all")
    keep: float | int = 0.5
    layer: int = 2
    rows: str = "last"
    of: str = "arriving"

    def check(self) -> None:
        super().check()
        choose(self, rows=("last", "all"))
        if type(self.layer) is not int or self.layer < 1:
            raise FoveateError(
                f"fastv: layer={self.layer!r} is not possible, the attention of the layer before it is needed; give an integer >= 1, "
                f"or in front of the first layer use random:keep={self.keep}"
            )

    def sites(self, layers: int) -> list[Site]:
        return [FromLayer(self.layer, (Attention(self.layer - 1),))]

    def score(self, view: View, stage: int = 0) -> Tensor:
        attention: AttentionRows = view.signal(Attention(self.layer - 1))
        return asked(self.name, view, lambda q: attention.row(q.asking) if self.rows == "last" else _from_others(attention, q))

    def score_flops(self, sizes: Workload, stage: int = 0) -> int:
        return sizes.rows(1 if self.rows == "last" else sizes.slots)


def _from_others(attention: AttentionRows, question: Question) -> Tensor:
    """(B, N) attention that each slot receives from all other slots of the prompt, mean over heads and over these slots."""
    prompt = question.prompt
    B, N = prompt.shape
    slots = torch.arange(N, device=prompt.device)
    total = torch.zeros((B, N), device=prompt.device)
    for index in slots.split(BLOCK):
        part = attention.mean(attention.rows(index.expand(B, -1)))
        asks = prompt[:, index, None] & (index[:, None] != slots)  # not of itself
        total += torch.where(asks, part, 0.0).sum(1)
    return total / (prompt.sum(1, keepdim=True) - 1).clamp(min=1)
