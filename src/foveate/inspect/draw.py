"""The drawing of what was kept: the pictures, the question and the answers, and a panel for each reducer, budget or layer."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil, sqrt
from typing import Any

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from foveate.inspect import figures
from foveate.inspect.fate import COLOURS, Raster

_GREY, _LEFT = 128, 0.22  # a dropped patch is this grey, but for this share of its own brightness
_CHANGED = "#b3400e"
_DPI = 150

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Panel:
    """One drawing: its rasters, their names, the picture under each where that is known, the colours of merged tokens, and what is
    written above; `changed`: the answer is not the bare model's; `across`: rasters side by side, 0 for as many as make a square."""

    rasters: list[Raster]
    names: list[str]
    pictures: list[Image.Image | None]
    shades: dict[int, str]
    title: str
    line: str
    changed: bool = False
    across: int = 0


def draw(question: str, answer: str, images: Sequence[Image.Image], panels: Sequence[Sequence[Panel]]) -> Figure:
    """On top the images, the question and the bare model's answer, under them the panels in rows. Sizes are in inches, for a page 1,000 px
    wide."""
    columns = max(len(row) for row in panels)
    width = min(10.0, max(6.5, 3.4 * columns))
    margin, gap, small, large = 0.1, 0.2, 0.17, 0.23  # the last two: lines of text
    strips = any(panel.across for row in panels for panel in row)
    if strips:
        width = 10.0
    side = min((width - 2 * margin - gap * (columns - 1)) / columns, width if strips else 4.2)
    sizes = [_places(panel.rasters, side, panel.across)[1:] for row in panels for panel in row]
    tall = side * min(1.5, max(high / wide for wide, high in sizes))
    letters = int(side * 13)
    written = [[(_spelling(panel.title, letters), _wrapped(panel.line, letters)) for panel in row] for row in panels]
    above = [small * max(len(title) + len(lines) for title, lines in row) + 0.07 for row in written]
    shapes = [image.width / image.height for image in images]
    thumb = min(0.85, 0.45 * width / sum(shapes))
    left = margin + sum(thumb * shape + 0.05 for shape in shapes) + 0.1
    room = width - left - margin
    asked, told = textwrap.wrap(question, int(room * 8)), _wrapped(answer, int(room * 11.5))
    key = textwrap.wrap(_key(panels), int(room * 15))
    top = max(thumb, large * len(asked) + 0.19 * len(told) + small * len(key) + 0.06) + 2 * margin
    height = top + sum(above) + (tall + gap) * len(panels)
    with figures.style():
        figure = Figure(figsize=(width, height), dpi=_DPI, facecolor="white")

        def add(left: float, down: float, wide: float, high: float) -> Any:
            axes = figure.add_axes((left / width, 1 - (down + high) / height, wide / width, high / height))
            axes.set_axis_off()
            return axes

        def write(left: float, down: float, lines: list[str], **how: Any) -> None:
            figure.text(left / width, 1 - down / height, "\n".join(lines), va="top", parse_math=False, **how)

        at = margin
        for image, shape in zip(images, shapes, strict=True):
            add(at, margin, thumb * shape, thumb).imshow(image, aspect="auto")
            at += thumb * shape + 0.05
        write(left, margin, asked, fontsize=13, fontweight="bold")
        write(left, margin + large * len(asked) + 0.03, told, fontsize=10)
        write(left, margin + large * len(asked) + 0.19 * len(told) + 0.09, key, fontsize=8, color="#606060")
        down = top
        for row, texts, own in zip(panels, written, above, strict=True):
            for column, (panel, (title, lines)) in enumerate(zip(row, texts, strict=True)):
                left = margin + column * (side + gap)
                axes = add(left, down + own, side, tall)
                below = small * len(lines)
                axes.set_title("\n".join(title), loc="left", fontsize=9, fontweight="bold", pad=72 * below + 6, parse_math=False)
                write(left, down + own - below - 0.02, lines, fontsize=9, color=_CHANGED if panel.changed else None)
                _draw_panel(axes, panel, side)
            down += own + tall + gap
    return figure


def _key(panels: Sequence[Sequence[Panel]]) -> str:
    """What the drawings mean, as far as it is seen in them."""
    every = [panel for row in panels for panel in row]
    words = []
    if any(token is None for panel in every for raster in panel.rasters for token in raster.cells.values()):
        words.append("grey: dropped")
    if any(panel.shades for panel in every):
        repeated = any(len(panel.shades) > len(COLOURS) for panel in every)
        words.append("outlined: merged into one token; " + ("tokens apart may share a colour" if repeated else "one colour, one token"))
    if any(panel.changed for panel in every):
        words.append("orange text: another answer")
    return " · ".join(words)


def _spelling(text: str, letters: int) -> list[str]:
    """A reducer's spelling, broken after commas where it is too long for one line."""
    return [text] if len(text) <= letters else textwrap.wrap(text.replace(",", ", "), letters, break_on_hyphens=False)


def _wrapped(text: str, letters: int) -> list[str]:
    return textwrap.wrap(text, letters, max_lines=3, placeholder=" …”", break_on_hyphens=False)


def _places(found: Sequence[Raster], inches: float, across: int) -> tuple[list[tuple[float, float]], float, float]:
    """Left and upper edge of each raster, in cells, so many side by side, 0 for as many as make a square; width and height of it all, which
    is to be `inches` wide."""
    each = across or ceil(sqrt(len(found)))
    cell = max(raster.shape[1] for raster in found)
    gap = 0.04 * cell
    wide = each * (cell + gap) - gap
    name = 0.0 if len(found) == 1 else 0.17 * wide / inches
    places: list[tuple[float, float]] = []
    high = 0.0
    for start in range(0, len(found), each):
        own = found[start : start + each]
        places += [(number * (cell + gap), high + name) for number in range(len(own))]
        high += name + max(raster.shape[0] for raster in own) + gap
    return places, wide, high - gap


def _draw_panel(axes: Any, panel: Panel, inches: float) -> None:
    places, wide, high = _places(panel.rasters, inches, panel.across)
    axes.set_xlim(0, wide)
    axes.set_ylim(high, 0)
    axes.set_aspect("equal", anchor="NW")
    points = 72 * inches / wide  # of one cell
    stroke = min(2.4, max(0.7, 0.08 * points))
    for raster, (left, top), name, picture in zip(panel.rasters, places, panel.names, panel.pictures, strict=True):
        rows, columns = raster.shape
        axes.imshow(_pixels(raster, picture), extent=(left, left + columns, top + rows, top), interpolation="antialiased", zorder=1)
        for shade, width in (("#202020", 1.0), ("#ffffff", 0.5)):
            edges = [[(left + x, top + y) for x, y in edge] for edge in _edges(raster)]
            axes.add_collection(LineCollection(edges, colors=shade, linewidths=width, capstyle="butt", zorder=2))
        outlines = {
            token: [[(left + x, top + y) for x, y in edge] for edge in _outline(raster, token, (stroke / 2 + 0.6) / points)]
            for token in panel.shades
        }
        # All dark lines go under all coloured ones, or they would cut them where two segments meet.
        dark = [edge for edges in outlines.values() for edge in edges]
        axes.add_collection(LineCollection(dark, colors="#202020", linewidths=stroke + 1.0, capstyle="projecting", zorder=3))
        for token, edges in outlines.items():
            axes.add_collection(LineCollection(edges, colors=panel.shades[token], linewidths=stroke, capstyle="projecting", zorder=4))
        axes.text(left, top - 0.04 * wide / inches, name, fontsize=8, va="bottom", ha="left")
    axes.set_xlim(0, wide)
    axes.set_ylim(high, 0)


def _pixels(raster: Raster, picture: Image.Image | None) -> Pixels:
    """The picture stretched over the raster, grey where a patch was dropped and white where there is none."""
    rows, columns = raster.shape
    cell = max(8, 640 // max(rows, columns))
    if picture is None:
        picture = Image.new("RGB", (columns, rows), (226, 226, 226))
    clear = np.asarray(picture.resize((columns * cell, rows * cell), Image.Resampling.BICUBIC), np.float32)
    brightness = clear @ np.array([0.299, 0.587, 0.114], np.float32)
    grey = (_LEFT * brightness + (1 - _LEFT) * _GREY)[..., None]
    state = np.full((rows, columns), 2)
    for at, token in raster.cells.items():
        state[at] = 1 if token is None else 0
    state = state.repeat(cell, 0).repeat(cell, 1)[..., None]
    out: Pixels = np.where(state == 0, clear, np.where(state == 1, grey, 255)).round().astype(np.uint8)
    return out


def _edges(raster: Raster) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Where kept patches meet dropped ones."""
    for (row, column), token in raster.cells.items():
        for down, right in ((1, 0), (0, 1)):
            other = row + down, column + right
            if other in raster.cells and (raster.cells[other] is None) != (token is None):
                yield (column + right, row + down), (column + 1, row + 1)


def _outline(raster: Raster, token: int, inset: float) -> Iterator[tuple[tuple[float, float], tuple[float, float]]]:
    """The boundary of a token's patches, a little inside of it, so that two tokens' lines do not cover each other."""
    own = {at for at, lives in raster.cells.items() if lives == token}
    for row, column in own:
        for down, right in ((-1, 0), (1, 0), (0, -1), (0, 1)):
            if (row + down, column + right) in own:
                continue
            ends = []
            for sign in (-1, 1):
                # Along the side: it turns inwards at a corner of the region, runs on, or meets the side that comes in from a bend.
                along = row + sign * abs(right), column + sign * abs(down)
                beyond = along[0] + down, along[1] + right
                end = 0.5 - inset if along not in own else 0.5 + inset if beyond in own else 0.5
                out = 0.5 - inset
                ends.append((column + 0.5 + right * out + sign * end * abs(down), row + 0.5 + down * out + sign * end * abs(right)))
            yield ends[0], ends[1]
