"""What a method is that leaves, in front of some decoder layers, a share of an image's tokens: it says how it ranks."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from typing import Any, Self

from foveate.errors import FoveateError
from foveate.reducers.ranker import Ranker
from foveate.tokens import budget


class Falling(Ranker):
    """Keeps a share of each image's tokens in front of each of some decoder layers, by layer:share pairs.

    keeps   "2:0.5/4:0.25" or [(2, 0.5), (4, 0.25)]: layer indices (0-based), ascending, and shares in (0, 1] of what the image had in front
            of the first layer, which do not rise; pairs that change nothing are left out of the spelling, and "0:1" keeps everything

    A subclass names `keeps` as a field.
    """

    keeps: Any

    def check(self) -> None:
        super().check()
        read_keeps(self.name, self.keeps)

    def canonical(self) -> dict[str, Any]:
        return {"keeps": "/".join(f"{layer}:{Decimal(str(share)).normalize():f}" for layer, share in self.cuts) or "0:1"}

    @classmethod
    def of_counts(cls, counts: Sequence[int], per_image: int, **options: Any) -> Self:
        """The one that leaves an image of `per_image` tokens counts[l] of them in decoder layer l, and any other the same shares."""
        keeps = [(layer, _share(cls.name, count, per_image)) for layer, count in enumerate(counts)]
        return cls(**{**options, "keeps": keeps})

    @property
    def cuts(self) -> list[tuple[int, float]]:
        """(layer, share) wherever tokens are dropped."""
        return read_keeps(self.name, self.keeps)

    def left(self, arriving: int, original: int, stage: int = 0) -> int:
        return min(arriving, budget(self.cuts[stage][1], original))

    def after_a_layer(self, instead: str = "") -> None:
        """FoveateError where it cuts in front of layer 0, and ranks by the attention of the layer before. instead: another way out."""
        if (cuts := self.cuts) and cuts[0][0] == 0:
            raise FoveateError(
                f"{self.name}: keeps={self.keeps!r} is not possible, no layer's attention can be read in front of layer 0; begin at layer 1"
                + instead
            )


def read_keeps(name: str, keeps: Any) -> list[tuple[int, float]]:
    """The (layer, share) pairs at which the share falls. FoveateError for anything that is no schedule."""

    def refuse(why: str) -> FoveateError:
        return FoveateError(f"{name}: keeps={keeps!r} is not possible, {why}; write layer:share pairs, as in keeps=2:0.5/4:0.25")

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


def _share(name: str, count: int, tokens: int) -> float:
    """The shortest decimal that means `count` of `tokens`."""
    if not 1 <= count <= tokens:
        raise FoveateError(f"{name}: {count} of {tokens} tokens cannot be kept; give counts from 1 to {tokens}")
    shares = (round(count / tokens, digits) for digits in range(1, 18))
    return next(share for share in shares if 0 < share <= 1 and budget(share, tokens) == count)
