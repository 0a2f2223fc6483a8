"""What benchmarks that measure in rounds share: results that an interrupted run goes on from, and files that are written whole."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from foveate.evaluation.cells import write_json
from foveate.report.runs import environment


def machine(device: str) -> str:
    return environment() if device == "cpu" else f"{torch.cuda.get_device_name()}; {environment()}"


def bars(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console)


def earlier(path: Path, report: dict[str, Any]) -> list[Any]:
    """The rounds of an interrupted run. Ends the program where `path` holds those of a run that `report` does not describe."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        return []
    before = json.loads(path.read_text())
    if differs := [key for key, value in report.items() if before[key] != value]:
        sys.exit(f"{path} was measured with other {', '.join(differs)}; move it away, or give another --output")
    return list(before["rounds"])


def save(path: Path, report: dict[str, Any], table: Callable[[dict[str, Any]], str], draw: Callable[[dict[str, Any], Path], None]) -> None:
    """The numbers at once or not at all, so that an interruption never leaves half a file; then what is made of them."""
    write_json(path, report)
    path.with_suffix(".md").write_text(table(report), encoding="utf-8")
    draw(report, path.with_suffix(".png"))


def command(script: str, given: argparse.Namespace, single: Sequence[str], several: Sequence[str]) -> str:
    """What the run is repeated by; options that take several values come last."""
    words = ["python", script]
    for name in single:
        if getattr(given, name) is not None:
            words += [f"--{name}", str(getattr(given, name))]
    for name in several:
        if getattr(given, name):
            words += [f"--{name}", *map(str, getattr(given, name))]
    return " ".join(words)
