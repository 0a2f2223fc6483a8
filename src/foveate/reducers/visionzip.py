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

from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import torch

from foveate.contract import BeforeLM, ClsAttention, Cut, Site, TowerKeys, View, Workload, products
from foveate.errors import FoveateError
from foveate.reducers.base import Reducer
from foveate.reducers.common import choose, groups, integers, into
from foveate.tokens import budget, top


@dataclass(frozen=True)
class VisionZip(Reducer):
    """Keeps `dominant` patches of each tile and merges the others into `contextual` tokens.

    layer: tower block of attention and keys. scope: what the numbers count in and what is merged, "crop" (tile), "image" or "frame".
    merge: "mean" (paper) or "sum" (code). order: "raster" or "appended" (code).
    """

    name: ClassVar[str] = "visionzip"
    paper: ClassVar[str] = "2412.04467"
    amounts: ClassVar[tuple[str, ...]] = ("dominant", "contextual")
    looks_at: ClassVar[frozenset[str]] = frozenset({"tower"})
    examples: ClassVar[tuple[str, ...]] = (
        "visionzip:dominant=0.4,contextual=0.2",
        "visionzip:dominant=4,contextual=3,merge=sum,order=appended,positions=keep",
    )
    keeps_all: ClassVar[tuple[str, ...]] = ("visionzip:dominant=1.0,contextual=1",)
    multiplies: ClassVar[tuple[str, ...]] = ("visionzip:dominant=0.3,contextual=0.2",)
    dominant: float | int = 191
    contextual: float | int = 30
    layer: int = -2
    scope: str = "crop"
    merge: str = "mean"
    order: str = "raster"
    positions: str = field(default="renumber", kw_only=True)

    def check(self) -> None:
        super().check()
        for option, least in (("dominant", 1), ("contextual", 0)):
            value = getattr(self, option)
            number = type(value) is int and value >= least
            share = type(value) is float and 0.0 <= value <= 1.0 and (value > 0.0 or least == 0)
            if not number and not share:
                bounds = "a share in (0, 1] as a float or a number >= 1 as an int" + ("" if least else ", or 0 for none")
                raise FoveateError(f"visionzip: {option}={value!r} is not possible; give {bounds}")
        integers(self, layer=None)
        choose(self, scope=("crop", "image", "frame"), merge=("mean", "sum"), order=("raster", "appended"))

    def at(self, keep: float) -> Self:
        """In the paper's proportion of 54 dominant patches to 10 contextual tokens."""
        return replace(self, dominant=round(keep * 54 / 64, 6), contextual=round(keep * 10 / 64, 6))

    def sites(self, layers: int) -> list[Site]:
        return [BeforeLM((ClsAttention(self.layer), TowerKeys(self.layer)))]

    def reduce(self, view: View, stage: int = 0) -> Cut:
        layout = view.layout
        dominant = top(layout, view.signal(ClsAttention(self.layer)), self.dominant, scope=self.scope).flatten()
        keys = view.signal(TowerKeys(self.layer)).flatten(0, 1).to(torch.float64)
        slot = torch.arange(dominant.numel(), device=dominant.device)
        home, target = torch.where(dominant, slot, -1), torch.zeros_like(dominant)
        for slots in groups(layout, self.scope):
            rest = slots[~dominant[slots]]
            n, C = rest.numel(), self._contextual(slots.numel())
            if n <= C:
                home[rest] = rest
            elif C:
                place = torch.arange(n, device=rest.device)
                step = n // C
                is_target = (place % step == 0) & (place < C * step)
                targets, others = rest[is_target], rest[~is_target]
                unit = torch.nn.functional.normalize(keys[rest], dim=-1)
                # In float64 and rounded, so that equal keys tie whatever the shape of the product; argmax takes the first of equals.
                similarity = (unit[~is_target] @ unit[is_target].T).to(torch.float32)
                home[targets], home[others] = targets, targets[similarity.argmax(-1)]
                target[targets] = True
        # Tokens that others went into weigh what they stand for, or, by the code's rule, the target 1 and the others 1 together.
        goes = home >= 0
        share = layout.size.flatten().to(torch.float64) if self.merge == "mean" else (home != slot).to(torch.float64)
        total = torch.zeros_like(share).index_add(0, home[goes], share[goes])[home.clamp(min=0)]
        weight = torch.where(goes & (share > 0), share / total, 1.0)
        place = 2 * slot
        for slots in groups(layout, "image"):
            place[slots[target[slots]]] = 2 * slots[-1] + 1  # behind the image's last
        return Cut(into(layout, home, weight, place if self.order == "appended" else None))

    def count(self, work: Workload, stage: int = 0) -> list[int]:
        def left(arriving: int, _: int) -> int:
            D = budget(self.dominant, arriving)
            return D + min(self._contextual(arriving), arriving - D)

        return work.leaving(left, self.scope)

    def score_flops(self, sizes: Workload, stage: int = 0) -> int:
        merged = ((n - budget(self.dominant, n), self._contextual(n)) for n in sizes.groups(self.scope))
        return products(((n - C, C) for n, C in merged if n > C), sizes.tower_width)

    def _contextual(self, patches: int) -> int:
        return budget(self.contextual, patches) if self.contextual else 0
