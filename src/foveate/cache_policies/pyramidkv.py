"""PyramidKV: SnapKV with more room in the lower layers than in the higher (arXiv 2406.02069).

    b = keep - w                                     what one layer may keep beside the window, mean over layers
    b_top = b / beta    b_bottom = 2 b - b_top       if b_bottom > n - w: b_bottom = n - w and b_top = 2 b - b_bottom
    b_l  = from b_bottom in the first layer to b_top in the last, in equal steps

of n tokens. All layers together keep as much as SnapKV would, to the token.

Where this differs from the authors' code, whose budgets we know through kvpress: what rounding leaves over is dealt out, so that the
sum is exact (theirs rounds each layer down); keep counts the window; layers that recur or slide have no step of the pyramid; see SnapKV.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

from foveate.cache_policies.snapkv import SnapKV
from foveate.reducers.common import dealt
from foveate.tokens import budget


@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """SnapKV whose budget falls in equal steps from the first layer to the last, which has 1/`beta` of the mean; larger is steeper."""

    name: ClassVar[str] = "pyramidkv"
    paper: ClassVar[str] = "2406.02069"
    examples: ClassVar[tuple[str, ...]] = ("pyramidkv:keep=0.5,window=4,beta=4",)
    keeps_all: ClassVar[tuple[str, ...]] = ("pyramidkv:keep=1.0",)
    beta: int = 20

    def check(self) -> None:
        super().check()
        self.least(1, "beta")

    def count(self, tokens: int, number: int, layers: int) -> int:
        return pyramid(budget(self.keep, tokens), tokens, min(self.window, tokens), layers, self.beta)[number]


@lru_cache(maxsize=256)
def pyramid(mean: int, tokens: int, window: int, layers: int, beta: int) -> list[int]:
    """What each layer keeps of `tokens`, `mean` on average, at least the window; a mean within the window is every layer's own."""
    rest, most = mean - window, tokens - window
    if rest <= 0:
        return [mean] * layers
    bottom = 2 * rest - rest / beta
    top = rest / beta
    if bottom > most:
        bottom, top = most, 2 * rest - most
    steps = [bottom - (bottom - top) * layer / max(1, layers - 1) for layer in range(layers)] if layers > 1 else [float(rest)]
    return [window + share for share in dealt(rest * layers, steps, [most] * layers)]
