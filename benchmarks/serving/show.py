"""The results of run.py as a table and as a plot."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from benchmarks.common import busy
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from foveate.inspect.figures import COLOURS

BARE = "bare"
MIB = 1024**2
MARKERS = "os^Dv<>Ph*"


def spread(values: list[float], digits: int) -> str:
    """Median, and the whole range of the rounds."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def rate(report: dict[str, Any], clients: str, variant: str) -> list[float]:
    """Requests per second, one number a round."""
    return [row[clients][variant]["requests"] / row[clients][variant]["seconds"] for row in report["rounds"]]


def gain(report: dict[str, Any], clients: str, variant: str) -> list[float]:
    """The variant's requests per second over the bare model's, within each round."""
    return [a / b for a, b in zip(rate(report, clients, variant), rate(report, clients, BARE), strict=True)]


def first_token(report: dict[str, Any], clients: str, variant: str, name: str) -> list[float]:
    """Seconds: "p50" or "p95" of the times to first token, one number a round."""
    return [row[clients][variant][name] for row in report["rounds"]]


def people(clients: str) -> str:
    return "1 client" if clients == "1" else f"{clients} clients"


def missed(report: dict[str, Any]) -> list[str]:
    """Where a reduced model answers fewer requests per second than the bare one, by the median of the rounds."""
    found = []
    for clients in map(str, report["settings"]["clients"]):
        for variant in report["variants"]:
            if (ratio := statistics.median(gain(report, clients, variant))) < 1:
                found.append(f"`{variant}` at {people(clients)}: {ratio:.2f}")
    return found


def table(report: dict[str, Any]) -> str:
    slower = missed(report)
    threads = all("cpu" in own for row in report["rounds"] for found in row.values() for own in found.values())  # not in older results
    lines = [
        f"`{report['command']}`",
        "",
        f"{report['machine']}. Rounds: {len(report['rounds'])}; every number is a median, with the smallest and the largest in "
        f"parentheses. Weights: {report['weight_bytes'] / MIB:.0f} MiB.",
        "",
        "**Goal, that at no concurrency a reduced model answers fewer requests per second than the bare one: "
        + ("missed.**" if slower else "met.**"),
        *(["", *(f"- {case} of the bare model's" for case in slower)] if slower else []),
    ]
    for clients in map(str, report["settings"]["clients"]):
        count = report["rounds"][0][clients][BARE]["requests"]
        lines += [
            "",
            f"{people(clients)}, {count} requests a round:",
            "",
            "| variant | visual tokens a layer | requests/s | over bare | first token p50, s | first token p95, s "
            + ("| CPU s a request " if threads else "")
            + "| peak MiB |",
            "|---|---|---|---|---|---|---|" + "---|" * threads,
        ]
        for variant, found in report["variants"].items():
            above = found["peak_bytes"][clients]
            cells = [
                f"*{variant}*" if variant == BARE else f"`{variant}`",
                f"{found['visual_tokens']:.0f}",
                spread(rate(report, clients, variant), 2),
                spread(gain(report, clients, variant), 2),
                spread(first_token(report, clients, variant, "p50"), 3),
                spread(first_token(report, clients, variant, "p95"), 3),
                *([spread([row[clients][variant]["cpu"] / count for row in report["rounds"]], 3)] if threads else []),
                "–" if above is None else f"{above / MIB:.0f}",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "**Visual tokens a layer**: of one image, mean over the decoder layers. **Over bare**: requests per second over the bare model's, "
        "taken within each round. **First token**: from sending a request to the first token of its batch, with its wait in the queue; "
        "percentiles over the requests of a round. **Peak**: the memory on top of weights and requests while one full batch is answered, "
        "tower too, in an untimed run. One request in five has no image and one in five has two; a batch is padded to its longest prompt "
        "and runs until its longest answer, so that where one prompt fills the machine, more clients are not answered faster.",
    ]
    if threads:
        lines += ["", "**CPU s**: seconds of all threads together, in which they ran."]
    lines += busy(report)
    if report["skipped"]:
        lines += ["", "Not measured:", "", *(f"- `{variant}`: {reason}" for variant, reason in report["skipped"].items())]
    return "\n".join(lines) + "\n"


def draw(report: dict[str, Any], path: Path) -> None:
    """Requests per second over the bare model's, and the 95th percentile of the time to first token, against the number of clients."""
    settings = report["settings"]
    clients = sorted(settings["clients"])
    found = {
        variant: ([gain(report, str(n), variant) for n in clients], [first_token(report, str(n), variant, "p95") for n in clients])
        for variant in report["variants"]
    }
    title = f"{settings['shape']}, {settings['device']}, {settings['dtype']}, rounds: {len(report['rounds'])}"
    drawn(found, clients, title).savefig(path, dpi=150)


Rows = Sequence[Sequence[float]]
"""By number of clients, the values of the rounds."""


def drawn(found: Mapping[str, tuple[Rows, Rows]], clients: Sequence[int], title: str) -> Figure:
    """Of each variant the medians and ranges over rounds of requests per second over the bare model's, and of the 95th percentile of the
    time to first token, against the number of clients."""
    style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#88888855"}
    with mpl.rc_context({**style, "grid.linewidth": 0.6, "axes.axisbelow": True}):
        figure = Figure(figsize=(9.0, 3.8), layout="constrained")
        left, right = figure.subplots(1, 2)
        for number, (variant, both) in enumerate(found.items()):
            own: dict[str, Any] = {"color": "#000000", "marker": "x", "linestyle": "--"}
            if variant != BARE:
                own = {"color": COLOURS[(number - 1) % len(COLOURS)], "marker": MARKERS[(number - 1) % len(MARKERS)], "linestyle": "-"}
            places = [n * 1.03 ** (number - len(found) / 2) for n in clients]  # side by side, so that ranges can be told apart
            for axes, rows in zip((left, right), both, strict=True):
                middle = [statistics.median(row) for row in rows]
                below = [m - min(row) for m, row in zip(middle, rows, strict=True)]
                above = [max(row) - m for m, row in zip(middle, rows, strict=True)]
                label = variant if axes is left else None
                axes.errorbar(places, middle, yerr=[below, above], label=label, markersize=5, linewidth=0.8, elinewidth=0.8, **own)
        for axes in (left, right):
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_locator(FixedLocator(clients))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_xticklabels([str(n) for n in clients])
            axes.set_xlabel("clients")
        left.set_ylim(bottom=0)
        left.set_title("requests per second, over the bare model's", fontsize=9)
        right.set_yscale("log")
        right.yaxis.set_major_formatter(FuncFormatter(lambda seconds, _: f"{seconds:g}"))
        right.set_title("time to first token, 95th percentile, s", fontsize=9)
        figure.suptitle(title, fontsize=9)
        figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    return figure
