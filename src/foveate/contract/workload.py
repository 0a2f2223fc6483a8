"""The sizes of what a reducer meets, as far as the cost of its scores depends on them. FLOPs are 2 per multiply-add of a matrix product."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ImageSize:
    """Visual tokens of one image or video in front of the first decoder layer, by its crops (tiles) and by its frames."""

    crops: tuple[int, ...]
    frames: tuple[int, ...]

    @classmethod
    def of(cls, place_L: Tensor) -> ImageSize:
        """From the crop and the frame (L, 2 or more) of its tokens."""
        crops, frames = (column.unique(return_counts=True)[1].tolist() for column in place_L[:, :2].unbind(1))
        return cls(tuple(crops), tuple(frames))

    @classmethod
    def whole(cls, tokens: int) -> ImageSize:
        return cls((tokens,), (tokens,))

    @property
    def tokens(self) -> int:
        return sum(self.crops)


@dataclass(frozen=True)
class Workload:
    """One prompt at one site; in the vision tower one crop.

    images       as they are in front of the first decoder layer (the tower's first block)
    arriving     tokens of each of them that come to the site
    text         all other tokens there ([CLS] and registers in the tower)
    width        of a token's state
    heads        of the attention that is looked at, whose queries of one token have `query_width` values in all
    keys         tokens that this attention saw
    tower_width  of the tower's keys, mean over heads
    """

    images: tuple[ImageSize, ...]
    arriving: tuple[int, ...]
    text: int = 0
    width: int = 0
    heads: int = 0
    query_width: int = 0
    keys: int = 0
    tower_width: int = 0

    @property
    def slots(self) -> int:
        return sum(self.arriving) + self.text

    def groups(self, scope: str) -> list[int]:
        """Tokens of each group of the scope. Where some have gone before, an image's groups are taken to have lost the same share."""
        if scope == "sample":
            return [sum(self.arriving)]
        if scope == "image":
            return list(self.arriving)
        found = []
        for image, left in zip(self.images, self.arriving, strict=True):
            parts = image.crops if scope == "crop" else image.frames
            ends = [sum(parts[: i + 1]) * left // image.tokens for i in range(len(parts))] if image.tokens else []
            found += [end - start for start, end in zip([0, *ends], ends, strict=False)]
        return found

    def rows(self, count: int) -> int:
        """FLOPs of `count` rows of attention."""
        return 2 * count * self.keys * self.query_width


def products(pairs: Iterable[tuple[int, int]], width: int) -> int:
    """FLOPs of comparing a with b vectors of `width`, for each (a, b)."""
    return sum(2 * a * b * width for a, b in pairs)
