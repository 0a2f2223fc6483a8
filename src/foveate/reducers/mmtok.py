"""MMTok: the tokens that together cover the question's words and the image (arXiv 2508.18264).

    A = softmax over tokens j of (e_i . x_j / text_temperature) / m          e_i: the m words of the prompt;  x_j: the states
    B = alpha * softmax over tokens j of (x_i . x_j / temperature) / N       all of unit length, in front of the language model
    C = rows of A over rows of B;  T times: the column j with the largest  sum over rows of max(0, C_j - best);  best = max(best, C_j)

Greedy, so the set for T tokens is part of the set for T + 1. In raster order; nothing is mixed.

Where this differs from the authors' code: B compares the states in front of the language model, theirs the tower's features in front of
the projector. The words are all of the prompt's text as the language model embeds it: theirs are those of the question alone, for LLaVA
without stop words and without the instruction how to answer, which no library can tell from the rest. Without text B alone decides.
Patches of a picture's padding may be chosen (theirs excludes them for LLaVA-1.5). Newline tokens, where a model has them, are no
candidates, and stay.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from foveate.contract import BeforeLM, Site, View, Workload, products
from foveate.reducers.common import above_zero, questions, states
from foveate.reducers.picker import Pick, Picker
from foveate.tokens import Kind


@dataclass(frozen=True)
class MMTok(Picker):
    """Keeps `keep` of each tile's tokens that cover the prompt's words and the tile best.

    alpha: how much the image weighs beside the words. scope: what `keep` counts in, "crop" (tile, the paper's), "image" or "frame".
    """

    name: ClassVar[str] = "mmtok"
    paper: ClassVar[str] = "2508.18264"
    looks_at: ClassVar[frozenset[str]] = frozenset({"text", "states"})
    examples: ClassVar[tuple[str, ...]] = ("mmtok:keep=0.5",)
    keeps_all: ClassVar[tuple[str, ...]] = ("mmtok:keep=1.0",)
    multiplies: ClassVar[tuple[str, ...]] = ("mmtok:keep=0.5",)
    keep: float | int = 64
    alpha: float = 0.5
    temperature: float = 0.2
    text_temperature: float = 0.02
    scope: str = "crop"
    positions: str = field(default="renumber", kw_only=True)

    def check(self) -> None:
        super().check()
        above_zero(self, "alpha", "temperature", "text_temperature")

    def sites(self, layers: int) -> list[Site]:
        return [BeforeLM()]

    def picking(self, view: View) -> Pick:
        x, N, several = states(self.name, view).detach(), view.layout.shape[1], questions(self.name, view)

        def pick(slots: Tensor, left: int) -> Tensor:
            b, at = int(slots[0]) // N, slots % N
            text = next(q.text for q in several if bool(q.about[b, at[0]]))[b] & (view.layout.kind[b] == Kind.TEXT)
            unit, words = (normalize(x[b, here].to(torch.float32), dim=-1) for here in (at, text))
            to_words = (words @ unit.T / self.text_temperature).softmax(1) / max(1, len(words))
            to_image = self.alpha * (unit @ unit.T / self.temperature).softmax(1) / len(unit)
            return covering(torch.cat([to_words, to_image]), left)

        return pick

    def score_flops(self, sizes: Workload, stage: int = 0) -> int:
        """At most: sizes do not tell words from an image's newlines, which are none."""
        return products(((n, n + sizes.text) for n, _ in self.reduced(sizes)), sizes.width)


def covering(cover_RN: Tensor, picks: int) -> Tensor:
    """(picks,) int64: columns in the order in which they are picked; ties go to the lower index."""
    cover_RN = cover_RN.to(torch.float64)
    best = cover_RN.new_zeros(len(cover_RN), 1)
    taken = torch.zeros(cover_RN.shape[1], dtype=torch.bool, device=cover_RN.device)
    chosen = []
    for _ in range(picks):
        # Sums of the same terms in another order tie when they are rounded.
        gain = (cover_RN - best).clamp(min=0).sum(0).to(torch.float32)
        column = gain.masked_fill(taken, float("-inf")).argmax(0, keepdim=True)
        taken = taken.index_fill(0, column, True)
        best = torch.maximum(best, cover_RN.index_select(1, column))
        chosen.append(column)
    return torch.cat(chosen)
