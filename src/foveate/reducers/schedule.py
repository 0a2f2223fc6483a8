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
from decimal import Decimal
from typing import Any, ClassVar, Self

from torch import Tensor

from foveate.contract import Attention, ClsAttention, Cut, Noise, Signal, Site, View, Workload
from foveate.errors import FoveateError
from foveate.reducers.common import asked, choose, in_front_of, integers
from foveate.reducers.ranker import Ranker
from foveate.reducers.uniform import Uniform
from foveate.tokens import budget

SIGNALS = ("attention", "cls", "random", "uniform")


@dataclass(frozen=True)
class Schedule(Ranker):
    """Keeps a share of each image's tokens in front of each of some decoder layers, by layer:share pairs.

    keeps   "2:0.5/4:0.25" or [(2, 0.5), (4, 0.25)]: layer indices (0-based), ascending, and shares in (0, 1], which do not rise; pairs
            that change nothing are left out of the spelling, and "0:1" keeps everything
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
        cuts = _read(self.keeps)
        if self.signal == "attention" and cuts and cuts[0][0] == 0:
            raise FoveateError(
                f"schedule: keeps={self.keeps!r} is not possible, no layer's attention can be read in front of layer 0; begin at layer 1, "
                "or choose signal=cls, random or uniform"
            )

    def canonical(self) -> dict[str, Any]:
        return {"keeps": "/".join(f"{layer}:{Decimal(str(share)).normalize():f}" for layer, share in self.cuts) or "0:1"}

    @classmethod
    def of_counts(cls, counts: Sequence[int], per_image: int, **options: Any) -> Self:
        """The schedule that leaves an image of `per_image` tokens counts[l] of them in decoder layer l, and any other the same shares."""
        return cls(keeps=[(layer, _share(count, per_image)) for layer, count in enumerate(counts)], **options)

    @property
    def cuts(self) -> list[tuple[int, float]]:
        """(layer, share) wherever tokens are dropped."""
        return _read(self.keeps)

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

    def left(self, arriving: int, original: int, stage: int = 0) -> int:
        return min(arriving, budget(self.cuts[stage][1], original))

    def reduce(self, view: View, stage: int = 0) -> Cut:
        if self.signal == "uniform":  # is no score
            return Uniform(self.cuts[stage][1], of="original").reduce(view)
        return super().reduce(view, stage)

    def score_flops(self, sizes: Workload, stage: int = 0) -> int:
        return sizes.rows(1) if self.signal == "attention" else 0


def _read(keeps: Any) -> list[tuple[int, float]]:
    """The (layer, share) pairs at which the share falls. FoveateError for anything that is no schedule."""

    def refuse(why: str) -> FoveateError:
        return FoveateError(f"schedule: keeps={keeps!r} is not possible, {why}; write layer:share pairs, as in keeps=2:0.5/4:0.25")

    pairs: list[tuple[int, float]] = []
    last, before = -1, 1.0
    for given in keeps.split("/") if isinstance(keeps, str) else keeps if isinstance(keeps, (list, tuple)) else [keeps]:
        try:
            parts = given.split(":") if isinstance(given, str) else [str(part) for part in given]
            layer, share = int(parts[0]), float(parts[1])
            if len(parts) != 2:
                raise ValueError
        except (TypeError, ValueError, IndexError):
            raise refuse(f"{given!r} is no layer and share" if given != "" else "a pair is empty") from None
        if not 0 < share <= 1:
            raise refuse(f"the share {parts[1]} is not in (0, 1]")
        if layer <= last:
            raise refuse(f"layer {layer} does not come after layer {last}" if layer >= 0 else f"there is no layer {layer}")
        if share > before:
            raise refuse(f"the share rises from {before:g} to {share:g} at layer {layer}, and what is dropped does not come back")
        if share < before:
            pairs.append((layer, share))
        last, before = layer, share
    if last < 0:
        raise refuse("it is empty")
    return pairs


def _share(count: int, tokens: int) -> float:
    """The shortest decimal that means `count` of `tokens`."""
    if not 1 <= count <= tokens:
        raise FoveateError(f"schedule: {count} of {tokens} tokens cannot be kept; give counts from 1 to {tokens}")
    shares = (round(count / tokens, digits) for digits in range(1, 18))
    return next(share for share in shares if 0 < share <= 1 and budget(share, tokens) == count)
