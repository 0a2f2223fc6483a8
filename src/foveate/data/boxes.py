"""Where in its picture each thing of a row is: {"boxes": [["lemon", [0.1, 0.2, 0.25, 0.4]], …]}, what it is called and (left, top, right,
bottom) in shares of the picture's width and height."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from foveate.data.rows import Unusable

Box = tuple[float, float, float, float]
FIELD = "boxes"


def boxes_of(row: Mapping[str, Any], images: int) -> list[tuple[str, Box]]:
    """The names and boxes of a row with so many images; none where it has no such field. Unusable, with the reason, for what are none."""
    given = row.get(FIELD)
    if given is None:
        return []
    if not isinstance(given, list):
        raise Unusable(f"its {FIELD} are no list of [name, [left, top, right, bottom]]: {str(given)[:80]!r}")
    if given and images != 1:
        raise Unusable(f"has {FIELD} and {images} images; {FIELD} are of one image")
    return [_box(one) for one in given]


def _box(given: Any) -> tuple[str, Box]:
    try:
        name, (left, top, right, bottom) = given
        edges = float(left), float(top), float(right), float(bottom)
    except (TypeError, ValueError):
        raise Unusable(f"one of its {FIELD} is not [name, [left, top, right, bottom]]: {str(given)[:80]!r}") from None
    if not isinstance(name, str) or not name.strip():
        raise Unusable(f"one of its {FIELD} has no name: {str(given)[:80]!r}")
    if not (0 <= edges[0] < edges[2] <= 1 and 0 <= edges[1] < edges[3] <= 1):
        raise Unusable(f"the box of {name!r}, {list(edges)}, is not (left, top, right, bottom) in shares of the picture, 0 to 1")
    return name, edges
