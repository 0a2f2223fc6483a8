"""Boxes of a picture, in whole pixels: how they are split, grown and joined, and the views that are made of them."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw

Box = tuple[int, int, int, int]
"""(left, top, right, bottom), half-open."""

_GROUND = (127, 127, 127)
_LINE = (255, 0, 0)


def whole(picture: Image.Image) -> Box:
    """The box of all of a picture."""
    return 0, 0, picture.width, picture.height


def width(box: Box) -> int:
    return box[2] - box[0]


def height(box: Box) -> int:
    return box[3] - box[1]


def grid(box: Box, rows: int, columns: int) -> list[Box]:
    """A box in rows x columns parts of whole pixels, row after row; the last of a row or column takes what is left over. [] where a part
    would have no pixel."""
    wide, high = width(box) // columns, height(box) // rows
    if not wide or not high:
        return []
    xs = [box[0] + wide * c for c in range(columns)] + [box[2]]
    ys = [box[1] + high * r for r in range(rows)] + [box[3]]
    return [(xs[c], ys[r], xs[c + 1], ys[r + 1]) for r in range(rows) for c in range(columns)]


def union(boxes: Sequence[Box]) -> Box:
    """The smallest box around some."""
    left, top, right, bottom = zip(*boxes, strict=True)
    return min(left), min(top), max(right), max(bottom)


def inside(box: Box, other: Box) -> bool:
    """Whether a box lies in another."""
    return box[0] >= other[0] and box[1] >= other[1] and box[2] <= other[2] and box[3] <= other[3]


def grown(box: Box, wide: int, high: int, within: Box) -> Box:
    """A box of at least `wide` x `high` pixels about the same middle, moved to lie in `within`, whose sides it does not exceed."""
    found: list[tuple[int, int]] = []
    for start, stop, least, low, end in ((box[0], box[2], wide, within[0], within[2]), (box[1], box[3], high, within[1], within[3])):
        size = min(max(least, stop - start), end - low)
        at = min(max(start - (size - (stop - start)) // 2, low), end - size)
        found.append((at, at + size))
    (left, right), (top, bottom) = found
    return left, top, right, bottom


def joined(boxes: Sequence[Box], apart: int) -> list[Box]:
    """Boxes of which none is at most `apart` pixels from another: those that are become one around both, as often as it takes."""
    found = list(dict.fromkeys(boxes))
    for i, one in enumerate(found):
        for k in range(i + 1, len(found)):
            other = found[k]
            gaps = max(one[0], other[0]) - min(one[2], other[2]), max(one[1], other[1]) - min(one[3], other[3])
            if max(gaps) <= apart:
                rest = [box for place, box in enumerate(found) if place not in (i, k)]
                return joined([union([one, other]), *rest], apart)
    return found


# ---- views -----------------------------------------------------------------------------------------------------------------------------


def squared(picture: Image.Image) -> Image.Image:
    """A picture in the middle of a grey square, so that a processor that makes everything square leaves its shape."""
    side = max(picture.size)
    if picture.width == picture.height:
        return picture
    ground = Image.new("RGB", (side, side), _GROUND)
    ground.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return ground


def beside(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures side by side, each in the middle of the height of the highest."""
    ground = Image.new("RGB", (sum(one.width for one in pictures), max(one.height for one in pictures)), _GROUND)
    at = 0
    for one in pictures:
        ground.paste(one, (at, (ground.height - one.height) // 2))
        at += one.width
    return ground


def marked(picture: Image.Image, boxes: Sequence[Box]) -> Image.Image:
    """A copy of a picture with a red line inside the edge of each box."""
    found = picture.copy()
    draw = ImageDraw.Draw(found)
    for left, top, right, bottom in boxes:
        draw.rectangle((left, top, right - 1, bottom - 1), outline=_LINE, width=max(1, max(picture.size) // 250))
    return found
