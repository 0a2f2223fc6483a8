"""Accuracy against cost, drawn: a line a method over its budgets, baselines in grey, the bare model across, the Pareto frontier marked.

One drawing serves the files (PNG, SVG, with a legend) and the page, where every mark tells its values and style sheets pick out a method.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from markupsafe import Markup, escape
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from foveate.inspect import figures

_COLOURS = ("#3b83c0", "#dd8a12", "#2f9e6e", "#b3589a", "#c8504a", "#7a6fd0", "#8a6d3b", "#159aa8")
_MARKERS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "*": "★"}
_HOLLOW = {"o": "○", "s": "□", "^": "△", "D": "◇", "v": "▽", "*": "☆"}
_GREY, _GOLD = "#8a8a8a", "#e3b505"


@dataclass(frozen=True)
class Mark:
    """A method at a budget. `told`: its values in words; `low` and `high`: the interval, None where there is none."""

    method: str
    cost: float
    value: float
    low: float | None
    high: float | None
    told: str


@dataclass(frozen=True)
class Panel:
    """One plot: marks over one kind of cost, and the names of its axes."""

    bare: Mark
    marks: Sequence[Mark]
    x: str
    y: str


@dataclass(frozen=True)
class Look:
    """How a method is drawn; `sign` is its marker as a letter."""

    colour: str
    marker: str
    sign: str
    baseline: bool


def looks(methods: Sequence[str], baselines: Collection[str]) -> dict[str, Look]:
    """A look for each method, the baselines' hollow and grey. Colour and marker both differ, so that they are told apart in grey print."""
    found, markers = {}, list(_MARKERS)
    counts = {True: 0, False: 0}
    for method in methods:
        baseline = method in baselines
        at, counts[baseline] = counts[baseline], counts[baseline] + 1
        marker = markers[at % len(markers)]
        sign = (_HOLLOW if baseline else _MARKERS)[marker]
        found[method] = Look(_GREY if baseline else _COLOURS[at % len(_COLOURS)], marker, sign, baseline)
    return found


def pareto(marks: Sequence[Mark]) -> list[Mark]:
    """The marks that no other beats: cheapest first, each better than all cheaper ones. Of equal ones the first."""
    best: list[Mark] = []
    for mark in sorted(marks, key=lambda mark: (mark.cost, -mark.value)):
        if not best or mark.value > best[-1].value:
            best.append(mark)
    return best


def page_svg(panel: Panel, methods: dict[str, Look], name: str) -> Markup:
    """The plot as an SVG element. A method's marks have the classes `mark` and `m<its number>`, each point a tooltip; the values beside the
    points have the class `value`, for style sheets to hide. `name` is put in front of all ids."""
    with figures.style():
        figure, axes = figures.new_figure(3.7)
        _draw(axes, panel, methods, values=True)
        text = figures.svg(figure, name)
    told = {f"{number}-{place}": mark.told for number, method in enumerate(methods) for place, mark in enumerate(_own(panel, method))}
    told["bare"] = panel.bare.told

    def opening(match: re.Match[str]) -> str:
        kind, key = match[1], match[2]
        title = f"<title>{escape(told[key])}</title>" if kind == "point" else ""
        return f'<g class="mark m{key.partition("-")[0]} {kind}">{title}'

    return Markup(re.sub(rf'<g id="{re.escape(name)}-(line|whisker|point|value)-(\d+-\d+|\d+|bare)">', opening, text))


def save_plots(folder: Path, rows: Sequence[tuple[str, Sequence[Panel]]], methods: dict[str, Look]) -> None:
    """frontier.png and frontier.svg in `folder`: a row of plots with its title for each task, the legend below."""
    with figures.style():
        columns = max(len(panels) for _, panels in rows)
        figure = Figure(figsize=(5.0 * columns, 3.5 * len(rows)), layout="constrained")
        grid = figure.subplots(len(rows), columns, squeeze=False)
        for (title, panels), line in zip(rows, grid, strict=True):
            for axes in line[len(panels) :]:
                axes.set_axis_off()
            for axes, panel in zip(line, panels, strict=False):
                _draw(axes, panel, methods, values=False)
            line[0].set_title(printable(title), loc="left", parse_math=False)
        add_legend(figure, methods, 3 * columns)
        figure.savefig(folder / "frontier.svg", metadata={"Date": None})
        figure.savefig(folder / "frontier.png", dpi=130, metadata={"Software": None})


def add_legend(figure: Figure, methods: dict[str, Look], most: int) -> None:
    """Below the plots, in as many columns as there is room for, at most `most`, and makes the figure as much taller."""
    entries = _legend(methods)
    handles, labels = [handle for handle, _ in entries], [printable(label) for _, label in entries]
    for columns in range(min(most, len(entries)), 0, -1):
        legend = figure.legend(handles, labels, loc="outside lower center", ncols=columns, handlelength=2.4)
        for text in legend.get_texts():
            text.set_parse_math(False)
        if legend.get_window_extent(FigureCanvasAgg(figure).get_renderer()).width <= figure.bbox.width or columns == 1:
            figure.set_figheight(figure.get_figheight() + 0.2 * -(-len(entries) // columns))
            return
        legend.remove()


def printable(text: str) -> str:
    """Without control characters and halves of letters, which no XML may hold."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def _own(panel: Panel, method: str) -> list[Mark]:
    return sorted((mark for mark in panel.marks if mark.method == method), key=lambda mark: mark.cost)


def _draw(axes: Any, panel: Panel, methods: dict[str, Look], values: bool) -> None:
    ink = mpl.rcParams["text.color"]
    bare = panel.bare
    axes.axhline(bare.value, color=ink, linewidth=1.1, zorder=2)
    if bare.low is not None and bare.high is not None:
        axes.axhspan(bare.low, bare.high, color=ink, alpha=0.08, linewidth=0, zorder=0)
    axes.plot(bare.cost, bare.value, "o", color=ink, markersize=5, zorder=6, gid="point-bare")
    best = pareto([bare, *panel.marks])
    axes.step([mark.cost for mark in best], [mark.value for mark in best], where="post", color=_GOLD, linewidth=5, alpha=0.35, zorder=1)
    for number, (method, look) in enumerate(methods.items()):
        own = _own(panel, method)
        if not own:
            continue
        costs, heights = [mark.cost for mark in own], [mark.value for mark in own]
        above = 3 if look.baseline else 4
        style = {"color": look.colour, "zorder": above}
        axes.plot(costs, heights, ":" if look.baseline else "-", linewidth=1.1, gid=f"line-{number}", **style)
        for place, mark in enumerate(own):
            key = f"{number}-{place}"
            if mark.low is not None and mark.high is not None:
                axes.plot([mark.cost] * 2, [mark.low, mark.high], "-", linewidth=0.7, alpha=0.45, gid=f"whisker-{key}", **style)
            ring = {"markeredgecolor": _GOLD, "markeredgewidth": 1.8} if mark in best else {}
            fill = {"markerfacecolor": "white"} if look.baseline else {}
            size = 8 if look.marker == "*" else 5.5
            axes.plot(mark.cost, mark.value, look.marker, markersize=size, gid=f"point-{key}", **style, **fill, **ring)
            if values:
                label = f"{mark.value:.1f}"
                place_at = {"xytext": (0, 7), "textcoords": "offset points", "ha": "center"}
                axes.annotate(label, (mark.cost, mark.value), gid=f"value-{key}", fontsize=8, color=ink, zorder=7, **place_at)
    axes.set_ylabel(printable(panel.y), parse_math=False)
    axes.set_xlabel(panel.x)
    _log(axes, [mark.cost for mark in (bare, *panel.marks)])


def _log(axes: Any, costs: Sequence[float]) -> None:
    """A logarithmic axis whose ticks are plain numbers, also where it spans less than a power of ten."""
    axes.set_xscale("log")
    axes.set_xlim(min(costs) / 1.15, max(costs) * 1.15)
    wide = max(costs) > 5 * min(costs)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if wide else MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())


def _legend(methods: dict[str, Look]) -> list[tuple[Line2D, str]]:
    ink = mpl.rcParams["text.color"]
    entries = [
        (Line2D([], [], color=ink, marker="o", markersize=5), "bare model"),
        (Line2D([], [], color=_GOLD, linewidth=5, alpha=0.5), "no other is cheaper and better"),
    ]
    for method, look in methods.items():
        style: dict[str, Any] = {"color": look.colour, "linestyle": ":" if look.baseline else "-", "marker": look.marker}
        style |= {"markerfacecolor": "white"} if look.baseline else {}
        entries.append((Line2D([], [], markersize=5.5, linewidth=1.1, **style), method))
    return entries
