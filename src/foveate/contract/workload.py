"""The sizes of what a reducer meets: how many tokens leave a site, and what its scores cost, follow from them. FLOPs are 2 per multiply-add
of a matrix product."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ImageSize:
    """Visual tokens of one image or video in front of the first decoder layer, by its crops (tiles) and by its frames.

    grids  the (rows, columns) of each crop of each frame; () where one of them is no full raster, or nothing is known of it
    """

    crops: tuple[int, ...]
    frames: tuple[int, ...]
    grids: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, place_L4: Tensor) -> ImageSize:
        """From the crop, frame, row and column (L, 4) of its tokens."""
        crops, frames = (column.unique(return_counts=True)[1].tolist() for column in place_L4[:, :2].unbind(1))
        return cls(tuple(crops), tuple(frames), _grids(place_L4))

    @classmethod
    def whole(cls, tokens: int) -> ImageSize:
        """An image of one crop, of whose rows and columns nothing is known."""
        return cls((tokens,), (tokens,))

    @classmethod
    def joined(cls, parts: Sequence[ImageSize]) -> ImageSize:
        """One image from pictures of its crops."""
        crops = tuple(tokens for part in parts for tokens in part.crops)
        known = all(part.grids for part in parts)
        return cls(crops, (sum(crops),), tuple(grid for part in parts for grid in part.grids) if known else ())

    @property
    def tokens(self) -> int:
        return sum(self.crops)

    def groups(self, scope: str) -> tuple[int, ...]:
        """Tokens of each of its groups of the scope "crop", "frame" or "image"."""
        return self.crops if scope == "crop" else self.frames if scope == "frame" else (self.tokens,)


def _grids(place_L4: Tensor) -> tuple[tuple[int, int], ...]:
    """(rows, columns) of each crop of each frame, () unless all are full rasters."""
    if not len(place_L4) or int(place_L4[:, 2:].min()) < 0 or len(place_L4.unique(dim=0)) < len(place_L4):
        return ()
    found, owner = [], torch.unique(place_L4[:, :2], dim=0, return_inverse=True)[1]
    for part in range(int(owner.max()) + 1):
        cells = place_L4[owner == part][:, 2:]
        rows, columns = (len(axis.unique()) for axis in cells.unbind(1))
        if rows * columns != len(cells):
            return ()
        found.append((rows, columns))
    return tuple(found)


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
    layers       decoder layers of the model; 0: not told
    """

    images: tuple[ImageSize, ...]
    arriving: tuple[int, ...]
    text: int = 0
    width: int = 0
    heads: int = 0
    query_width: int = 0
    keys: int = 0
    tower_width: int = 0
    layers: int = 0

    @property
    def slots(self) -> int:
        return sum(self.arriving) + self.text

    def groups(self, scope: str) -> list[int]:
        """Tokens of each group of the scope. Where some have gone before, an image's groups are taken to have lost the same share."""
        if scope == "sample":
            return [sum(self.arriving)]
        return [arriving for parts in self._parts(scope) for arriving, _ in parts]

    def leaving(self, left: Callable[[int, int], int], scope: str = "image") -> list[int]:
        """Of each image what `left(arriving, original)` says of its groups of the scope, added up. Which images of a sample lose their
        tokens is not known from sizes: they are taken to lose the same share."""
        if scope != "sample":
            return [sum(left(*part) for part in parts) for parts in self._parts(scope)]
        return _dealt(left(sum(self.arriving), sum(image.tokens for image in self.images)), self.arriving)

    def leaving_clips(self, left: Callable[[Sequence[int]], int], scope: str = "image") -> list[int]:
        """Of each image what `left` says of the tokens of each of its frames; of one without several frames, of its crops. With the scope
        "sample" all images are the frames of one clip, and are taken to lose the same share."""
        parts = [image.frames if len(image.frames) > 1 else image.crops for image in self.images]
        clips = [_dealt(here, before) for here, before in zip(self.arriving, parts, strict=True)]
        if scope == "sample":
            return _dealt(left([tokens for frames in clips for tokens in frames if tokens]), self.arriving)
        return [left([tokens for tokens in frames if tokens]) for frames in clips]

    def _parts(self, scope: str) -> list[list[tuple[int, int]]]:
        """(arriving, original) of each group of each image."""
        parts = [image.groups(scope) for image in self.images]
        return [list(zip(_dealt(left, before), before, strict=True)) for before, left in zip(parts, self.arriving, strict=True)]

    def rows(self, count: int) -> int:
        """FLOPs of `count` rows of attention."""
        return 2 * count * self.keys * self.query_width


def products(pairs: Iterable[tuple[int, int]], width: int) -> int:
    """FLOPs of comparing a with b vectors of `width`, for each (a, b)."""
    return sum(2 * a * b * width for a, b in pairs)


def _dealt(tokens: int, over: tuple[int, ...]) -> list[int]:
    """`tokens` in proportion to `over`, to the token."""
    total = sum(over)
    ends = [sum(over[: i + 1]) * tokens // total if total else 0 for i in range(len(over))]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]
