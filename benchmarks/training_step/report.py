"""The table of what `run.py` has measured."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

BEFORE = "before"
FEW_AND_ALL = ("few", "all")
FIRST, MEAN = 5e-3, 2e-2  # how far, of its size, a loss may be off by bfloat16's rounding: in the first step, and in the mean over all
BUSY = 0.1  # of a processor, taken by other programs, from which on it is said
WITHIN = 1.15  # of the ratio of FLOPs, the ratio of seconds between few and all tokens that is aimed at


def table(report: dict[str, Any]) -> str:
    threads = str(report["threads"])
    said = "; ".join(
        f"{name} " + ", ".join(f"{flops / 1e9:.0f} with {count} thread{'s' * (count != '1')}" for count, flops in counts.items())
        for name, counts in report["peak_flops"].items()
    )
    lines = [f"`{report['command']}`", "", f"{report['machine']}.", ""]
    lines += [f"{report['batch']} samples a step. Greatest GFLOP/s of a product of two square matrices: {said}.", ""]
    for arm, variants in report["arms"].items():
        lines += [f"**{report['what'][arm]}**", "", *_speeds(variants, report["batch"], report["peak_flops"]["bfloat16"][threads]), ""]
        lines += [*_differing(variants), *_busy(variants)]
    if set(FEW_AND_ALL) <= set(report["arms"]):
        lines += [*_ratios(*(report["arms"][arm] for arm in FEW_AND_ALL)), ""]
    lines += _parts(report["arms"])
    return "\n".join(lines).rstrip() + "\n"


def _speeds(variants: dict[str, Any], batch: int, peak: float) -> list[str]:
    first = next(iter(variants))
    lines = [
        f"| | samples/s | ÷ {first} | CPU s a step | GFLOP a step | share of the peak | peak memory, GiB | loss, first and mean |",
        "|---" * 8 + "|",
    ]
    for name, of in variants.items():
        faster = [old / new for old, new in zip(variants[first]["seconds"], of["seconds"], strict=True)]
        seconds = statistics.median(of["seconds"])
        share = of["flops"] / seconds / peak
        losses = f"{of['losses'][0]:.4f}, {statistics.mean(of['losses']):.4f}"
        cells = (f"{batch / seconds:.2f}", _spread(faster), _spread(of["cpu"], 3), f"{of['flops'] / 1e9:.1f}", f"{share:.0%}")
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {of['peak_bytes'] / 2**30:.2f} | {losses} |")
    return lines


def _spread(values: Sequence[float], digits: int = 2) -> str:
    """The median, and quartiles in parentheses where there are several values."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    low, median, high = statistics.quantiles(values, n=4)
    return f"{median:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def unequal(variants: dict[str, Any]) -> list[str]:
    """Variants whose losses, on the same samples, are off by more than rounding."""
    base, *others = variants
    expected = variants[base]["losses"]
    found = []
    for name in others:
        losses = variants[name]["losses"]
        first, mean = abs(losses[0] / expected[0] - 1), abs(statistics.mean(losses) / statistics.mean(expected) - 1)
        found += [name] if first > FIRST or mean > MEAN else []
    return found


def _differing(variants: dict[str, Any]) -> list[str]:
    found = unequal(variants)
    return [f"**Losses differ by more than rounding**: {', '.join(found)}.", ""] if found else []


def _busy(variants: dict[str, Any]) -> list[str]:
    most = max(of["others"] for of in variants.values())
    return [f"**The machine was busy**: other programs took up to {most:.2f} of its processors.", ""] if most > BUSY else []


def _ratios(few: dict[str, Any], every: dict[str, Any]) -> list[str]:
    lines = ["| few ÷ all | seconds | FLOPs | seconds ÷ FLOPs |", "|---|---|---|---|"]
    for name in few:
        if name not in every:
            continue
        seconds = [a / b for a, b in zip(few[name]["seconds"], every[name]["seconds"], strict=True)]
        flops = few[name]["flops"] / every[name]["flops"]
        lines.append(f"| {name} | {_spread(seconds, 3)} | {flops:.3f} | {statistics.median(seconds) / flops:.2f} |")
    return [*lines, "", f"Seconds ÷ FLOPs is aimed to be at most {WITHIN}."]


def _parts(arms: dict[str, Any]) -> list[str]:
    """Milliseconds of each part of a step by the clock, those of this process' threads in parentheses."""
    columns = {f"{arm}: {name}": of["parts"] for arm, variants in arms.items() for name, of in variants.items() if "parts" in of}
    rows = list(dict.fromkeys(part for parts in columns.values() for part in parts))
    lines = ["| ms of a step (of its threads) | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|"]
    for row in rows:
        lines.append(f"| {row} | " + " | ".join(_ms(parts.get(row, (0.0, 0.0))) for parts in columns.values()) + " |")
    sums = [[sum(spent[kind] for spent in parts.values()) for kind in (0, 1)] for parts in columns.values()]
    return [*lines, "| **sum** | " + " | ".join(map(_ms, sums)) + " |"]


def _ms(spent: Sequence[float]) -> str:
    return f"{1e3 * spent[0]:.1f} ({1e3 * spent[1]:.1f})"
