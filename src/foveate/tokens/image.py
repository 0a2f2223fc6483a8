"""What an image becomes on its way into a language model."""

from __future__ import annotations

from dataclasses import dataclass

from foveate.tokens.layout import Kind

WHOLE = (0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True)
class Crop:
    """A picture that the vision tower sees at once: an image, or a part of one.

    grid    (rows, columns) of its patches; None where only the model's own processor knows
    tokens  visual tokens that the bridge makes of it
    box     (left, top, right, bottom) of what it shows, in shares of the image's width and height
    """

    grid: tuple[int, int] | None
    tokens: int
    box: tuple[float, float, float, float] = WHOLE


@dataclass(frozen=True)
class ImagePlan:
    """One image as it enters the language model, before any reducer. An image that is seen whole, at one size, is its simplest case.

    crops  in the order in which their tokens stand in the prompt
    marks  kinds of the tokens between and beside those of the crops, such as newlines
    """

    crops: tuple[Crop, ...]
    marks: tuple[Kind, ...] = ()

    @classmethod
    def whole(cls, tokens: int, grid: tuple[int, int] | None = None) -> ImagePlan:
        """The plan of an image that is one crop."""
        return cls((Crop(grid, tokens),))

    @property
    def visual(self) -> int:
        """Tokens of the crops."""
        return sum(crop.tokens for crop in self.crops)

    @property
    def tokens(self) -> int:
        """Slots in the prompt, marks included: the placeholders that stand for the image."""
        return self.visual + len(self.marks)
