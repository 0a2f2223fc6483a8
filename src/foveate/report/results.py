"""A task of a bench run as plots of accuracy against cost and as rows of a table, for every page that shows one."""

from __future__ import annotations

from math import floor, log10
from typing import Any

from foveate.evaluation.bench import BARE
from foveate.inspect.words import duration, si
from foveate.report.compared import Line, budgets, signed
from foveate.report.frontier import Mark, Panel
from foveate.report.parts import Part, at_budget, kind

DASH = "–"


def panels(part: Part) -> list[Panel]:
    """Over tokens and, where it is known, over FLOPs."""
    found = []
    if part.bare.tokens > 0:
        marks = [_mark(line, line.tokens) for line in part.lines if line.tokens > 0]
        found.append(Panel(_mark(part.bare, part.bare.tokens), marks, "visual tokens of a sample, mean over layers", measure(part)))
    if part.bare.flops:
        power = 3 * floor(log10(part.bare.flops) / 3)
        unit = si(10.0**power).removeprefix("1 ")
        marks = [_mark(line, line.flops / 10**power) for line in part.lines if line.flops]
        found.append(Panel(_mark(part.bare, part.bare.flops / 10**power), marks, f"{unit} of a whole request", measure(part)))
    return found


def _mark(line: Line, cost: float) -> Mark:
    name = "bare model" if line.method == BARE else f"{line.method}, keep {line.keep:g}"
    flops = "" if line.flops is None else f", {si(line.flops)}"
    told = f"{name}: {line.value:.1f} % ({line.low:.1f} to {line.high:.1f}), {line.tokens:.4g} tokens{flops}"
    return Mark(line.method, cost, line.value, line.low, line.high, told)


def headline(part: Part) -> str:
    """The metric's own first figure, where it is another than the mean score of all questions."""
    cell = part.bare.cells[0]
    plain = 100 * sum(answer.score for answer in cell.answers) / len(cell.answers)
    return "" if abs(plain - cell.accuracy) < 1e-6 else next(iter(cell.summary))


def measure(part: Part) -> str:
    """What the accuracy of its lines is, for axes and tables."""
    few = len(part.counted) < len(part.families)
    name = "mean score of a question, %" if headline(part) else "accuracy, %"
    return f"{name}, {len(part.counted)} of {len(part.families)} families" if few else name


def results(part: Part) -> list[tuple[str, list[dict[str, Any]]]]:
    """Rows by budget, the bare model's first, under ""."""
    figure = headline(part)
    groups = [("", [_result(part.bare, part.bare, figure)])]
    for keep in budgets(part.lines):
        groups.append((f"{keep:g}", [_result(line, part.bare, figure) for line in at_budget(part.lines, keep)]))
    return groups


def _result(line: Line, bare: Line, figure: str) -> dict[str, Any]:
    paired = line.paired
    return {
        "method": "" if line.method == BARE else line.method,
        "kind": kind(line),
        "seeds": len(line.cells),
        "value": f"{line.value:.1f}",
        "interval": f"{line.low:.1f}–{line.high:.1f}",
        "figures": [f"{line.mean(lambda cell: cell.summary[figure]):.1f}"] if figure else [],
        "difference": signed(100 * paired.difference) if paired else "",
        "difference_interval": f"{signed(100 * paired.low)} to {signed(100 * paired.high)}" if paired else "",
        "p": _probability(paired.p) if paired else "",
        "loyalty": f"{100 * paired.loyalty:.1f}" if paired else "",
        "tokens": f"{line.tokens:.1f}",
        "flops": DASH if line.flops is None else si(line.flops),
        "of_whole": _share(line.flops, bare.flops),
        "of_lm": _share(line.lm_flops, bare.lm_flops),
        "kv": DASH if line.flops is None else f"{line.mean(lambda cell: cell.kv_bytes) / 2**20:.3g}",
        "seconds": duration(line.mean(lambda cell: cell.seconds)),
    }


def _share(value: float | None, whole: float | None) -> str:
    return f"{100 * value / whole:.0f} %" if value is not None and whole else DASH


def _probability(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"
