"""EE-MLLM: text attends to everything before it, a visual token to itself alone (arXiv 2408.11795; experimental).

Text t is as ever, over the keys and values of visual tokens and text. For a visual token v there are two readings of the abstract:

visual_update="self"    v <- v + norm(v) Wv Wo        a softmax over one key is 1
                        v <- v + FFN(norm(v))
visual_update="none"    v <- v                        each layer computes its keys and values, and nothing else

Pairs of query and key, for V visual tokens and T of text: T (V + T) + V, or T (V + T), of (V + T)². Two visual tokens and two of text under
a causal mask: 9 or 7 of 10. With the products that are not needed either (queries of visual tokens in the first, all but their keys and
values in the second) a prompt of 576 and 64 tokens takes 0.90 or 0.25 of the FLOPs (`foveate.accounting.conventions.eemllm`).

The paper could be read as its abstract alone, and says that a model is trained so; there is no public code. Of the two readings the FLOPs
that are told speak for the first, the seconds for the second. Here a layer is a mask: it computes all of it, and so is no faster. Newlines
and marks between patches are text. Each sees the keys of visual tokens wherever they stand, and none of visual tokens behind it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from foveate.contract import View, Visible, Workload
from foveate.reducers.common import choose
from foveate.reducers.seeing import Seeing
from foveate.tokens import Layout


@dataclass(frozen=True)
class EEMLLM(Seeing):
    """Lets text attend to all, and each visual token to itself alone.

    visual_update  "self", "none" (visual tokens leave every layer as they came), or "full": all attend as ever
    """

    name: ClassVar[str] = "eemllm"
    paper: ClassVar[str] = "2408.11795"
    experimental: ClassVar[bool] = True
    examples: ClassVar[tuple[str, ...]] = ("eemllm", "eemllm:layer=1,visual_update=none")
    keeps_all: ClassVar[tuple[str, ...]] = ("eemllm:visual_update=full",)
    visual_update: str = "self"

    def check(self) -> None:
        super().check()
        choose(self, visual_update=("self", "none", "full"))

    def reduce(self, view: View, stage: int = 0) -> Visible:
        return Visible(everything if self.visual_update == "full" else not_for_visual, holds=self.visual_update == "none")

    def unseen(self, sizes: Workload, stage: int = 0) -> int:
        visual, slots = sum(sizes.arriving), sizes.slots
        return {"self": visual * (slots - 1), "none": visual * slots, "full": 0}[self.visual_update]


def everything(query: Layout, key: Layout) -> Tensor:
    """(B, M, K) bool: True."""
    return query.valid.new_ones(1, 1, 1).expand(*query.shape, key.shape[1])


def not_for_visual(query: Layout, key: Layout) -> Tensor:
    """(B, M, K) bool: whether the query is none of a visual token."""
    return ~query.visual[..., None].expand(-1, -1, key.shape[1])
