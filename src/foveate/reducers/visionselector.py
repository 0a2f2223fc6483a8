"""VisionSelector: a learned scorer in front of the language model, trained by a top-k that has a gradient (arXiv 2510.16598).

q = W_q x + a    k = W_k x + b    from D values to h = D / 2          W drawn with a standard deviation of 1e-4, a = b = 0
s_i = mean over j of (q_i . k_j) / sqrt(h) = q_i . mean(k) / sqrt(h)  i, j: the tokens of one image
keep the K = max(1, floor(keep * N)) largest s_i, in raster order

While the scorer is trained every token stays and is weighed by g_i = sigmoid(s_i + t), where t is such that the g_i add up to K (found by
64 halvings). Its gradient is that of the solution: dg/ds = diag(v) - v v^T / sum(v), v = g (1 - g). To the cross entropy comes the binary
cross entropy of g to the hard choice of the K largest, weighted from 0.1 in the first step to 2 in the last. Nothing is saved in training;
it saves afterwards, at the share that was trained and at others.

q_i . mean(k) is computed as x_i . (W_q^T mean(k)) + a . mean(k): the same number in D (4h + 2N) FLOPs instead of 4 N D h.

Where this differs from the authors' code: each image is scored and counted by itself (`scope="sample"` has the images of a prompt
compete); they do so jointly over a packed batch, in which a sample's tokens would depend on its company. An image of which all tokens stay
is not weighed at all. The scorer alone is trained there: `train: {bridge: false, reducers: true}`. The code has no licence, and was not
copied: this is written from the formulas.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, linear

from foveate.contract import BeforeLM, Cut, Site, View, Workload
from foveate.reducers.common import choose, groups, leaving, meant, states
from foveate.reducers.learned import Learned
from foveate.reducers.ranker import Ranker
from foveate.tokens import TokenMap, budget, top


@dataclass(frozen=True)
class VisionSelector(Ranker, Learned):
    """Keeps `keep` (share or number) of each image's tokens, or of another `scope`'s, by a scorer that is trained."""

    name: ClassVar[str] = "visionselector"
    paper: ClassVar[str] = "2510.16598"
    looks_at: ClassVar[frozenset[str]] = frozenset({"states"})
    examples: ClassVar[tuple[str, ...]] = (
        "visionselector:keep=0.5,untrained=true",
        "visionselector:keep=3,scope=crop,untrained=true,positions=renumber",
    )
    keeps_all: ClassVar[tuple[str, ...]] = ("visionselector:keep=1.0,untrained=true",)
    multiplies: ClassVar[tuple[str, ...]] = ("visionselector:keep=0.5,untrained=true",)
    keep: float | int = 0.2
    scope: str = "image"

    def check(self) -> None:
        super().check()
        budget(self.keep, 1)
        choose(self, scope=("image", "crop", "frame", "sample"))

    @staticmethod
    def module(width: int, layers: int) -> nn.Module:
        return Scorer(width)

    def sites(self, layers: int) -> list[Site]:
        return [BeforeLM()]

    def left(self, arriving: int, original: int, stage: int = 0) -> int:
        return budget(self.keep, arriving) if isinstance(self.keep, int) else max(1, int(meant(self.keep) * arriving))

    def score(self, view: View, stage: int = 0) -> Tensor:
        scorer, x = self.weights(view), states(self.name, view).flatten(0, 1)
        score = torch.zeros(len(x), device=x.device)
        for tokens in groups(view.layout, self.scope):
            score = score.index_put((tokens,), scorer(x[tokens]))
        return score.view(view.layout.shape)

    def reduce(self, view: View, stage: int = 0) -> Cut:
        return self._weighed(view) if view.trained else super().reduce(view, stage)

    def _weighed(self, view: View) -> Cut:
        """What takes the place of the cut while the scorer is trained: every token, weighed, and the loss that makes the weights hard."""
        layout, score = view.layout, self.score(view)
        number = leaving(view, self.left, self.scope)
        hard = top(layout, score.detach(), 1.0, scope=self.scope, original_BN=number).flatten()
        gain, loss = torch.ones(hard.shape, device=score.device), torch.zeros(hard.shape, device=score.device)
        for tokens in groups(layout, self.scope):
            if (k := int(number.flatten()[tokens[0]])) < len(tokens):
                logits = shifted(score.flatten()[tokens], k)
                gain = gain.index_put((tokens,), logits.sigmoid())
                loss = loss.index_put((tokens,), binary_cross_entropy_with_logits(logits, hard[tokens].float(), reduction="none"))
        visual = layout.visual.sum(1).clamp(min=1)
        return Cut(TokenMap.identity(layout), gain.view(layout.shape), loss.view(layout.shape).sum(1) / visual)

    def loss_weight(self, progress: float) -> float:
        return 0.1 + 1.9 * progress

    def while_trained(self) -> Self:
        return replace(self, keep=1.0)

    def score_flops(self, sizes: Workload, stage: int = 0) -> int:
        half = _half(sizes.width)
        return sum(sizes.width * (4 * half + 2 * tokens) for tokens in sizes.groups(self.scope) if tokens)


class Scorer(nn.Module):
    """What the tokens of one group are scored by."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key = (nn.Linear(width, _half(width)) for _ in range(2))
        for part in (self.query, self.key):
            nn.init.normal_(part.weight, std=1e-4)
            nn.init.zeros_(part.bias)

    def forward(self, x_LD: Tensor) -> Tensor:
        """(L,) float32."""
        x = x_LD.float()
        key = linear(x.mean(0, keepdim=True), self.key.weight.float(), self.key.bias.float())
        score = x @ (key @ self.query.weight.float()).T + (key * self.query.bias.float()).sum()
        return score[:, 0] / math.sqrt(key.shape[1])


def shifted(score_N: Tensor, k: int) -> Tensor:
    """(N,) s + t, whose sigmoids add up to `k`, 0 < k < N; with the gradient of the solution, in which t moves with s."""
    s = score_N.detach()
    low, high = -s.max() - 10, -s.min() + 10
    for _ in range(64):
        middle = (low + high) / 2
        enough = (s + middle).sigmoid().sum() >= k
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    t = (low + high) / 2
    v = (s + t).sigmoid() * (1 - (s + t).sigmoid())
    return score_N + t - ((score_N - s) * v).sum() / v.sum()


def _half(width: int) -> int:
    return max(1, width // 2)
