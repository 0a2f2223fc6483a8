"""Bar charts with known values, drawn by Matplotlib: three to seven bars, standing or lying, with a grid or with numbers on the bars."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from foveate.real.scenes import SIZE, Box
from foveate.real.stock import Font, Stock, said

_DPI = 100
_SERIES = (
    ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"),
    ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul"),
    ("2019", "2020", "2021", "2022", "2023", "2024", "2025"),
)
_COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:cyan", "0.35")


@dataclass(frozen=True)
class Chart:
    """What a chart shows. `values` are different whole numbers from 1 to 20; `numbered`: they are printed on the bars."""

    title: str
    labels: tuple[str, ...]
    values: tuple[int, ...]
    lying: bool
    numbered: bool
    coloured: bool
    font: Font
    size: int

    @property
    def asked(self) -> list[tuple[str, str]]:
        """What may be asked, with the answers."""
        order = sorted(zip(self.values, self.labels, strict=True))
        asked = [(f"What is the value of {label}?", str(value)) for label, value in zip(self.labels, self.values, strict=True)]
        return [("Which bar is highest?", order[-1][1]), ("Which bar is lowest?", order[0][1]), *asked]


def make_chart(rng: random.Random, stock: Stock, fonts: Sequence[Font]) -> Chart:
    """A chart of days, things or people, in one of the fonts."""
    count = rng.randint(3, 7)
    kind = rng.randrange(3)
    if kind == 0:
        labels = rng.choice(_SERIES)[:count]
    elif kind == 1:
        short = [name for name in stock.words.first if len(name) <= 6]
        labels = tuple(rng.sample(short, min(count, len(short))))
    else:
        names = [name for name in stock.countable if len(name) <= 8]
        labels = tuple(said(name).many for name in rng.sample(names, min(count, len(names))))
    values = tuple(rng.sample(range(1, 21), len(labels)))
    title = f"{rng.choice(('Sales', 'Visits', 'Points', 'Orders', 'Hours'))} in {rng.choice(stock.words.cities)}"
    lying = rng.random() < 0.5 or sum(map(len, labels)) > 34
    return Chart(title, labels, values, lying, rng.random() < 0.5, rng.random() < 0.5, rng.choice(fonts), rng.randint(10, 11))


def render_chart(chart: Chart) -> tuple[Image.Image, list[tuple[str, Box]], list[Box]]:
    """The chart as `SIZE` x `SIZE` pixels (RGB), its printed texts with their boxes, and the boxes of the bars."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    def text(points: int) -> dict[str, Any]:
        return {"fontproperties": _properties(chart.font.file), "fontsize": points * (1.4 if "amatic" in chart.font.family else 1)}

    figure = Figure(figsize=(SIZE / _DPI, SIZE / _DPI), dpi=_DPI, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    places = range(len(chart.labels))
    colours = [_COLOURS[i if chart.coloured else 0] for i in places]
    bars = (axes.barh if chart.lying else axes.bar)(places, chart.values, color=colours, zorder=2)
    along, across = (axes.yaxis, axes.xaxis) if chart.lying else (axes.xaxis, axes.yaxis)
    along.set_ticks(places, chart.labels, **text(chart.size))
    across.set_ticks(range(0, 22, 2 if max(chart.values) < 13 else 4), minor=False)
    for label in across.get_ticklabels():
        label.set(**text(chart.size))
    across.set_ticks(range(0, max(chart.values) + 2), minor=True)
    axes.grid(visible=True, which="both", axis="x" if chart.lying else "y", color="0.85", linewidth=0.6)
    (axes.set_xlim if chart.lying else axes.set_ylim)(0, max(chart.values) + 1.5)
    if chart.lying:
        axes.invert_yaxis()
    numbers = axes.bar_label(bars, padding=2, **text(chart.size)) if chart.numbered else []
    title = axes.set_title(chart.title, **text(chart.size + 1))
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
    shown = [title, *along.get_ticklabels(), *numbers]
    return image, [(item.get_text(), _box(item)) for item in shown], [_box(bar) for bar in bars]


@functools.cache
def _properties(file: str) -> Any:
    from matplotlib.font_manager import FontProperties

    return FontProperties(fname=file)


def _box(item: Any) -> Box:
    """Of what was drawn, in pixels from the top."""
    extent = item.get_window_extent()
    return int(extent.x0), int(SIZE - extent.y1), int(np.ceil(extent.x1)), int(np.ceil(SIZE - extent.y0))
