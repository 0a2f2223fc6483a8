"""The results of run.py as a table and as a plot."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from benchmarks.common import busy, column, spread
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from foveate.inspect.figures import COLOURS

MIB = 1024**2
MARKERS = "os^Dv<>Ph*"
SHORT = "short prompt"
KINDS = ("BEFORE THE LM, BY THE TOWER", "BEFORE THE LM, BY THE TOKENS", "INSIDE THE LM")


def speed_up(report: dict[str, Any], label: str) -> list[float]:
    """Prefill of the bare model over the variant's, within each round."""
    return [row["bare"]["prefill"] / row[label]["prefill"] for row in report["rounds"]]


def first_token(report: dict[str, Any], label: str) -> list[float]:
    """Tower and prefill. Where the tower was replayed, its time is that of the round's own run of it."""
    return [row[label]["prefill"] + row[label].get("tower", row["tower"]["tower"]) for row in report["rounds"]]


def allowed(report: dict[str, Any], label: str) -> float:
    return report["variants"]["bare"]["flops"] / report["variants"][label]["flops"]


def machine(report: dict[str, Any], label: str) -> float:
    """The speed-up that the machine allows: the bare model's prefill of a prompt as short, taken layer by layer and drawn straight between
    the lengths that were measured."""
    found = report["variants"]
    measured = {statistics.mean(found[name]["visual_tokens"]): name for name in found if name == "bare" or found[name]["method"] == SHORT}
    seconds = [statistics.median(column(report, measured[count], "prefill")) for count in sorted(measured)]
    spent = np.interp(found[label]["visual_tokens"], sorted(measured), seconds).mean()
    return float(statistics.median(column(report, "bare", "prefill")) / spent)


def table(report: dict[str, Any]) -> str:
    decode = report["settings"]["decode"]
    threads = all("prefill cpu" in row["bare"] for row in report["rounds"])  # results of before have wall seconds only
    lines = [
        f"`{report['command']}`",
        "",
        f"{report['machine']}. {len(report['rounds'])} rounds; every number is a median, with the smallest and the largest in parentheses. "
        f"Weights: {report['weight_bytes'] / MIB:.0f} MiB. "
        f"The tower alone takes {spread(column(report, 'tower', 'tower'), 3)} s.",
        "",
        "| variant | visual tokens a layer | prefill s | speed-up | FLOPs allow | measured ÷ that | machine allows | measured ÷ that "
        "| first token s (tower too) "
        + ("| prefill CPU s " if threads else "")
        + ("| decoded tokens/s " if decode else "")
        + "| KV MiB | peak MiB |",
        "|---|---|---|---|---|---|---|---|---|---|---|" + "---|" * (bool(decode) + threads),
    ]
    for label, found in report["variants"].items():
        ratio, limit = speed_up(report, label), allowed(report, label)
        cells = [
            f"`{label}`" if ":" in label and found["method"] != SHORT else f"*{label}*",
            f"{statistics.mean(found['visual_tokens']):.0f}",
            spread(column(report, label, "prefill"), 3),
            spread(ratio, 2),
            f"{limit:.2f}",
            f"{statistics.median(ratio) / limit:.2f}",
            f"{machine(report, label):.2f}",
            f"{statistics.median(ratio) / machine(report, label):.2f}",
            "–" if found["method"] == SHORT else spread(first_token(report, label), 3),
        ]
        if threads:
            cells.append(spread(column(report, label, "prefill cpu"), 3))
        if decode:
            cells.append(spread([decode / s for s in column(report, label, "decode")], 1))
        cells += [f"{found['kv_bytes'] / MIB:.1f}", "–" if found["peak_bytes"] is None else f"{found['peak_bytes'] / MIB:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "**Visual tokens a layer** is the mean over the decoder layers. **Prefill** is everything between the tower and the first token: "
        "projector, scores, cuts, language model, head. **Speed-up** is the bare model's prefill over the variant's, taken within each "
        "round. **FLOPs allow**: the bare model's counted FLOPs over the variant's, for the same parts, from the tokens that went through "
        "each layer; what a method computes to find its scores is not counted, so it shows as a distance to the limit. Attention is "
        "counted as the full N x N, of which a causal kernel does half. **Machine allows**: the same from the seconds of the *short "
        "prompt* rows, the bare model on as many words as the method leaves tokens, layer by layer (drawn straight between the lengths, "
        "and flat below the shortest): matrix products with few rows run below the machine's peak, whoever cut them. **Peak** is the "
        "memory on top of what was in use when the tower had "
        "finished, in the untimed round. KV is read off the cache, after the prefill.",
    ]
    if any(found["watches_tower"] for found in report["variants"].values()):
        lines += ["", "For methods that look at the tower it ran in every round; for the others its output was replayed."]
    if threads:
        lines += ["", "**CPU s**: seconds of all threads together, in which they ran."]
    lines += busy(report)
    if report["skipped"]:
        lines += ["", "Not measured:", "", *(f"- `{label}`: {reason}" for label, reason in report["skipped"].items())]
    return "\n".join(lines) + "\n"


def draw(report: dict[str, Any], path: Path) -> None:
    """Measured speed-up over the one that FLOPs allow, a line a method, a point a budget; on the diagonal nothing is lost."""
    groups: list[dict[str, list[str]]] = [{} for _ in KINDS]
    whole, short = [], []
    for label, found in report["variants"].items():
        if found["method"] == SHORT:
            short.append(label)
        elif found["method"]:
            groups[kind(found)].setdefault(found["method"], []).append(label)
        elif label != "bare":
            whole.append(label)
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(8.4, 5.0), layout="constrained")
        axes = figure.add_subplot()
        limits = [allowed(report, label) for label in report["variants"]]
        ratios = [ratio for label in report["variants"] for ratio in speed_up(report, label)]
        legend: list[tuple[Any, str]] = []
        (diagonal,) = axes.plot([min(limits), max(limits)], [min(limits), max(limits)], color="#8a8a8a", linestyle="--", linewidth=1)
        legend.append((diagonal, "as FLOPs allow"))
        if short:
            legend.append((_points(axes, report, short, "#000000", "_", 0.7), "no image, a prompt as short"))
        if whole:
            legend.append((_points(axes, report, whole, COLOURS[4], "x", 0.0), "everything kept (fastv, random)"))
        for name, colour, group in zip(KINDS, COLOURS, groups, strict=False):
            if group:
                legend.append((Line2D([], [], linestyle=""), name))
            for marker, (method, labels) in zip(MARKERS, group.items(), strict=False):
                legend.append((_points(axes, report, labels, colour, marker, 0.7), method))
        _scale(axes, "x", limits)
        _scale(axes, "y", [*ratios, *limits])
        axes.grid(color="#88888855", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.set_xlabel("speed-up of prefill that counted FLOPs allow (scores not counted)")
        axes.set_ylabel("measured speed-up of prefill")
        settings = report["settings"]
        axes.set_title(f"{settings['shape']}, {settings['tokens']} visual tokens, {settings['device']}, {settings['dtype']}", fontsize=9)
        figure.legend(*zip(*legend, strict=True), loc="outside right upper", frameon=False, fontsize=8)
        figure.savefig(path, dpi=150)


def kind(found: dict[str, Any]) -> int:
    return 2 if found["inside_lm"] else 0 if found["watches_tower"] else 1


def _points(axes: Any, report: dict[str, Any], labels: list[str], colour: str, marker: str, line: float) -> Any:
    ratios = [speed_up(report, label) for label in labels]
    middle = [statistics.median(r) for r in ratios]
    pairs = list(zip(middle, ratios, strict=True))
    return axes.errorbar(
        [allowed(report, label) for label in labels],
        middle,
        yerr=[[m - min(r) for m, r in pairs], [max(r) - m for m, r in pairs]],
        color=colour,
        marker=marker,
        markersize=5,
        linewidth=line,
        elinewidth=0.8,
    )


def _scale(axes: Any, name: str, values: list[float]) -> None:
    """Logarithmic, with ticks at what is halved or doubled; 1 is always in it."""
    low, high = min(1.0, *values) / 1.07, max(1.0, *values) * 1.07
    axis = getattr(axes, f"{name}axis")
    getattr(axes, f"set_{name}scale")("log", base=2)
    getattr(axes, f"set_{name}lim")(low, high)
    steps = (1.0, 1.5) if high / low < 8 else (1.0,)
    axis.set_major_locator(FixedLocator([t * f for t in (2.0**i for i in range(-6, 8)) for f in steps if low <= t * f <= high]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
