"""FitPrune: as many tokens go after each layer as change what is received in attention by no more than a tolerance (arXiv 2409.10197).

    cross_n = mean over text rows of max over heads of A[l][h, row, n]      self_n = mean over visual rows of it
    in front of layer l + 1 the visual tokens with the largest cross_n * self_n stay, as many as the recipe says

The recipe is fitted once, on a few prompts that see all tokens (`foveate.search.calibrate.fitprune`). For a tolerance alpha

    tail(x) = the most tokens with the smallest x whose sum is at most alpha of the sum of all
    what is in tail(cross) and in tail(self) of layer l goes after it

and alpha, by halving to 0.01, is the smallest that meets the budget. What is left, mean over the prompts, is the recipe, as shares of an
image's tokens in front of layers: `keeps=2:0.9/3:0.75`. The default is none of the authors', who ship tables for 576 tokens.

Where this differs from the authors' code, which has no licence and was not copied: tokens go at the end of a layer, not between its
attention and its feed-forward part, so that the same ones go and this part is computed for them once more; their keys stay in that layer's
cache in both. Each image is ranked by itself, in any batch (theirs: 576 tokens behind 35 of text, batch 1, the attention of all layers in
full). Of equal tokens the later goes. Unverified: whether what is gone after one layer is gone for those that follow; here it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from foveate.contract import Attention, AttentionRows, FromLayer, Question, Site, View, Workload
from foveate.errors import FoveateError
from foveate.reducers.common import asked
from foveate.reducers.falling import Falling
from foveate.tokens import Layout

STEP = 0.01  # to which the tolerance is found
Received = Sequence[tuple[Tensor, Tensor] | None]
"""Of one image of n tokens, by decoder layer, what they receive from text and from visual tokens, (n,) each; None: of a layer that does not
attend, after which nothing goes."""


@dataclass(frozen=True)
class FitPrune(Falling):
    """Keeps the share of each image's tokens that a recipe has in front of each layer, by attention received from text and image.

    keeps   see `foveate.reducers.falling`
    """

    name: ClassVar[str] = "fitprune"
    paper: ClassVar[str] = "2409.10197"
    amounts: ClassVar[tuple[str, ...]] = ()
    looks_at: ClassVar[frozenset[str]] = frozenset({"text", "attention"})
    examples: ClassVar[tuple[str, ...]] = ("fitprune:keeps=1:0.75/3:0.4", "fitprune:keeps=2:0.3,positions=renumber")
    keeps_all: ClassVar[tuple[str, ...]] = ("fitprune:keeps=1:0.9999/3:0.9998",)  # of fewer than 2,500 tokens all
    multiplies: ClassVar[tuple[str, ...]] = ("fitprune:keeps=1:0.5",)
    keeps: str | Sequence[tuple[int, float]] = "2:0.5"

    def check(self) -> None:
        super().check()
        self.after_a_layer()

    @classmethod
    def fitted(cls, images: Sequence[Received], limit: float, cost: Callable[[Sequence[float]], float] | None = None) -> Self:
        """The recipe for a budget, from what the tokens of some images receive in all layers.

        cost  of shares of the tokens, by layer; None: their mean. FoveateError where not even one token an image is within the `limit`.
        """
        shares = recipe(images, limit, cost or (lambda shares: sum(shares) / len(shares)))
        return cls(keeps=[(layer, share) for layer, share in enumerate(shares)])

    def sites(self, layers: int) -> list[Site]:
        return [FromLayer(layer, (Attention(layer - 1),)) for layer, _ in self.cuts]

    def score(self, view: View, stage: int = 0) -> Tensor:
        attention: AttentionRows = view.signal(Attention(self.cuts[stage][0] - 1))

        def product(question: Question) -> Tensor:
            cross, own = received(attention, question, view.layout)
            return cross * own

        return asked(self.name, view, product)

    def score_flops(self, sizes: Workload, stage: int = 0) -> int:
        return sizes.rows(sizes.slots)


def received(attention: AttentionRows, question: Question, layout: Layout) -> tuple[Tensor, Tensor]:
    """(B, N) twice: what each slot receives from the prompt's text (newlines of images too), and from the visual slots asked about."""
    return attention.received(question.prompt & ~layout.visual, most=True), attention.received(question.about, most=True)


def tail(received_N: Tensor, alpha: float) -> Tensor:
    """(N,) bool: the most tokens with the smallest values whose sum is at most a share `alpha` of the sum of all."""
    order = received_N.double().argsort(stable=True)
    total = received_N.double()[order].cumsum(0)
    return torch.zeros_like(received_N, dtype=torch.bool).scatter(0, order, total <= alpha * total[-1])


def left(image: Received, alpha: float) -> list[float]:
    """The share of an image's tokens in front of each decoder layer, for a tolerance; one token always stays."""
    gone: Tensor | None = None
    shares = [1.0]
    for both in image[:-1]:  # after the last layer nothing is saved
        if both is not None:
            now = tail(both[0], alpha) & tail(both[1], alpha)
            gone = now if gone is None else gone | now
        shares.append(1.0 if gone is None else max(1, int((~gone).sum())) / len(gone))
    return shares


def recipe(images: Sequence[Received], limit: float, cost: Callable[[Sequence[float]], float]) -> list[float]:
    """The share of an image's tokens in front of each decoder layer, mean over some images, that costs no more than the limit."""

    def at(alpha: float) -> list[float]:
        shares = torch.tensor([left(image, alpha) for image in images], dtype=torch.float64).mean(0)
        return [max(0.0001, round(share, 4)) for share in shares.tolist()]

    if not images:
        raise FoveateError("fitprune: a recipe is fitted to what the tokens of images receive, and there are no images")
    low, high = 0.0, 1.0
    if cost(at(low)) <= limit:
        return at(low)
    if cost(at(high)) > limit:
        raise FoveateError(f"fitprune: the budget {limit:g} is too small, one token of each image costs {cost(at(high)):.4g} already")
    while high - low > STEP:
        middle = (low + high) / 2
        low, high = (low, middle) if cost(at(middle)) <= limit else (middle, high)
    return at(high)
