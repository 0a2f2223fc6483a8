"""γ-MoD: some visual tokens pass by the layers whose attention says little, one router for all of them says which (arXiv 2410.13859).

ARank(l) = mean over heads of rank(A[l] below its diagonal)      low: a layer that can do with fewer tokens
p = softmax(W x / rms(x))[1]                                    x: the state that comes to the layer; W begins at 0, one for all layers
goes through, visual:   a + p MLP(norm(a))                      a = x + attention among what goes through
goes through, text:     a + MLP(norm(a))
passes by:              x
of n tokens those with the floor((1 - keep) n) lowest p pass by

While the router is trained, 0.01 times the cross entropy of its logits to "goes through" is added for each layer. `weigh=2p` multiplies by
2 p, which is 1 where a router has not decided yet: the dense model goes on from where it was, and at keep=1.0 is the same to the bit. With
p, the paper's, the branch of every visual token begins at its half, and keep=1.0 is not the dense model.

`layers=inner`, the authors' choice, are all but the first three and the last, 28 of 32. `GammaMoD.of_ranks` takes those of lowest ARank,
which `foveate.search.calibrate.gammamod` measures. Positions are counted anew among what goes through, as in their code.

Where this differs from the authors' code: text is neither routed nor weighed, in training as in answers. There the question is protected in
training alone, the 35 tokens in front of the image compete with its 1,024 (of these 1,059 at a half 529 pass by, however long the prompt),
and in answers, which come one at a time, all tokens with p > 0.005 go through, and a generated one passes a layer by at p < 0.5: another
share than was trained. The router is given the state over its root mean square; there, what the layer's own norm makes of it. Ties go to
the lower raster index. Each image is ranked by itself, in any batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import floor
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from foveate.contract import Bypass, Site, ThroughLayer, View, Workload
from foveate.errors import FoveateError
from foveate.reducers.common import choose, cutting_layers, leaving, meant, spelled, states
from foveate.reducers.learned import Learned
from foveate.tokens import TokenMap, budget, top

INNER = "inner"
COEFFICIENT = 0.01


@dataclass(frozen=True)
class GammaMoD(Learned):
    """Sends `keep` (share or number) of each image's tokens through some layers, by a trained router; the others pass them by.

    layers  "inner": all but the first three and the last; or indices >= 1, as in "4-6-9"
    weigh   what the feed-forward branch of a visual token is multiplied by: "p", the router's probability, or "2p"
    """

    name: ClassVar[str] = "gammamod"
    paper: ClassVar[str] = "2410.13859"
    looks_at: ClassVar[frozenset[str]] = frozenset({"states"})
    examples: ClassVar[tuple[str, ...]] = (
        "gammamod:keep=0.5,layers=1-2,weigh=2p,untrained=true",
        "gammamod:keep=5,layers=2,untrained=true,positions=keep",
    )
    keeps_all: ClassVar[tuple[str, ...]] = ("gammamod:keep=1.0,layers=1-2,weigh=2p,untrained=true",)
    multiplies: ClassVar[tuple[str, ...]] = ("gammamod:keep=0.5,layers=1-2,untrained=true",)
    keep: float | int = 0.5
    layers: int | str | Sequence[int] = INNER
    weigh: str = "p"
    positions: str = field(default="renumber", kw_only=True)

    def check(self) -> None:
        super().check()
        budget(self.keep, 1)
        choose(self, weigh=("p", "2p"))
        if self.layers != INNER:
            cutting_layers(self.name, self.layers)

    def canonical(self) -> dict[str, Any]:
        return {} if self.layers == INNER else {"layers": spelled(cutting_layers(self.name, self.layers))}

    @classmethod
    def of_ranks(cls, ranks: Mapping[int, float], share: float, **options: Any) -> Self:
        """The one that routes a share of the measured layers, those of lowest ARank; of equal ones the later."""
        number = budget(float(share), len(ranks))
        return cls(layers=sorted(sorted(ranks, key=lambda layer: (ranks[layer], -layer))[:number]), **options)

    @staticmethod
    def module(width: int, layers: int) -> nn.Module:
        return Router(width)

    def sites(self, layers: int) -> list[Site]:
        chosen = range(3, layers - 1) if self.layers == INNER else cutting_layers(self.name, self.layers)
        if not chosen:
            raise FoveateError(f"gammamod: a model of {layers} decoder layers has no inner ones; name some, as in layers=1-2")
        return [ThroughLayer(layer) for layer in chosen]

    def through(self, arriving: int, original: int = 0) -> int:
        """How many of an image's tokens go through a layer."""
        return min(self.keep, arriving) if isinstance(self.keep, int) else arriving - floor((1 - meant(self.keep)) * arriving)

    def reduce(self, view: View, stage: int = 0) -> Bypass:
        layout, x = view.layout, states(self.name, view)
        logits = self.weights(view)(x[layout.visual])
        p = torch.ones(layout.shape, device=x.device).index_put((layout.visual,), logits.softmax(-1)[:, 1])
        chosen = top(layout, p.detach(), 1.0, original_BN=leaving(view, self.through))
        gain = p if self.weigh == "p" else torch.where(layout.visual, 2 * p, p)
        return Bypass(TokenMap.keep(layout, chosen), gain=gain, loss=_loss(layout.visual, logits, chosen) if view.trained else None)

    def count(self, work: Workload, stage: int = 0) -> list[int]:
        return [self.through(arriving) for arriving in work.arriving]

    def loss_weight(self, progress: float) -> float:
        return COEFFICIENT

    def score_flops(self, sizes: Workload, stage: int = 0) -> int:
        return 4 * sum(sizes.arriving) * sizes.width


class Router(nn.Module):
    """One for all layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, width))

    def forward(self, x_LD: Tensor) -> Tensor:
        """(L, 2) float32, the logits of passing a layer by and of going through it."""
        x = x_LD.float()
        return x * x.square().mean(-1, keepdim=True).add(1e-6).rsqrt() @ self.weight.float().T


def arank(weights_HNN: Tensor) -> Tensor:
    """(H,) int64: of each head the rank of its attention map (N, N) below the diagonal."""
    found: Tensor = torch.linalg.matrix_rank(weights_HNN.float().tril(-1))
    return found


def _loss(visual_BN: Tensor, logits_V2: Tensor, through_BN: Tensor) -> Tensor:
    """(B,) cross entropy of the router's logits to what goes through, mean over the visual tokens of each row."""
    each = cross_entropy(logits_V2, through_BN[visual_BN].long(), reduction="none")
    total = torch.zeros(visual_BN.shape, device=each.device).index_put((visual_BN,), each).sum(1)
    return total / visual_BN.sum(1).clamp(min=1)
