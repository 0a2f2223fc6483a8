"""VisionZip: dominant patches by [CLS] attention, and the rest merged into a few contextual tokens (arXiv 2412.04467).

    dominant:    the D patches of each tile with the highest [CLS] attention in block -2
    contextual:  of the n others, in raster order, every max(1, n // C)-th is a target (the first C of them); each remaining patch goes to
                 the target with the most similar key (cosine of head-mean keys of block -2), and a target becomes the group's mean

The text is not looked at. `dominant` (D) and `contextual` (C) count in each tile, as shares (floats) or numbers (ints). A tile of at most
D + C patches is left as it is; contextual=0 drops the others, as FasterVLM does. A patch that was merged before counts with its size in
the mean. Without [CLS] the score is the attention received (see `ClsAttention`).

Where this differs from the authors' code: it counts the [CLS] token among the dominant D and passes it on, which no slot here can hold, so
that its 191 are 190 patches and [CLS], and D here are D patches. merge="sum" is its rule: target + mean of the others in its group, about
twice the norm of a token, where the paper suggests an average. order="appended" is its order on LLaVA: dominant patches, then contextual
tokens, at the end of each image; the default, each contextual token at its target's slot, is what it does on Qwen2.5-VL. There it also
keeps the position ids (positions="keep"), while on LLaVA they are renumbered. It divides by zero at C = 0 and fails when fewer than C
patches remain. Its shares round down, these half up. Newline tokens, which it drops, stay. Merging happens on the tokens that go to the
LM, behind the projector, not in the tower.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from foveate.errors import FoveateError
from foveate.reducers.base import Reducer
from foveate.signals import ClsAttention, TowerKeys, View
from foveate.sites import BeforeLM, Cut, Site
from foveate.tokens import Layout, TokenMap, budget, top


@dataclass(frozen=True)
class VisionZip(Reducer):
    """Keeps `dominant` patches of each tile and merges the others into `contextual` tokens.

    layer: tower block of attention and keys. scope: what the numbers count in and what is merged, "crop" (tile), "image" or "frame".
    merge: "mean" (paper) or "sum" (code). order: "raster" or "appended" (code).
    """

    name: ClassVar[str] = "visionzip"
    paper: ClassVar[str] = "2412.04467"
    dominant: float | int = 191
    contextual: float | int = 30
    layer: int = -2
    scope: str = "crop"
    merge: str = "mean"
    order: str = "raster"
    positions: str = field(default="renumber", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        for option, least in (("dominant", 1), ("contextual", 0)):
            value = getattr(self, option)
            number = type(value) is int and value >= least
            share = type(value) is float and 0.0 <= value <= 1.0 and (value > 0.0 or least == 0)
            if not number and not share:
                bounds = "a share in (0, 1] as a float or a number >= 1 as an int" + ("" if least else ", or 0 for none")
                raise FoveateError(f"visionzip: {option}={value!r} is not possible; give {bounds}")
        if type(self.layer) is not int:
            raise FoveateError(f"visionzip: layer={self.layer!r} is not possible; give an integer, such as -2 for the last block but one")
        choices = {"scope": ("crop", "image", "frame"), "merge": ("mean", "sum"), "order": ("raster", "appended")}
        for option, possible in choices.items():
            if getattr(self, option) not in possible:
                raise FoveateError(f"visionzip: {option}={getattr(self, option)!r} is not possible; choose one of {', '.join(possible)}")

    def sites(self, layers: int) -> list[Site]:
        return [BeforeLM((ClsAttention(self.layer), TowerKeys(self.layer)))]

    def reduce(self, view: View, stage: int = 0) -> Cut:
        layout = view.layout
        dominant = top(layout, view.signal(ClsAttention(self.layer)), self.dominant, scope=self.scope).flatten()
        keys = view.signal(TowerKeys(self.layer)).flatten(0, 1).to(torch.float64)
        group = layout.groups(self.scope).flatten()
        # Slot numbers count over the whole batch here. into: the slot that a slot ends in, -1 where it is dropped.
        into = torch.where(dominant, torch.arange(group.numel(), device=group.device), -1)
        target = torch.zeros_like(dominant)
        for g in range(int(group.max()) + 1 if group.numel() else 0):
            slots = (group == g).nonzero()[:, 0]
            rest = slots[~dominant[slots]]
            n, C = rest.numel(), self._contextual(slots.numel())
            if n <= C:
                into[rest] = rest
            elif C:
                place = torch.arange(n, device=rest.device)
                step = n // C
                is_target = (place % step == 0) & (place < C * step)
                targets, others = rest[is_target], rest[~is_target]
                unit = torch.nn.functional.normalize(keys[rest], dim=-1)
                # In float64 and rounded, so that equal keys tie whatever the shape of the product; argmax takes the first of equals.
                similarity = (unit[~is_target] @ unit[is_target].T).to(torch.float32)
                into[targets], into[others] = targets, targets[similarity.argmax(-1)]
                target[targets] = True
        return Cut(self._map(layout, into.view(layout.shape), target.view(layout.shape)))

    def count(self, arriving: int, original: int, stage: int = 0) -> int:
        """Of one crop (or frame) where `scope` says so: an image of several has the sum."""
        D = budget(self.dominant, arriving)
        return D + min(self._contextual(arriving), arriving - D)

    def _contextual(self, patches: int) -> int:
        return budget(self.contextual, patches) if self.contextual else 0

    def _map(self, layout: Layout, into_BN: Tensor, target_BN: Tensor) -> TokenMap:
        """The map that takes each patch into the slot that `into_BN` names; `target_BN`: contextual tokens that others were merged into."""
        visual, (B, N) = layout.visual, layout.shape
        slot = torch.arange(B * N, device=visual.device).view(B, N)
        stays = visual & (into_BN == slot)
        if not bool(target_BN.any()):
            return TokenMap.keep(layout, stays)
        stays = layout.valid & (stays | ~visual)
        index = torch.arange(N, device=visual.device).expand(B, N)
        key = 2 * index
        if self.order == "appended":
            image = layout.groups()
            last = torch.zeros(int(image.max()) + 1, dtype=torch.int64, device=key.device)
            last = last.scatter_reduce(0, image[visual], index[visual], "amax")
            key = torch.where(target_BN, 2 * last[image.clamp(min=0)] + 1, key)
        counts = stays.sum(1)
        M = int(counts.max())
        at = torch.argsort(torch.where(stays, key, 2 * N + 2), dim=1, stable=True)[:, :M]
        representative = torch.where(torch.arange(M, device=at.device) < counts[:, None], at, -1)

        # Each slot's column among the targets, and its place among the members of its target.
        row, column = (representative >= 0).nonzero(as_tuple=True)
        new = torch.zeros(B * N, dtype=torch.int64, device=at.device)
        new[row * N + representative[row, column]] = row * M + column
        source = (stays | (visual & (into_BN >= 0))).flatten().nonzero()[:, 0]
        goal = new[torch.where(visual, into_BN, slot).flatten()[source]]
        order = torch.argsort(goal, stable=True)
        source, goal = source[order], goal[order]
        size = torch.bincount(goal, minlength=B * M)
        E = int(size.max())
        place = torch.arange(goal.numel(), device=goal.device) - (size.cumsum(0) - size)[goal]
        member = torch.full((B * M, E), -1, dtype=torch.int64, device=goal.device)
        member[goal, place] = source % N
        member = member.view(B, M, E)

        there = member >= 0
        if self.merge == "mean":
            weight = layout.size.gather(1, member.clamp(min=0).view(B, -1)).view(B, M, E).to(torch.float64)
            weight = torch.where(there, weight, 0.0)
            weight = torch.where(there.sum(-1, keepdim=True) > 1, weight / weight.sum(-1, keepdim=True), there.to(torch.float64))
        else:
            others = (there.sum(-1, keepdim=True) - 1).clamp(min=1)
            weight = torch.where(member == representative[..., None], 1.0, there / others.to(torch.float64))
        return TokenMap.merge(layout, member, weight, representative)
