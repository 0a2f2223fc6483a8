"""A schedule: how many visual tokens each decoder layer has, the best by some ranking (arXiv 2412.00556).

    keeps = l1:r1/l2:r2/…   with l1 < l2 < … and 1 >= r1 >= r2 >= …
    in front of layer l_i the best round-half-up(r_i * L), at least 1, of an image's L tokens stay, by the signal, and in raster order

Shares are always of what the image had in front of the first layer, so that roundings never add up, and are dropped tokens, which stay
dropped, none of the next ranking. `foveate search` finds the shares for a model by the paper's two ways, G-Search and P-Sigmoid.

Unverified: of the paper no more than the abstract was read. It has attention rank the tokens and finds the ranking alike in all layers
behind the first, so that the number needed may be taken as one that does not rise with depth. This library's own reading is the rest: the
score is the last prompt token's row in the layer before, mean over heads, as in FastV (2403.06764) and PyramidDrop (2410.17247), and is
taken anew at every cut; positions are kept. Code by the authors was not found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from foveate.contract import Attention, ClsAttention, Cut, Noise, Signal, Site, View, Workload
from foveate.reducers.common import asked, choose, in_front_of, integers
from foveate.reducers.falling import Falling
from foveate.reducers.uniform import Uniform

SIGNALS = ("attention", "cls", "random", "uniform")


@dataclass(frozen=True)
class Schedule(Falling):
    """Keeps a share of each image's tokens in front of each of some decoder layers, by layer:share pairs.

    keeps   see `foveate.reducers.falling`
    signal  "attention": the last prompt token's row in the layer before; "cls": the tower's [CLS] attention; "random": a hash of `seed`
            and the image; "uniform": evenly spaced
    """

    name: ClassVar[str] = "schedule"
    paper: ClassVar[str] = "2412.00556"
    experimental: ClassVar[bool] = True
    looks_at: ClassVar[frozenset[str]] = frozenset({"text", "attention"})
    examples: ClassVar[tuple[str, ...]] = (
        "schedule:keeps=1:0.75/3:0.4",
        "schedule:keeps=0:0.7/2:0.3,signal=cls,positions=renumber",
        "schedule:keeps=0:0.7/3:0.3,signal=random",
        "schedule:keeps=1:0.7/2:0.3,signal=uniform",
    )
    # Of fewer than 2,500 tokens 0.9998 are all.
    keeps_all: ClassVar[tuple[str, ...]] = ("schedule:keeps=1:0.9999/3:0.9998", "schedule:keeps=1:0.99/2:0.98")
    multiplies: ClassVar[tuple[str, ...]] = ("schedule:keeps=1:0.5",)
    keeps: str | Sequence[tuple[int, float]] = "2:0.5"
    signal: str = "attention"
    seed: int = 0

    def check(self) -> None:
        super().check()
        choose(self, signal=SIGNALS)
        integers(self, seed=0)
        if self.signal == "attention":
            self.after_a_layer(", or choose signal=cls, random or uniform")

    def sites(self, layers: int) -> list[Site]:
        return [in_front_of(layer, *self._needs(layer)) for layer, _ in self.cuts]

    def _needs(self, layer: int) -> tuple[Signal, ...]:
        if self.signal == "attention":
            return (Attention(layer - 1),)
        return (ClsAttention(),) if self.signal == "cls" else (Noise(self.seed),) if self.signal == "random" else ()

    def score(self, view: View, stage: int = 0) -> Tensor:
        (signal,) = self._needs(self.cuts[stage][0])
        scores = view.signal(signal)
        return asked(self.name, view, lambda question: scores.row(question.asking)) if self.signal == "attention" else scores

    def reduce(self, view: View, stage: int = 0) -> Cut:
        if self.signal == "uniform":  # is no score
            return Uniform(self.cuts[stage][1], of="original").reduce(view)
        return super().reduce(view, stage)

    def score_flops(self, sizes: Workload, stage: int = 0) -> int:
        return sizes.rows(1) if self.signal == "attention" else 0
