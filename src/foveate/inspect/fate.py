"""What became of the patches of an image: which were dropped, which live on, and which of them together in one token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from foveate.errors import FoveateError
from foveate.tokens import TokenMap

COLOURS = ("#e69f00", "#56b4e9", "#d55e00", "#009e73", "#cc79a7", "#f0e442", "#0072b2")
"""Of merged tokens: Okabe and Ito's, which colour-blind readers can tell apart."""

Cell = tuple[int, int]


@dataclass(frozen=True)
class Patch:
    """A visual token as it came to the language model: its place, and the slot of the token that it lives in, None where it was dropped.
    What went into several tokens lives in the first."""

    image: int
    crop: int
    frame: int
    row: int
    column: int
    token: int | None


@dataclass(frozen=True)
class Raster:
    """The patches of one image, or of one crop or frame of it. `shape`: (rows, columns); cells without a patch are not in `cells`."""

    image: int
    crop: int
    frame: int
    shape: tuple[int, int]
    cells: dict[Cell, int | None]


def patches(whole: TokenMap, row: int = 0) -> list[Patch]:
    """The patches of a batch row under a map, such as `run.last.provenance(layer)`, in sequence order."""
    members = whole.member[row].tolist()
    weights = None if whole.weight is None else whole.weight[row].tolist()
    lives: dict[int, int] = {}
    for slot, sources in enumerate(members):
        for at, source in enumerate(sources):
            if source >= 0 and (weights is None or weights[slot][at] != 0):
                lives.setdefault(source, slot)
    found = []
    for source in whole.source.visual[row].nonzero()[:, 0].tolist():
        image, crop, frame, line, column = whole.source.place[row, source].tolist()
        found.append(Patch(image, crop, frame, line, column, lives.get(source)))
    return found


def rasters(found: Sequence[Patch]) -> list[Raster]:
    """Patches by image, crop and frame, in the order in which they come. FoveateError if one has no row and column."""
    if any(patch.row < 0 or patch.column < 0 for patch in found):
        raise FoveateError("its visual tokens have no rows and columns, so what was kept of a picture cannot be drawn")
    cells: dict[tuple[int, int, int], dict[Cell, int | None]] = {}
    shapes: dict[int, tuple[int, int]] = {}
    base: dict[int, tuple[int, int]] = {}
    for patch in found:
        if patch.crop <= 0:
            rows, columns = base.get(patch.image, (0, 0))
            base[patch.image] = max(rows, patch.row + 1), max(columns, patch.column + 1)
    for patch in found:
        own = cells.setdefault((patch.image, patch.crop, patch.frame), {})
        # Tiles have their places in the mosaic, and each of them the shape of the whole picture's crop.
        rows, columns = base.get(patch.image, (0, 0)) if patch.crop > 0 else (0, 0)
        at = patch.row % rows if rows else patch.row, patch.column % columns if columns else patch.column
        own[at] = patch.token if patch.token is not None else own.get(at)
        # A tile whose padding was cut off still has the shape of the image's other tiles.
        rows, columns = shapes.get(patch.image, (0, 0))
        shapes[patch.image] = max(rows, at[0] + 1), max(columns, at[1] + 1)
    return [Raster(*key, shapes[key[0]], own) for key, own in cells.items()]


def colours(found: Sequence[Raster], before: Sequence[Raster] = (), shades: dict[int, str] | None = None) -> dict[int, str]:
    """A colour for every token that holds more than one patch; tokens that touch have different ones.

    before, shades: the rasters of an earlier layer and their colours, which tokens keep where they can.
    """
    held: dict[int, list[tuple[int, Cell]]] = {}
    touching: dict[int, set[int]] = {}
    for number, raster in enumerate(found):
        for (row, column), token in raster.cells.items():
            if token is None:
                continue
            held.setdefault(token, []).append((number, (row, column)))
            for down, right in ((0, 1), (1, -1), (1, 0), (1, 1)):
                other = raster.cells.get((row + down, column + right))
                if other is not None and other != token:
                    touching.setdefault(token, set()).add(other)
                    touching.setdefault(other, set()).add(token)
    given: dict[int, str] = {}
    used: Counter[str] = Counter()
    for token, own in held.items():
        if len(own) == 1:
            continue
        near = {given[other] for other in touching.get(token, ()) if other in given}
        earlier = [before[number].cells.get(cell) for number, cell in own if number < len(before)]
        kept = Counter(shades[t] for t in earlier if t is not None and t in shades) if shades else Counter[str]()
        # The rarest that no neighbour has; where the neighbours have all seven, the rarest.
        colour = min(COLOURS, key=lambda c: (c in near, -kept[c], used[c], COLOURS.index(c)))
        given[token] = colour
        used[colour] += 1
    return given
