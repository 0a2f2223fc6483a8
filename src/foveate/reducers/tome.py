"""ToMe: merging of similar tokens by bipartite matching (arXiv 2210.09461), in front of the language model or in the vision tower.

    A: tokens at even places, B: at odd ones; every token of A finds its most similar token of B (cosine);
    the r most similar pairs become one token each, the size-weighted mean; repeated until `keep` is met.

One pass at most halves the tokens. The functions `bipartite` and `mean` know nothing of layouts.

In the paper each block of the tower merges r tokens between attention and MLP: the metric is its keys' mean over heads, the [CLS] token
is protected, and attention adds log(size) to its logits from then on.

- `site="tower"`: the same, but in front of the next block, behind the MLP, which so still runs on every token. The tower's last block
  merges nothing. What is merged enters the language model as one token.
- `site="lm"` (ours): there is one site, so the passes follow each other on the same states (`metric="keys"`: the tower's keys, merged
  along), and nothing is added to the model's attention.

Where this differs from the authors' code: the groups are theirs, but they leave unmerged tokens of A in order of similarity (with a
class token: ascending), then B. Between the passes that order is kept; in the end raster order is restored by the destinations'
places, unless `order="matching"`. In the tower that order is theirs between blocks too, and raster order after it. Theirs protects a class
and a distillation token; registers are protected here in the same way: all such tokens stay in front, in their order.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from foveate.contract import BeforeLM, Cut, InEncoder, Site, TowerKeys, View, Workload, products
from foveate.errors import FoveateError
from foveate.reducers.base import Reducer
from foveate.reducers.common import choose, groups, integers, into, states
from foveate.tokens import SCOPES, Layout, TokenMap, budget

MOST_BLOCKS = 1000  # more than any tower has


class Matching(NamedTuple):
    """One pass. group (..., N) int64: the target that each token goes into; keeper (..., N - r) int64: the token whose place each target
    takes, a destination or one that was not merged."""

    group: Tensor
    keeper: Tensor


@dataclass(frozen=True)
class ToMe(Reducer):
    """Merges each image's tokens until `keep` of them are left.

    r: tokens merged in one pass; 0: as many as a pass can.
    metric: "states" (of the tokens in front of the language model) or "keys" (of the tower's block `layer`).
    scope: whose tokens may be merged: "image", "crop", "frame" or "sample"; `keep` is per such group.
    site: "lm" or "tower". In the tower a pass is a block, 0 for `r` spreads the passes evenly over the blocks, and `keep` is per crop;
        metric, order and scope are the paper's and cannot be chosen.
    blocks: how many of the tower's blocks merge, from the first on. The default is for CLIP-L and features of the last layer but one.
    proportional: whether the tower attends to merged tokens by their size, as it should where it was not trained with merging.
    """

    name: ClassVar[str] = "tome"
    paper: ClassVar[str] = "2210.09461"
    looks_at: ClassVar[frozenset[str]] = frozenset({"states"})
    examples: ClassVar[tuple[str, ...]] = ("tome:keep=0.5", "tome:keep=0.4,metric=keys,order=matching,positions=keep")
    keeps_all: ClassVar[tuple[str, ...]] = ("tome:keep=1.0", "tome:keep=1.0,metric=keys,order=matching")
    multiplies: ClassVar[tuple[str, ...]] = ("tome:keep=0.3", "tome:keep=0.3,metric=keys", "tome:keep=0.5,site=tower,blocks=1")
    keep: float | int = 0.25
    r: int = 0
    metric: str = "states"
    layer: int = -2
    order: str = "raster"
    scope: str = "image"
    site: str = "lm"
    blocks: int = 22
    proportional: bool = True
    positions: str = field(default="renumber", kw_only=True)

    def check(self) -> None:
        super().check()
        budget(self.keep, 1)
        integers(self, r=0, layer=None, blocks=1)
        if self.blocks > MOST_BLOCKS:
            raise FoveateError(f"tome: blocks={self.blocks} is more than any vision tower has; give those of yours, less the last")
        choose(
            self, metric=("states", "keys"), order=("raster", "matching"), scope=SCOPES, site=("lm", "tower"), proportional=(True, False)
        )
        for option in ("metric", "layer", "order", "scope") if self.site == "tower" else ("blocks", "proportional"):
            if getattr(self, option) != type(self).__dataclass_fields__[option].default:
                raise FoveateError(f'{self.name}: {option}={getattr(self, option)!r} does nothing at site="{self.site}"; leave it out')

    def sites(self, layers: int) -> list[Site]:
        if self.site == "tower":
            return [InEncoder(block, (TowerKeys(block - 1),)) for block in range(1, self.blocks + 1)]
        return [BeforeLM((TowerKeys(self.layer),) if self.metric == "keys" else ())]

    def reduce(self, view: View, stage: int = 0) -> Cut:
        if self.site == "tower":
            return Cut(self._pass(view, stage))
        metric = view.signal(TowerKeys(self.layer)) if self.metric == "keys" else states(self.name, view)
        return Cut(merge_groups(view.layout, metric, self.keep, r=self.r, scope=self.scope, raster=self.order == "raster"))

    def count(self, work: Workload, stage: int = 0) -> list[int]:
        if self.site == "tower":
            return work.leaving(lambda arriving, original: arriving - self._merged(arriving, original, stage))
        return work.leaving(lambda arriving, _: budget(self.keep, arriving), self.scope)

    def score_flops(self, sizes: Workload, stage: int = 0) -> int:
        if self.site == "tower":
            merges = self._merged(sizes.arriving[0], sizes.images[0].tokens, stage) > 0
            return products([(-(-sizes.slots // 2), sizes.slots // 2)] if merges else [], sizes.tower_width)
        width = sizes.tower_width if self.metric == "keys" else sizes.width
        return sum(merge_flops(n, budget(self.keep, n), width, r=self.r) for n in sizes.groups(self.scope))

    def _merged(self, arriving: int, original: int, stage: int) -> int:
        """How many of a crop's tokens one pass in the tower merges."""
        over = max(0, arriving - budget(self.keep, original))
        return min(self.r or -(-over // (self.blocks - stage)), over, arriving // 2)

    def _pass(self, view: View, stage: int) -> TokenMap:
        layout, keys = view.layout, view.signal(TowerKeys(stage))
        sizes = torch.stack([layout.visual.sum(1), (view.first or view).layout.visual.sum(1), layout.valid.sum(1)], 1)
        home = torch.arange(layout.shape[1], device=sizes.device).repeat(layout.shape[0], 1)
        place, weight = home.clone(), torch.ones_like(home, dtype=torch.float64)
        for arriving, original, slots in torch.unique(sizes, dim=0).tolist():  # crops of equal sizes are matched at once
            rows = (sizes == sizes.new_tensor([arriving, original, slots])).all(1).nonzero()
            at = torch.arange(slots, device=rows.device)[None]
            matching = bipartite(keys[rows, at], self._merged(arriving, original, stage), protect_first=slots - arriving)
            size = torch.where(layout.visual, layout.size, 1.0)[rows, at].to(torch.float64)
            total = torch.zeros_like(matching.keeper, dtype=size.dtype).scatter_add_(1, matching.group, size)
            home[rows, at] = matching.keeper.gather(1, matching.group)
            weight[rows, at] = size / total.gather(1, matching.group)
            place[rows, matching.keeper] = torch.arange(matching.keeper.shape[1], device=rows.device)[None]
        return into(layout, home, weight, place)


def bipartite(metric_ND: Tensor, r: int, *, protect_first: int = 0) -> Matching:
    """Matches `r` tokens (at most half of the unprotected ones) with a destination; leading dimensions are batches.

    protect_first: leading tokens ([CLS], distillation, registers) that neither go anywhere nor take anything in.
    Targets are numbered: the protected, unmerged tokens of A (most similar first; ascending if some are protected), then B.
    """
    N = metric_ND.shape[-2]
    places = torch.arange(N, device=metric_ND.device)
    r = max(0, min(r, (N - protect_first) // 2))
    if r == 0:
        places = places.expand(metric_ND.shape[:-1])
        return Matching(places, places)
    unit = normalize(metric_ND.detach().to(torch.float32), dim=-1)
    score = unit[..., ::2, :] @ unit[..., 1::2, :].transpose(-1, -2)
    score[..., : (protect_first + 1) // 2, :] = float("-inf")
    score[..., : protect_first // 2] = float("-inf")
    best, destination = score.max(-1)
    order = best.argsort(dim=-1, descending=True, stable=True)
    going, staying = order[..., :r], order[..., r:]
    if protect_first:
        staying = staying.sort(-1).values
    home = places.repeat(*order.shape[:-1], 1)
    home[..., ::2] = home[..., ::2].scatter(-1, going, 2 * destination.gather(-1, going) + 1)
    keeper = torch.cat([2 * staying, places[1::2].expand(*order.shape[:-1], -1)], -1)
    # Of the protected every other one is in B: all of them go back in front, where the next pass looks for them.
    keeper = keeper.gather(-1, keeper.clamp(max=protect_first).argsort(dim=-1, stable=True))
    target = torch.empty_like(home).scatter_(-1, keeper, places[: N - r].expand_as(keeper))
    return Matching(target.gather(-1, home), keeper)


def mean(x_ND: Tensor, matching: Matching, weight_N: Tensor) -> tuple[Tensor, Tensor]:
    """(..., N - r, D) weighted means of the groups, and (..., N - r) the sums of their weights."""
    # A product with 0s and 1s rather than scattered sums: those round in any order on a GPU.
    goes = one_hot(matching.group, matching.keeper.shape[-1]).transpose(-1, -2).to(x_ND.dtype) * weight_N[..., None, :].to(x_ND.dtype)
    total = goes.sum(-1)
    return goes @ x_ND / total[..., None], total


def merge_until(metric_ND: Tensor, size_N: Tensor, left: int, *, r: int = 0, weighted: bool = True) -> tuple[Matching, Tensor]:
    """Passes over one group of tokens until `left` remain: as one matching, and (N,) float64 weight of each in its target.

    weighted: means by size; else every token of a pass weighs the same, whatever it stands for.
    """
    metric, size = metric_ND.detach().to(torch.float32), size_N.to(torch.float64)
    group = keeper = torch.arange(metric.shape[0], device=metric.device)
    weight = torch.ones_like(size)
    while keeper.numel() > left:
        step = bipartite(metric, min(keeper.numel() - left, r or keeper.numel()))
        counted = size if weighted else torch.ones_like(size)
        metric = mean(metric, step, counted)[0]
        total = torch.zeros_like(size[: step.keeper.numel()]).index_add_(0, step.group, counted)
        weight = weight * (counted / total[step.group])[group]
        size = torch.zeros_like(total).index_add_(0, step.group, size)
        group, keeper = step.group[group], keeper[step.keeper]
    return Matching(group, keeper), weight


def merge_flops(tokens: int, left: int, width: int, *, r: int = 0) -> int:
    """What the matrix products of `merge_until` take."""
    flops = 0
    while tokens > left:
        after = tokens - min(tokens - left, r or tokens, tokens // 2)
        flops += products([(-(-tokens // 2), tokens // 2), (after, tokens)], width)
        tokens = after
    return flops


def merge_groups(
    layout: Layout, metric_BND: Tensor, keep: float | int, *, r: int = 0, scope: str = "image", weighted: bool = True, raster: bool = True
) -> TokenMap:
    """The map that merges every group of the scope until `keep` of it is left; text and all else stays as it is."""
    metric, size = metric_BND.flatten(0, 1), layout.size.flatten()
    home = torch.arange(size.numel(), device=metric.device)
    place, weight = home.clone(), torch.ones_like(size, dtype=torch.float64)
    for slots in groups(layout, scope):
        left = budget(keep, slots.numel())
        if left < slots.numel():
            matching, weight[slots] = merge_until(metric[slots], size[slots], left, r=r, weighted=weighted)
            keeper = slots[matching.keeper]
            home[slots] = keeper[matching.group]
            place[keeper] = keeper.sort().values  # the k-th target of the matching takes the k-th place that survives
    return into(layout, home, weight, None if raster else place)
