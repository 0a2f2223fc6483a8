"""p-MoD: fewer visual tokens go through a decoder layer the deeper it is, a router per layer says which (arXiv 2412.04449).

R(l) = cos(pi l / (L - 1)) / 2 + shift          l: the layer, L: layers of the model, shift = 0.5
layers with R(l) > dense = 0.85 are as ever; in the others R(l) is at least `floor` = 0.15, and k = floor(R(l) V) of V tokens go through
w = 1 + 0.2 tanh(r . x + b)                     x: the state that comes to the layer; r and b begin at 0, so that every w begins at 1
goes through, visual:   a + w MLP(norm(a))      a = x + attention among what goes through, text and visual tokens at their positions
goes through, text:     a + MLP(norm(a))
passes by:              w x                     scaled, not copied: the router gets a gradient from these tokens too

The k highest w of an image go through; text always does, and so does all that is decoded. The cache of a layer has what went through it.
In 32 layers with 576 tokens: 8 layers with all of them, then 486, 464, 440, … 89, and 86 in each of the last 8, 53.7 % on the average.

Where this differs from the authors' code: ties go to the lower raster index (there they are arbitrary, and all tokens tie in the first
step). Text is left out of the ranking, where their sentinel of tanh(-inf) could tie with a visual token. Each image of a prompt is ranked
by itself, in any batch and under any padding; the code serves one image and one sample. L - 1 is 31 there whatever the depth. At least one
token goes through. The paper's figure weighs the output of the whole block; the code, and this, its MLP branch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from foveate.contract import Bypass, Site, ThroughLayer, View, Workload
from foveate.errors import FoveateError
from foveate.reducers.common import leaving, meant, states
from foveate.reducers.learned import Learned
from foveate.tokens import TokenMap, top

SCALE = 0.2


@dataclass(frozen=True)
class PMoD(Learned):
    """Sends ever fewer visual tokens through the layers, by trained routers; the others pass a layer by.

    shift  moves the share of every layer up or down; `dense`: above this share a layer has no router; `floor`: the smallest share
    """

    name: ClassVar[str] = "pmod"
    paper: ClassVar[str] = "2412.04449"
    amounts: ClassVar[tuple[str, ...]] = ()
    looks_at: ClassVar[frozenset[str]] = frozenset({"states"})
    examples: ClassVar[tuple[str, ...]] = ("pmod:untrained=true", "pmod:shift=0.3,floor=0.1,untrained=true,positions=renumber")
    keeps_all: ClassVar[tuple[str, ...]] = ("pmod:dense=1.0,floor=1.0,untrained=true",)
    multiplies: ClassVar[tuple[str, ...]] = ("pmod:untrained=true",)
    shift: float = 0.5
    floor: float = 0.15
    dense: float = 0.85

    def check(self) -> None:
        super().check()
        for option, low, high in (("shift", -0.5, 1.5), ("floor", 0.0, 1.0), ("dense", 0.0, 1.0)):
            value = getattr(self, option)
            if isinstance(value, bool) or not isinstance(value, int | float) or not low < value <= high:
                raise FoveateError(f"pmod: {option}={value!r} is not possible; give a number above {low:g}, and {high:g} at most")

    @staticmethod
    def module(width: int, layers: int) -> nn.Module:
        return Routers(width, layers)

    def shares(self, layers: int) -> dict[int, float]:
        """By decoder layer that has a router, the share of an image's tokens that go through it."""
        curve = [math.cos(math.pi * layer / max(1, layers - 1)) / 2 + self.shift for layer in range(layers)]
        return {layer: min(1.0, max(self.floor, share)) for layer, share in enumerate(curve) if share <= self.dense}

    def sites(self, layers: int) -> list[Site]:
        return [ThroughLayer(layer) for layer in self.shares(layers)]

    def reduce(self, view: View, stage: int = 0) -> Bypass:
        layer, share = self._at(view.layers, stage)
        layout, x = view.layout, states(self.name, view)
        weight = torch.ones(layout.shape, device=x.device).index_put((layout.visual,), self.weights(view)(x[layout.visual], layer))
        number = leaving(view, lambda arriving, _: through(share, arriving))
        return Bypass(TokenMap.keep(layout, top(layout, weight.detach(), 1.0, original_BN=number)), gain=weight, passing=weight)

    def count(self, work: Workload, stage: int = 0) -> list[int]:
        _, share = self._at(work.layers, stage)
        return [through(share, arriving) for arriving in work.arriving]

    def score_flops(self, sizes: Workload, stage: int = 0) -> int:
        return 2 * sum(sizes.arriving) * sizes.width

    def _at(self, layers: int | None, stage: int) -> tuple[int, float]:
        """The layer of a stage, and the share that goes through it."""
        if not layers:
            raise FoveateError("pmod: what goes through a layer depends on the model's depth: give View.of(layers=…), Workload(layers=…)")
        return list(self.shares(layers).items())[stage]


class Routers(nn.Module):
    """One row of weights for each decoder layer; those of dense layers stay as they are."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(layers, width))
        self.bias = nn.Parameter(torch.zeros(layers))

    def forward(self, x_LD: Tensor, layer: int) -> Tensor:
        """(L,) float32, what the tokens weigh in a layer."""
        logit = x_LD.float() @ self.weight[layer, :, None].float() + self.bias[layer].float()
        return 1 + SCALE * logit[:, 0].tanh()


def through(share: float, arriving: int) -> int:
    """How many of an image's tokens go through a layer."""
    return min(arriving, max(1, int(meant(share) * arriving)))
