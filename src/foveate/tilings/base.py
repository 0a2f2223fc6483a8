"""What every tiling is: a frozen dataclass that says into which views an image of some size is cut, in whole numbers, without a pixel."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from foveate.errors import FoveateError
from foveate.reducers.spelling import Spelled
from foveate.tokens import ImagePlan

Pair = tuple[int, int]


@dataclass(frozen=True)
class Sight:
    """What a vision tower sees at once, and what becomes of it.

    side   of the square of pixels
    patch  side of a patch in pixels
    merge  how many patches a side become one token; at an edge also fewer
    """

    side: int
    patch: int = 14
    merge: int = 1

    def grid(self, width: int, height: int) -> Pair:
        """(rows, columns) of patches of a view."""
        return height // self.patch, width // self.patch

    def made(self, grid: Pair) -> tuple[int, Pair | None]:
        """How many tokens become of a grid of patches, and their (rows, columns), None where they are no raster."""
        cells = -(-grid[0] // self.merge), -(-grid[1] // self.merge)
        return cells[0] * cells[1], cells


@dataclass(frozen=True)
class Tiling(Spelled, ABC):
    """One method. Its fields are the method's options; `budget`: how many views the images of one prompt have together at most.

    What a class says of its method:

    name, paper  its spelling, and its arXiv number ("-": of no paper)
    sight        the tower and bridge of the published setting, at which `plan` counts unless told otherwise
    marks        the learned vectors that it puts between tokens, of foveate.tokens.MARKS
    shapes       whether its views have shapes of their own, which a tower and a bridge must take
    """

    paper: ClassVar[str]
    sight: ClassVar[Sight]
    marks: ClassVar[tuple[str, ...]] = ()
    shapes: ClassVar[bool] = False
    budget: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.budget is not None:
            self.least(1, "budget")
        self.check()

    def check(self) -> None:
        """Raises FoveateError where an option is not possible."""

    @property
    def scales(self) -> int:
        """Maps that the tower's features are joined to by channels before the bridge; 1: there is one, as the tower makes it."""
        return 1

    @property
    def joins(self) -> int:
        """Views of an image whose features become one map before the bridge; 1: every view becomes tokens of its own."""
        return 1

    @property
    def lens(self) -> dict[str, Any] | None:
        """The trained part between tower and bridge: {"kind": one of foveate.bridges.LENSES, arguments}; None: there is none."""
        return None

    @property
    def layers(self) -> tuple[int, ...]:
        """In front of which decoder layers, counted from 0, the stacks of a plan's mosaic are added, one each; (): there is no mosaic."""
        return ()

    @abstractmethod
    def lay(self, width: int, height: int, most: int | None, sight: Sight) -> ImagePlan:
        """The plan of an image of these pixels with at most `most` views, None: as many as the method wants. FoveateError where it needs
        more of them."""

    def plan(self, width: int, height: int, budget: int | None = None, sight: Sight | None = None) -> ImagePlan:
        """What becomes of one image of `width` x `height` pixels in at most `budget` views (the tiling's own unless given), those of the
        whole image among them.

        FoveateError for a size that is none, and for a budget below the fewest views that the method makes."""
        for what, value in (("width", width), ("height", height)):
            if type(value) is not int or value < 1:
                raise FoveateError(f"an image of {width} x {height} pixels is none: its {what} is a whole number of at least 1")
        if budget is not None and (type(budget) is not int or budget < 1):
            raise FoveateError(f"{self.name}: a budget of {budget!r} views is below one view for an image; give at least 1")
        most = self.budget if budget is None else budget
        return replace(self.lay(width, height, most, sight or self.sight), most=most or 0)

    def plans(self, sizes: Sequence[Pair], budget: int | None = None, sight: Sight | None = None) -> list[ImagePlan]:
        """The plans of the images of one prompt, of these (width, height), which share `budget` views (the tiling's own unless given)."""
        shares = self.share(sizes, budget, sight)
        return [self.plan(*size, most, sight) for size, most in zip(sizes, shares, strict=True)]

    def share(self, sizes: Sequence[Pair], budget: int | None = None, sight: Sight | None = None) -> list[int | None]:
        """How many views each image of a prompt may have. One view of each is paid first; where the rest is less than all want, each gets
        its part of it, rounded down. FoveateError for more images than views."""
        whole = self.budget if budget is None else budget
        if whole is None or not sizes:
            return [None] * len(sizes)
        if type(whole) is not int or len(sizes) > whole:
            raise FoveateError(
                f"{self.name}: {len(sizes)} images cannot share a budget of {whole!r} views; each needs at least one: raise the budget "
                "or give fewer images"
            )
        more = [len(self.plan(*size, whole, sight).crops) - 1 for size in sizes]
        left = whole - len(sizes)
        return [1 + (n if sum(more) <= left else n * left // sum(more)) for n in more]
