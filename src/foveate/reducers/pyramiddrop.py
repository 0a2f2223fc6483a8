"""PyramidDrop: the same share of the visual tokens dropped at the end of every stage of the language model (arXiv 2410.17247).

    depth:   | stage 0: v tokens | stage 1: λv | stage 2: λ²v | stage 3: λ³v |        λ = keep = 0.5, 4 equal stages
    s_n = mean over heads of A[last layer of the stage][h, last prompt token, n]

The paper removes ceil((1 - λ) v) of the v tokens that arrive, that is, keeps floor(λv), but here never fewer than one. In a model of 32
layers the drops stand in front of layer indices 8, 16 and 24; where the depth is not a multiple of `stages`, in front of
floor(depth * s / stages), which is this library's rule. Sets are nested, survivors in raster order, positions are renumbered after each
drop.

Where this differs from the authors' code: it scores with the projections of the layer *after* the boundary, run once more on the side,
the paper (and this) with the stage's own last layer. It keeps floor(N0 * ratio) of the original number (`of="original"`; with λ = 1/m
both are the same number). In training it scores by the mean over all tokens that precede an answer, this always by the prompt's last
one. It reduces the first image of a sample only and pads on the right; here every image is ranked on its own, in any batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from foveate.contract import Attention, FromLayer, Site, View, Workload
from foveate.errors import FoveateError
from foveate.reducers.common import asked, attention_before, integers, meant, numbers, spelled
from foveate.reducers.ranker import Ranker
from foveate.tokens import budget


@dataclass(frozen=True)
class PyramidDrop(Ranker):
    """Drops at the `stages` - 1 inner boundaries of `stages` equal parts of the depth.

    keep  one share: λ, kept of what arrives at every drop (with of="original" λ, λ², λ³ … of what the image had); or one entry a drop,
          "0.5-0.25-0.125" or (288, 144, 72): shares of what `of` says, or numbers of tokens. One number holds at every drop.
    of    "arriving" (the paper) or "original" (the code), the latter counted in front of the first layer
    """

    name: ClassVar[str] = "pyramiddrop"
    paper: ClassVar[str] = "2410.17247"
    looks_at: ClassVar[frozenset[str]] = frozenset({"text", "attention"})
    examples: ClassVar[tuple[str, ...]] = ("pyramiddrop:keep=0.5",)
    keeps_all: ClassVar[tuple[str, ...]] = ("pyramiddrop:keep=1.0",)
    multiplies: ClassVar[tuple[str, ...]] = ("pyramiddrop:stages=2",)
    keep: float | int | str | Sequence[float | int] = 0.5
    stages: int = 4
    of: str = "arriving"
    positions: str = field(default="renumber", kw_only=True)

    def check(self) -> None:
        super().check()
        integers(self, stages=2)
        entries = numbers(self.name, "keep", self.keep)
        for entry in entries:
            budget(entry, 1)
        if len(entries) not in (1, self.stages - 1):
            raise FoveateError(
                f"pyramiddrop: keep={self.keep!r} has {len(entries)} entries, but {self.stages} stages have {self.stages - 1} drops; "
                "give one entry for each drop, or a single share for all"
            )

    def canonical(self) -> dict[str, Any]:
        return {"keep": spelled(numbers(self.name, "keep", self.keep))}

    def sites(self, layers: int) -> list[Site]:
        if layers < self.stages:
            raise FoveateError(
                f"pyramiddrop: {layers} decoder layers cannot be cut into {self.stages} stages; give stages={max(2, layers)}"
            )
        boundaries = [layers * s // self.stages for s in range(1, self.stages)]
        return [FromLayer(k, (Attention(k - 1),)) for k in boundaries]

    def score(self, view: View, stage: int = 0) -> Tensor:
        attention = attention_before(self, view, stage)
        return asked(self.name, view, lambda question: attention.row(question.asking))

    def left(self, arriving: int, original: int, stage: int = 0) -> int:
        entries = numbers(self.name, "keep", self.keep)
        entry = entries[0] if len(entries) == 1 else entries[stage]
        if isinstance(entry, int):
            return min(entry, arriving)
        share = meant(entry)
        if len(entries) == 1 and self.of == "original":
            share **= stage + 1
        return min(arriving, max(1, int(share * (original if self.of == "original" else arriving))))

    def score_flops(self, sizes: Workload, stage: int = 0) -> int:
        return sizes.rows(1)
