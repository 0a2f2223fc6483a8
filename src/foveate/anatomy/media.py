"""Images or videos of a call that has just encoded them: what a reading of their tokens goes by, and what it says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from foveate.anatomy.raster import Laid
from foveate.anatomy.tower import Extras

if TYPE_CHECKING:
    from foveate.anatomy.reading import Anatomy

Boxes = tuple[list[tuple[int, int, int, int]], tuple[int, int]]
"""From which box of patches (first row and column, the ones after its last) each token is made, and the grid (rows, columns) of patches."""


@dataclass(frozen=True)
class Media:
    """A call that has encoded the images or videos of one modality.

    features   (L, D) of each item
    given      the call's arguments by name
    crops      of each call of the tower meanwhile, how many crops it had and how many tokens each of them, 0 where it does not say
    overheard  of methods that the call has called in turn, what `Anatomy.overheard` remembers
    extras     the tokens that the tower has beside its patches
    """

    anatomy: Anatomy
    modality: str
    features: list[Tensor]
    given: dict[str, Any]
    crops: list[tuple[int, int]]
    overheard: dict[str, Any]
    extras: Extras

    @property
    def device(self) -> torch.device:
        return self.features[0].device if self.features else torch.device("cpu")

    @property
    def lengths(self) -> list[int]:
        """Tokens of each item."""
        return [int(f.shape[0]) for f in self.features]

    @property
    def pixels_given(self) -> Any:
        """The argument that holds the pictures, a tensor or a list."""
        return next((v for name, v in self.given.items() if name.startswith("pixel_values") and v is not None), None)

    @cached_property
    def pixels(self) -> Tensor | None:
        """The first such argument that is a tensor."""
        return next((v for name, v in self.given.items() if name.startswith("pixel_values") and isinstance(v, Tensor)), None)

    @cached_property
    def boxes(self) -> Boxes | None:
        """Those of each item's tokens, where the model says so."""
        return None if self.pixels is None else self.anatomy.boxes(self.pixels)

    def named(self, end: str) -> Any:
        """The first argument that was given and whose name ends so; None if there is none."""
        return next((v for name, v in self.given.items() if name.endswith(end) and v is not None), None)


@dataclass(frozen=True)
class Arrangement:
    """How the tokens of a call lie.

    parts  what the tower has made, in its order: it is of the tokens of these that the tower says something. They are the items, unless
           the model packs its items from them.
    """

    parts: list[Laid]

    def items(self, values: Mapping[Any, list[Tensor]]) -> list[tuple[Laid, dict[Any, Tensor]]]:
        """Of each item how it lies, and what was said of its tokens; `values` are (l,) or (l, h) of each part."""
        return [(laid, {about: said[i] for about, said in values.items()}) for i, laid in enumerate(self.parts)]


@dataclass(frozen=True)
class Patches:
    """How the tower's patches become the tokens of a call's items.

    segments  how many images or frames a tower that packs them has seen; None: each crop is one
    grouped   how many patches that become one token stand side by side; 0: they are blocks of the raster
    order     (groups,) int64 where the tower has put each of these groups, or single patches (windows); None: in their order
    boxes     from which boxes of patches a bridge makes the tokens; None: by groups, blocks, or one of each
    each      the same of each crop, where that is not so of all alike; (): it is
    pooled    (tokens, n) int64 of which patches, counted through all crops, each token is made, -1 for none; None: the model does not say
    """

    segments: int | None = None
    grouped: int = 0
    order: Tensor | None = None
    boxes: Boxes | None = None
    each: tuple[Boxes, ...] = ()
    pooled: Tensor | None = None
