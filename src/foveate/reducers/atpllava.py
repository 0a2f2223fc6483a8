"""ATP-LLaVA: thresholds for each picture and question, predicted between layers, say how many visual tokens go on (arXiv 2412.00447).

u_n = what token n receives in attention in the layer before, mean over heads, from visual tokens (self) or text (cross), over its image's
      mean; s_n = u_n / (1 + u_n)
r_n = (s_self + s_cross) / 2          low where a token is hardly looked at
d_n = 1 - 3 / z^2                     z: the largest of 8, 4, 2 of which the row and the column of n are multiples; 0 where there is none
theta_r, theta_d = sigmoid(W [mean s_self, mean s_cross] + b)         for each layer and image; W and b begin at 0
n stays where  m_n = max(r_n - theta_r, d_n - theta_d) > 0            looked at, or in one of an image's evenly spaced rasters

in front of layers 5, 15 and 25 (after layers 4, 14 and 24) of 32. How many stay follows from picture and question, one of each at least:
what is predicted of tokens, bytes and scores (`predict`, `foveate plan`) is the most that may be, as if all stayed; the ledger of a run has
what was.

While the thresholds are trained all tokens stay, their states multiplied by the soft mask sigmoid(10 m_n). The loss is how far the tokens,
mean over the decoder layers and over the rows of a batch that have images, are from `keep` of all. It counts those that would be there,
cumulatively, and has the soft masks' gradient: what is met in training is met afterwards. Of 576 tokens keep=0.25 are 144 on the mean. The
thresholds can be trained alone: `train: {bridge: false, reducers: true}`.

Unverified, since the authors' code was not found: of the paper the abstract and others' notes were read, and a third party's reproduction,
which has an outline of the equations: both kinds of attention, evenly sampled tokens scored 1 - 3 R at a rate R, thresholds by a sigmoid
from the two mean scores, soft masks of temperature 10, the larger of two masks, the distance to a number of tokens as a loss. This
library's own are: u / (1 + u), which needs no scale of attention; rasters within rasters; that masks multiply states (where a model
normalises in front of each layer they are felt in the residual alone); the mean over layers; and that the loss counts what is there. A
second term, by which tokens cost more in deeper layers, is left out.

Rows of a batch share their budget, so that a step cut into other micro-batches is another step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from foveate.contract import Attention, AttentionRows, Cut, FromLayer, Signal, Site, View, Workload
from foveate.errors import FoveateError
from foveate.reducers.common import above_zero, asked, choose, cutting_layers, groups, spelled
from foveate.reducers.learned import Learned
from foveate.tokens import Layout, TokenMap, budget

RATE = 3.0
RASTERS = (2, 4, 8)


@dataclass(frozen=True)
class ATPLLaVA(Learned):
    """Keeps the tokens above trained thresholds: about `keep` of them, mean over images and layers, as they were trained to.

    keep     the budget of the training, a share or a number of an image's tokens; 1.0: everything stays
    layers   indices >= 1 in front of which it acts; one that the model does not have never acts
    spatial  whether evenly spaced tokens have a chance of their own
    """

    name: ClassVar[str] = "atpllava"
    paper: ClassVar[str] = "2412.00447"
    experimental: ClassVar[bool] = True
    beyond: ClassVar[bool] = True
    looks_at: ClassVar[frozenset[str]] = frozenset({"text", "attention"})
    examples: ClassVar[tuple[str, ...]] = (
        "atpllava:layers=1-3,untrained=true",
        "atpllava:layers=2,spatial=false,untrained=true,positions=renumber",
    )
    keeps_all: ClassVar[tuple[str, ...]] = ("atpllava:keep=1.0,layers=1-3,untrained=true",)
    multiplies: ClassVar[tuple[str, ...]] = ("atpllava:layers=1,untrained=true",)
    keep: float | int = 0.25
    layers: int | str | Sequence[int] = "5-15-25"
    spatial: bool = True
    temperature: float = 10.0

    def check(self) -> None:
        super().check()
        budget(self.keep, 1)
        choose(self, spatial=(True, False))
        above_zero(self, "temperature")
        cutting_layers(self.name, self.layers)

    def canonical(self) -> dict[str, Any]:
        return {"layers": spelled(cutting_layers(self.name, self.layers))}

    @staticmethod
    def module(width: int, layers: int) -> nn.Module:
        return Thresholds(layers)

    def sites(self, layers: int) -> list[Site]:
        return [FromLayer(layer, (Attention(layer - 1),)) for layer in self._layers]

    def reduce(self, view: View, stage: int = 0) -> Cut:
        layout = view.layout
        if self._keeps_all:
            return Cut(TokenMap.identity(layout))
        before = self._before(view, stage) if view.trained else None
        there = layout.visual if before is None else before.stays
        margin = self._margins(view, stage, there)
        stays = staying(layout, margin.detach(), there)
        return self._weighed(view, stage, margin, stays, before) if view.trained else Cut(TokenMap.keep(layout, stays))

    def count(self, work: Workload, stage: int = 0) -> list[int]:
        return list(work.arriving)

    def exact(self, work: Workload) -> bool:
        return self._keeps_all

    def while_trained(self) -> Self:
        return replace(self, keep=1.0)

    def score_flops(self, sizes: Workload, stage: int = 0) -> int:
        """Every row of attention in the layer before: of the tokens that arrive, which sizes alone do not tell but for the first of its
        layers. Where all are taken to arrive, the most that it may be."""
        return 0 if self._keeps_all else sizes.rows(sizes.slots)

    @property
    def _layers(self) -> list[int]:
        return cutting_layers(self.name, self.layers)

    @property
    def _keeps_all(self) -> bool:
        return isinstance(self.keep, float) and self.keep == 1.0

    def _margins(self, view: View, stage: int, there_BN: Tensor) -> Tensor:
        """(B, N) float32 by how much each visual token is above its thresholds, which follow from those that are `there`."""
        layout, thresholds, layer = view.layout, self.weights(view), self._layers[stage]
        attention: AttentionRows = view.signal(Attention(layer - 1))
        own = asked(self.name, view, lambda question: attention.received(question.about)).flatten()
        cross = asked(self.name, view, lambda question: attention.received(question.prompt & ~layout.visual)).flatten()
        spaced, there = spread(layout).flatten(), there_BN.flatten()
        margin = torch.zeros(own.shape, device=own.device)
        for slots in groups(layout, "image"):
            both = torch.stack([looked_at(of[slots], there[slots]) for of in (own, cross)])
            redundant, spatial = thresholds(both[:, there[slots]].mean(1), layer)
            above = both.mean(0) - redundant
            margin = margin.index_put((slots,), torch.maximum(above, spaced[slots] - spatial) if self.spatial else above)
        return margin.view(layout.shape)

    # ---- while the thresholds are trained

    def _before(self, view: View, stage: int) -> Passed | None:
        """What is left at the stage before; None at the first."""
        found: Passed | None = _so_far(view).get((self, stage - 1))
        if found is not None and not found.layout.same(view.layout):
            raise FoveateError(
                "atpllava: another method takes tokens between its layers while it is trained; train it alone, or let the other act first"
            )
        return found

    def _weighed(self, view: View, stage: int, margin: Tensor, stays: Tensor, before: Passed | None) -> Cut:
        """What takes the place of the cut: every token, weighed; the last stage adds the loss."""
        if view.layers is None:
            raise FoveateError("atpllava: what its tokens cost depends on the model's depth: give View.of(layers=…)")
        soft = torch.where(view.layout.visual, (self.temperature * margin).sigmoid(), 1.0)
        so_far = _so_far(view)
        so_far[self, stage] = Passed(view.layout, soft if before is None else before.soft * soft, stays)
        acts = [layer for layer in self._layers if layer < view.layers]
        ends = stage == len(acts) - 1
        loss = self._loss([so_far[self, n] for n in range(len(acts))], acts, view.layers) if ends else None
        return Cut(TokenMap.identity(view.layout), soft, loss)

    def _loss(self, passed: Sequence[Passed], acts: Sequence[int], layers: int) -> Tensor:
        """(B,) how far the mean share of the rows with images is from the budget; 0 in rows without."""
        layout = passed[-1].layout
        whole = layout.visual.sum(1).clamp(min=1)
        tokens = acts[0] * layout.visual.sum(1).float()
        for at, begin, end in zip(passed, acts, [*acts[1:], layers], strict=True):
            tokens = tokens + (end - begin) * at.count()
        length = layout.image_length.clamp(min=1).float()
        wanted = (self.keep / length).clamp(max=1.0) if isinstance(self.keep, int) else torch.full_like(length, self.keep)
        wanted = torch.where(layout.visual, wanted, 0.0).sum(1) / whole
        rows = layout.visual.any(1)
        apart = torch.where(rows, tokens / layers / whole - wanted, 0.0).sum() / rows.sum().clamp(min=1)
        return torch.where(rows, apart.abs(), 0.0)


@dataclass(frozen=True, eq=False)
class Passed:
    """What is left at one of its layers: the product of the soft masks so far (B, N), and which tokens would be there (B, N) bool."""

    layout: Layout
    soft: Tensor
    stays: Tensor

    def count(self) -> Tensor:
        """(B,) visual tokens, as they would be dropped, with the gradient of the soft masks."""
        soft = torch.where(self.layout.visual, self.soft, 0.0)
        return (self.stays.float() + soft - soft.detach()).sum(1)


_SO_FAR = Signal()


def _so_far(view: View) -> dict[tuple[ATPLLaVA, int], Passed]:
    """By method and stage what is left, for the stages that follow: kept with the view in front of the first layer, which they all see."""
    found: dict[tuple[ATPLLaVA, int], Passed] = (view.first or view).signals.setdefault(_SO_FAR, {})
    return found


class Thresholds(nn.Module):
    """Two for each decoder layer; those of layers at which it does not act stay as they are."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(layers, 2, 2))
        self.bias = nn.Parameter(torch.zeros(layers, 2))

    def forward(self, means_2: Tensor, layer: int) -> Tensor:
        """(2,) float32, of redundancy and of spacing, for an image whose tokens have these mean scores."""
        return ((self.weight[layer].float() * means_2).sum(1) + self.bias[layer].float()).sigmoid()


def looked_at(received_n: Tensor, there_n: Tensor) -> Tensor:
    """(n,) in [0, 1): a half for a token that receives as much as those that are `there` (bool) do on the mean."""
    relative = received_n / received_n[there_n].mean().clamp(min=torch.finfo(torch.float32).tiny)
    return relative / (1 + relative)


def spread(layout: Layout) -> Tensor:
    """(B, N) float32, the score of each token as one of an evenly spaced raster; 0 where rows and columns are not known."""
    row, column = layout.place[..., 3], layout.place[..., 4]
    score = torch.zeros(layout.shape, device=row.device)
    for step in RASTERS:
        score = torch.where((row >= 0) & (row % step == 0) & (column % step == 0), 1 - RATE / step**2, score)
    return score


def staying(layout: Layout, margin_BN: Tensor, there_BN: Tensor) -> Tensor:
    """(B, N) bool: those of the visual slots that are there which are above their thresholds, of each image at least the best of them. What
    is not a number is above all."""
    margin = torch.where(there_BN, margin_BN, float("-inf")).flatten()
    above = ~(margin <= 0)
    for slots in groups(layout, "image"):
        above[slots[margin[slots].argmax()]] = True
    return above.view(layout.shape) & layout.visual
