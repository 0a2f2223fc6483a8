"""RESTORE's attention: a merged token counts as often as the tokens that it stands for (arXiv 2606.01711).

logits_ij <- logits_ij + log n_j                  n_j: the size of key j, 1 of text
logits_ij <- logits_ij + log(2 - m(p_i - p_j))    distance=true, of visual keys; p: positions
m(x) = 2 / d sum_k cos(x θ^(-2k / d))             k = 0 … d / 2 - 1, d = 128, θ = 10,000; m(0) = 1

It is attached with a method that merges (`tome:keep=0.25+restore`), and does nothing where all sizes are 1. In the first layer every token
of an image has the mean of their sizes (`first="own"`: its own there too), which the authors found better on LLaVA.

The paper's reducer, which merges what HoloV and the like drop, is not here; sizes are those of whatever merges. Where this differs from the
authors' code: the distance counts of visual keys alone, so that text without a picture is what it was, and in every step, where they add it
in the prompt's own pass, so that an answer that is generated is that which is scored. d and θ are theirs and not the model's. By formulas:
their code is under the GPL and was not used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foveate.contract import Site, View, Visibility, Visible
from foveate.reducers.common import choose
from foveate.reducers.seeing import Seeing
from foveate.tokens import Layout

WIDTH, THETA = 128, 10_000.0


@dataclass(frozen=True)
class RESTORE(Seeing):
    """Lets merged tokens count in attention by their size.

    first     what counts in the first of the layers, the "mean" of an image's sizes or each token's "own"
    distance  whether keys far from their query are raised by what the rotary embedding takes from them
    """

    name: ClassVar[str] = "restore"
    paper: ClassVar[str] = "2606.01711"
    examples: ClassVar[tuple[str, ...]] = ("restore:distance=true", "tome:keep=0.4+restore:first=own", "vcc:layer=1,stride=2+restore")
    keeps_all: ClassVar[tuple[str, ...]] = ("restore", "restore:first=own,layer=1")
    first: str = "mean"
    distance: bool = False

    def check(self) -> None:
        super().check()
        choose(self, first=("mean", "own"), distance=(True, False))

    def sites(self, layers: int) -> list[Site]:
        if self.first == "own" or self.layer + 1 >= layers:
            return [Visibility(self.layer)]
        return [Visibility(self.layer, self.layer + 1), Visibility(self.layer + 1)]

    def reduce(self, view: View, stage: int = 0) -> Visible:
        return Visible(bias=Weighed(self.first == "mean" and stage == 0, self.distance))


@dataclass(frozen=True)
class Weighed:
    """(B, M or 1, K) float32: what is added to the logits. mean: by the mean size of an image's tokens in place of each one's own."""

    mean: bool
    distance: bool

    def __call__(self, query: Layout, key: Layout) -> Tensor:
        size = torch.where(key.visual, key.size, 1.0)
        if self.mean:
            image, images = key.image[key.visual], int(key.image.max().clamp(min=0)) + 1
            total = size.new_zeros(images).index_add_(0, image, size[key.visual])
            size = torch.where(key.visual, (total / image.bincount(minlength=images).clamp(min=1))[key.image.clamp(min=0)], 1.0)
        bias = size.clamp(min=1).log()[:, None]
        if not self.distance:
            return bias
        apart = (query.position[..., None] - key.position[:, None]).abs().round().to(torch.int64)
        raised = (2 - likeness(torch.arange(int(apart.max()) + 1, device=apart.device)))[apart].log()
        return torch.where(key.visual[:, None], bias + raised, bias)


def likeness(apart: Tensor) -> Tensor:
    """Float32, what the rotary embedding leaves on average of the product of two equal vectors so many positions apart."""
    angles = apart.to(torch.float64)[..., None] * THETA ** (-torch.arange(0, WIDTH, 2, device=apart.device, dtype=torch.float64) / WIDTH)
    return angles.cos().mean(-1).to(torch.float32)
