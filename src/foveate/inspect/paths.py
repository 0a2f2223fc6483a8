"""The drawing of a search: what the model was asked about, in which order, and what the answer was read off."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from PIL import Image

from foveate.inference.strategies import Found
from foveate.inspect import figures
from foveate.inspect.words import answer_text, si

_DEPTHS = ("#2f6fb3", "#dd8a12", "#2f9e6e", "#b3589a", "#8a8a8a")  # of a box, by how deep in the tree it lies
_READ, _CHANGED = "#e03010", "#b3400e"
_NUMBERED = 60  # boxes, at most
_DPI = 150


@dataclass(frozen=True)
class Path:
    """One search: its spelling, and what was found; `changed`: the answer is not the bare model's."""

    title: str
    found: Found
    changed: bool


def told(found: Found) -> str:
    """What a search took and how it ended, in one line."""
    cost = "" if found.ledger is None else f", {si(found.ledger.total_flops)}"
    ended = {"found": "", "searched": "", "given up": ", given up"}.get(found.ended, f", at the end of its {found.ended}")
    parts, passes = (
        f"{n} {what}{'' if n == 1 else more}" for n, what, more in ((len(found.seen), "part", "s"), (len(found.passes), "pass", "es"))
    )
    return f"{parts}, {passes}, {found.tokens:,} tokens{cost}{ended}: “{answer_text(found.answer)}”"


def draw_paths(question: str, answer: str, picture: Image.Image, paths: Sequence[Path]) -> Figure:
    """The question and the bare model's answer, under them a picture for each search, three in a row. Sizes are in inches."""
    columns = min(3, len(paths))
    margin, gap, side, small = 0.1, 0.2, 4.2 if columns == 1 else 3.6, 0.17
    letters = int(side * 13)
    width = max(6.5, 2 * margin + columns * side + (columns - 1) * gap)
    scale = side / max(picture.size)
    tall = picture.height * scale
    written = [(textwrap.wrap(re.sub(r",(?=\S)", ", ", path.title), letters), textwrap.wrap(told(path.found), letters)) for path in paths]
    rows = [written[at : at + columns] for at in range(0, len(paths), columns)]
    above = [small * max(len(title) + len(lines) for title, lines in row) + 0.07 for row in rows]
    key = "boxes: parts in the order in which they were looked at, a colour for each depth"
    read = [f"thick red: what the answer was read off{' (none: the whole picture)' if any(not p.found.boxes for p in paths) else ''}"]
    head = [textwrap.wrap(question, int(width * 8)), textwrap.wrap(answer, int(width * 11.5)), textwrap.wrap("; ".join([key, *read]), 110)]
    top = 0.23 * len(head[0]) + 0.19 * len(head[1]) + small * len(head[2]) + 0.12 + 2 * margin
    height = top + sum(above) + (tall + gap) * len(rows)
    with figures.style():
        figure = Figure(figsize=(width, height), dpi=_DPI, facecolor="white")

        def write(left: float, down: float, lines: list[str], **how: Any) -> None:
            figure.text(left / width, 1 - down / height, "\n".join(lines), va="top", parse_math=False, **how)

        write(margin, margin, head[0], fontsize=13, fontweight="bold")
        write(margin, margin + 0.23 * len(head[0]) + 0.03, head[1], fontsize=10)
        write(margin, margin + 0.23 * len(head[0]) + 0.19 * len(head[1]) + 0.09, head[2], fontsize=8, color="#606060")
        down = top
        for row, texts, own in zip([paths[at : at + columns] for at in range(0, len(paths), columns)], rows, above, strict=True):
            for column, (path, (title, lines)) in enumerate(zip(row, texts, strict=True)):
                left = margin + column * (side + gap)
                write(left, down, title, fontsize=9, fontweight="bold")
                write(left, down + small * len(title), lines, fontsize=9, color=_CHANGED if path.changed else None)
                at = (left / width, 1 - (down + own + tall) / height, picture.width * scale / width, tall / height)
                _draw(figure.add_axes(at), picture, path.found, max(picture.size) / side / 72)
            down += own + tall + gap
    return figure


def _draw(axes: Any, picture: Image.Image, found: Found, point: float) -> None:
    """One picture; `point`: its pixels in a point of paper."""
    axes.set_axis_off()
    axes.imshow(picture, extent=(0, picture.width, picture.height, 0), interpolation="antialiased")
    parts = [seen for seen in found.seen if seen.depth]
    for number, seen in enumerate(parts, 1):
        shade = _DEPTHS[(seen.depth - 1) % len(_DEPTHS)]
        inset = 1.2 * point * seen.depth  # a box inside of another keeps off its lines
        _box(axes, seen.box, inset, shade, 1.0)
        if len(parts) <= _NUMBERED:
            left, top, right, bottom = seen.box
            size = max(3.5, min(8.0, 0.25 * min(right - left, bottom - top) / point))
            east, south = (seen.depth - 1) % 2, (seen.depth - 1) // 2 % 2  # a corner of its own for each depth
            x, y = right - inset if east else left + inset, bottom - inset if south else top + inset
            away = 2.5 * point
            axes.text(
                x - away if east else x + away,
                y - away if south else y + away,
                str(number),
                fontsize=size,
                color=shade,
                ha="right" if east else "left",
                va="bottom" if south else "top",
                path_effects=[withStroke(linewidth=1.6, foreground="white")],
            )
    for box in found.boxes:
        _box(axes, box, 0.0, _READ, 2.8)
    axes.set_xlim(0, picture.width)
    axes.set_ylim(picture.height, 0)


def _box(axes: Any, box: tuple[int, int, int, int], inset: float, shade: str, stroke: float) -> None:
    left, top, right, bottom = box
    wide, high = max(0.0, right - left - 2 * inset), max(0.0, bottom - top - 2 * inset)
    for colour, width in (("white", stroke + 0.9), (shade, stroke)):
        axes.add_patch(Rectangle((left + inset, top + inset), wide, high, fill=False, edgecolor=colour, linewidth=width))
