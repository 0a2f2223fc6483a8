"""The results of run.py as a table and as a plot."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import matplotlib as mpl
from benchmarks.common import busy, column, spread
from matplotlib.figure import Figure

from foveate.inspect.figures import COLOURS

MIB = 1024**2
BARE, BEFORE_LM, IN_TOWER = "bare", "before the LM", "in the tower"


def speed_up(report: dict[str, Any], label: str) -> list[float]:
    """Prefill of the bare model over the variant's, within each round."""
    return [row[BARE]["prefill"] / row[label]["prefill"] for row in report["rounds"]]


def allowed(report: dict[str, Any], label: str) -> float:
    """By FLOPs of all parts but the scores."""
    bare, own = ({**report["variants"][name]["flops"], "scores": 0} for name in (BARE, label))
    return float(sum(bare.values()) / sum(own.values()))


def table(report: dict[str, Any]) -> str:
    found = report["variants"]
    share = found[BARE]["flops"]["tower"] / sum(found[BARE]["flops"].values())
    lines = [
        f"`{report['command']}`",
        "",
        f"{report['machine']}. {len(report['rounds'])} rounds; every number is a median, with the smallest and the largest in parentheses. "
        f"Weights: {report['weight_bytes'] / MIB:.0f} MiB. Of the bare model's FLOPs the tower has {share:.0%}.",
        "",
        "| variant | where | visual tokens in the LM | tower s | prefill s (tower too) | speed-up | FLOPs allow | measured ÷ that |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for label, one in found.items():
        ratio, limit = speed_up(report, label), allowed(report, label)
        cells = [
            f"*{BARE}*" if label == BARE else f"`{label}`",
            "" if label == BARE else one["kind"],
            f"{statistics.mean(one['visual_tokens']):.0f}",
            spread(column(report, label, "tower"), 3),
            spread(column(report, label, "prefill"), 3),
            spread(ratio, 2),
            f"{limit:.2f}",
            f"{statistics.median(ratio) / limit:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "**Prefill** is everything from pixels to the first token: tower, scores, cuts, projector, language model, head. **Speed-up** is "
        "the bare model's prefill over the variant's, taken within each round. **FLOPs allow**: the bare model's counted FLOPs over the "
        "variant's, from the tokens that went through each block and layer; what a method computes to find its scores is not counted, so "
        "it shows as a distance to the limit. Where a block of the tower attends within windows, all windows are taken to have lost the "
        "same share.",
    ]
    return "\n".join(lines + busy(report)) + "\n"


def draw(report: dict[str, Any], path: Path) -> None:
    """Speed-up of the whole prefill at each budget, a line a method; dashed what acts before the language model."""
    lines: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for label, one in report["variants"].items():
        if label != BARE:
            lines.setdefault((one["kind"], one["method"]), []).append((one["keep"], statistics.median(speed_up(report, label))))
    with mpl.rc_context({"font.size": 9}):
        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        axes = figure.subplots()
        for colour, ((kind, method), points) in zip([*COLOURS, *COLOURS], lines.items(), strict=False):
            keeps, ratios = zip(*sorted(points), strict=True)
            style = "--" if kind == BEFORE_LM else "-"
            axes.plot([f"{keep:g}" for keep in keeps], ratios, style, color=colour, marker="o", markersize=4, label=f"{method}, {kind}")
        axes.axhline(1.0, color="0.7", linewidth=0.8)
        axes.set_xlabel("share of visual tokens kept")
        axes.set_ylabel("speed-up of the whole prefill, tower too")
        axes.legend(fontsize=8, frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, dpi=150)
