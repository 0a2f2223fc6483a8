"""One style for every figure: inline SVG that takes its text colour from the page (light or dark).

A figure is small (about 400 px wide), so that its letters stay readable when a page puts it side by side with others on a desk and
alone on a telephone.
"""

from __future__ import annotations

import io
import re
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

COLOURS = ("#3b83c0", "#dd8a12", "#2f9e6e", "#b3589a", "#8a8a8a")
"""Distinct for colour-blind readers and on white and black alike; the order is the order of the arms."""
DASHES = ("-", "--", "-.", ":", "-")
INK = "#010203"
"""Stands for the page's text colour until the SVG is written."""
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "foveate",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#88888855",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 9,
    "xtick.color": INK,
    "ytick.color": INK,
    "lines.linewidth": 1.4,
}


def new_figure(height: float = 2.8) -> tuple[Figure, Any]:
    """A figure of the reports' one width with its axes; use inside `style()`."""
    figure = Figure(figsize=(4.2, height), layout="constrained")
    return figure, figure.add_subplot()


def style() -> Any:
    """The context in which a figure is made and drawn."""
    return mpl.rc_context(_STYLE)


def svg(figure: Figure, name: str) -> str:
    """The figure as an SVG element for a web page: no header, no metadata, no address, ids that are the figure's own."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r'\bid="', f'id="{name}-', text).replace('href="#', f'href="#{name}-').replace("url(#", f"url(#{name}-")
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 sans-serif", text)
    text = re.sub(r' width="[^"]*pt"', "", text, count=1)
    text = re.sub(r' height="[^"]*pt"', ' role="img"', text, count=1)
    return text.replace(INK, "currentColor")
