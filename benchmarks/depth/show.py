"""The results of run.py as tables, with the reasons that they give, and as a plot."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from benchmarks.common import GRANTED, busy, column, spread
from benchmarks.depth.operations import ATTENTION, BETWEEN, DECIDING, KINDS, MOVING, OTHER, PRODUCTS
from matplotlib.figure import Figure

from foveate.inspect.figures import COLOURS

MIB = 1024**2
BARE, DEPTH, LEARNED, VISIBILITY, CACHE = "bare", "depth", "learned", "who sees whom", "cache"
LITTLE, PART = 0.02, 0.1  # of the bare model's seconds, what is no excess; of an excess, the least part that is named
WORDS = {
    PRODUCTS: "matrix products",
    ATTENTION: "attention",
    MOVING: "gathering, scattering and copying",
    DECIDING: "masks and ranking",
    OTHER: "other operations",
    BETWEEN: "between operations",
}


def flops(report: dict[str, Any], label: str, which: str = "flops") -> int:
    """Those that a variant needs ("flops"), or that its kernels computed ("ran"), behind the tower; the scores of its method among them."""
    return sum(count for part, count in report["variants"][label][which].items() if part != "other")


def share(report: dict[str, Any], label: str) -> float:
    """What a variant needs of the bare model's FLOPs."""
    return flops(report, label) / flops(report, BARE)


def ratio(report: dict[str, Any], label: str, name: str) -> list[float]:
    """A variant's seconds over the bare model's, within each round."""
    return [row[label][name] / row[BARE][name] for row in report["rounds"]]


def rate(report: dict[str, Any], label: str) -> float:
    """FLOP/s of the matrix products, without those inside of attention, in the profiled prefill."""
    found = report["variants"][label]
    return float((flops(report, label, "ran") - found["ran"]["lm_attention"]) / found["prefill"]["seconds"][PRODUCTS])


def beyond(report: dict[str, Any], label: str, phase: str) -> dict[str, float]:
    """By kind of operation the seconds of a profiled prefill that are more than the bare model's times the share of FLOPs, or those of a
    profiled step that are more than the bare model's. They add up to what the whole takes beyond that."""
    own, bare = (report["variants"][name][phase]["seconds"] for name in (label, BARE))
    times = share(report, label) if phase == "prefill" else 1.0
    return {kind: own[kind] - times * bare[kind] for kind in own}


def verdict(values: Sequence[float]) -> str:
    """Of ratios to the bare model, one a round."""
    if max(values) < 1:
        return "faster in every round"
    span = f"{min(values):.2f} to {max(values):.2f} of its seconds"
    return f"**not faster** in any round, {span}" if min(values) >= 1 else f"**not told apart** from the bare model, {span}"


def named(report: dict[str, Any], label: str, phase: str, digits: int, unit: float = 1.0) -> str:
    """The parts of what is beyond, largest first."""
    over = {kind: seconds for kind, seconds in beyond(report, label, phase).items() if seconds > 0}
    found = []
    for kind, seconds in sorted(over.items(), key=lambda entry: -entry[1]):
        if seconds < PART * sum(over.values()):
            break
        text = f"{WORDS[kind]} {seconds * unit:.{digits}f}"
        if kind == PRODUCTS and phase == "prefill":
            text += f" (at {rate(report, label) / 1e9:.0f} GFLOP/s, the bare model's at {rate(report, BARE) / 1e9:.0f})"
        found.append(text)
    return ", ".join(found)


def reason(report: dict[str, Any], label: str) -> str:
    """What was measured of a variant, and where its seconds go that its FLOPs do not tell. A cache policy is there for the steps."""
    seconds, steps = ratio(report, label, "prefill"), ratio(report, label, "step")
    bare, policy = report["variants"][BARE]["prefill"]["wall"], report["variants"][label]["kind"] == CACHE
    text = f"`{label}`: " + (f"a step {verdict(steps)}; the prefill " if policy else f"{verdict(seconds)}; ")
    text += f"{statistics.median(seconds):.2f} of the seconds at {share(report, label):.2f} of the FLOPs."
    if (ran := flops(report, label, "ran") / flops(report, label)) > 1.01:
        text += f" Its kernels computed {ran:.2f} times the FLOPs that it needs."
    over = sum(beyond(report, label, "prefill").values())
    text += f" Profiled, it took {abs(over):.3f} s {'more' if over > 0 else 'less'} than its FLOPs allow"
    text += f": {named(report, label, 'prefill', 3)}." if over > LITTLE * bare else "."
    wall, bare = (report["variants"][name]["step"]["wall"] for name in (label, BARE))
    if statistics.median(steps) > 1 + LITTLE and wall > bare:
        text += f" A step took {1e3 * (wall - bare):.1f} ms more than the bare model's: {named(report, label, 'step', 1, 1e3)}."
    return text


def table(report: dict[str, Any]) -> str:
    found = report["variants"]
    shares = ", ".join("–" if one is None else f"{one:.0%}" for one in report["granted"])
    lines = [
        f"`{report['command']}`",
        "",
        f"{report['machine']}. {len(report['rounds'])} rounds, in which the threads ran in {shares} of the time that they wanted to; every "
        "number with a range is a median, with the smallest and the largest in parentheses. The tower alone takes "
        f"{spread(column(report, 'tower', 'tower'), 3)} s.",
        "",
        "| variant | acts by | visual tokens a layer | FLOPs ÷ bare | prefill s | ÷ bare | ÷ bare ÷ FLOPs | CPU s ÷ bare "
        "| first token s (tower too) | step ms | ÷ bare | KV MiB, counted and held | peak MiB |",
        "|---" * 13 + "|",
    ]
    for label, one in found.items():
        first = [row[label]["prefill"] + row["tower"]["tower"] for row in report["rounds"]]
        seconds, part = ratio(report, label, "prefill"), share(report, label)
        cells = [
            f"*{BARE}*" if label == BARE else f"`{label}`",
            "" if label == BARE else one["kind"],
            f"{statistics.mean(one['visual_tokens']):.0f}",
            f"{part:.2f}",
            spread(column(report, label, "prefill"), 3),
            spread(seconds, 2),
            f"{statistics.median(seconds) / part:.2f}",
            spread(ratio(report, label, "prefill cpu"), 2),
            spread(first, 2),
            spread([1e3 * value for value in column(report, label, "step")], 1),
            spread(ratio(report, label, "step"), 2),
            f"{one['kv_counted'] / MIB:.2f}, {one['kv_bytes'] / MIB:.2f}",
            f"{one['prefill']['peak_bytes'] / MIB:.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", *_words(report), "", *_reasons(report), "", "Seconds of one profiled prefill:", "", *_parts(report, "prefill", 3, 1.0)]
    lines += ["", "Milliseconds of one step, the mean of those profiled:", "", *_parts(report, "step", 1, 1e3), *busy(report)]
    if report["skipped"]:
        lines += ["", "Not measured:", "", *(f"- `{label}`: {why}" for label, why in report["skipped"].items())]
    return "\n".join(lines) + "\n"


def _words(report: dict[str, Any]) -> list[str]:
    kv, read = report["variants"][BARE]["kv_bytes"], report["read_bytes"]
    return [
        "**Prefill** is everything behind the tower until the first token is there: projector, scores, cuts, language model, head. A "
        f"**step** is the median of {report['settings']['decode']} tokens after it. **FLOPs**: those that the method needs, from the "
        "tokens that went through each layer and the pairs that see each other, with what is multiplied in order to decide; attention is "
        "counted as the full N x N, of which a causal kernel does half. **KV** after the prompt, as the ledger counts it and as the memory "
        "that the cache's tensors lie in. **Peak**: the most that tensors took at a time in the profiled prefill, by torch's allocator, "
        "without what was there before. **CPU s** are of all threads together, in which they ran. Ratios are taken within each round.",
        "",
        f"A step reads {read / MIB:.0f} MiB of weights and, of the bare model's cache, {kv / MIB:.1f} MiB: {kv / (read + kv):.1%} of what "
        f"it reads. Where reading is what takes the time, a step without any cache would take {read / (read + kv):.3f} of the bare "
        "model's.",
    ]


def _reasons(report: dict[str, Any]) -> list[str]:
    found = [f"- {reason(report, label)}" for label in report["variants"] if label != BARE]
    return ["What was measured of each, and why seconds are not what FLOPs allow:", "", *found]


def _parts(report: dict[str, Any], phase: str, digits: int, unit: float) -> list[str]:
    kinds = (*KINDS, OTHER, BETWEEN)
    more = phase == "prefill"
    lines = ["| variant | " + " | ".join(WORDS[kind] for kind in kinds) + " | all |" + " products, GFLOP/s |" * more]
    lines += ["|---" * (len(kinds) + 2 + more) + "|"]
    unsure = []
    for label, one in report["variants"].items():
        spent = one[phase]
        cells = [f"{spent['seconds'][kind] * unit:.{digits}f}" for kind in kinds] + [f"{spent['wall'] * unit:.{digits}f}"]
        cells += [f"{rate(report, label) / 1e9:.0f}"] if more else []
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
        if spent["granted"] is not None and spent["granted"] < GRANTED:
            unsure.append(f"{label} ({spent['granted']:.0%})")
    return lines + (["", f"**The machine was busy** in the pass of {', '.join(unsure)}."] if unsure else [])


def draw(report: dict[str, Any], path: Path) -> None:
    """Seconds of the prefill over FLOPs, and of a step over what the cache holds, all of the bare model's."""
    bare = report["variants"][BARE]["kv_bytes"]
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(9.6, 5.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        left.axline((1, 1), slope=1, color="#8a8a8a", linestyle="--", linewidth=1)
        for kind, colour in zip((BARE, DEPTH, LEARNED, VISIBILITY, CACHE), ("#000000", *COLOURS), strict=False):
            labels = [label for label, one in report["variants"].items() if one["kind"] == kind]
            _points(left, report, labels, [share(report, label) for label in labels], "prefill", colour, kind)
            _points(right, report, labels, [report["variants"][label]["kv_bytes"] / bare for label in labels], "step", colour, kind)
        for axes, across, up in ((left, "FLOPs", "seconds of a prefill"), (right, "bytes of the cache", "seconds of a step")):
            axes.axhline(1.0, color="0.7", linewidth=0.8)
            axes.set_xlabel(f"{across}, share of the bare model's")
            axes.set_ylabel(f"{up}, share of the bare model's")
            axes.set_xlim(left=0)
            axes.set_ylim(bottom=0)
        left.legend(fontsize=8, frameon=False, loc="upper left")
        figure.savefig(path, dpi=150)


def _points(axes: Any, report: dict[str, Any], labels: list[str], across: list[float], name: str, colour: str, kind: str) -> None:
    if not labels:
        return
    ratios = [ratio(report, label, name) for label in labels]
    middle = [statistics.median(values) for values in ratios]
    pairs = list(zip(middle, ratios, strict=True))
    error = [[m - min(r) for m, r in pairs], [max(r) - m for m, r in pairs]]
    axes.errorbar(across, middle, yerr=error, color=colour, marker="o", markersize=4, linewidth=0, elinewidth=0.8, label=kind)
    for label, x, y in zip(labels, across, middle, strict=True):
        axes.annotate(label.removeprefix("cache=").partition(":")[0], (x, y), (3, 3), textcoords="offset points", fontsize=7, color=colour)
