"""What the benchmarks share: clocks, rounds that go on where they were, repeated where the machine was busy, and files of results."""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from foveate.files import write_json
from foveate.machine import environment, reset_peak, synchronize

GRANTED = 0.9  # least share of the time that its threads wanted to run, of which a round may speak
TRIES = 3  # of a round


@dataclass(frozen=True)
class Usage:
    """What the process has used so far, in seconds.

    wall     by the clock
    cpu      of all threads together, while they ran
    waiting  of all threads together, while they were ready to run and the machine ran something else; None where it does not tell
    """

    wall: float = field(default_factory=time.perf_counter)
    cpu: float = field(default_factory=time.process_time)
    waiting: float | None = field(default_factory=lambda: _waiting())

    def granted(self) -> float | None:
        """Since then, the share of the time that the threads wanted to run in which the machine let them. None where it does not tell."""
        now = Usage()
        if now.waiting is None or self.waiting is None:
            return None
        ran, waited = now.cpu - self.cpu, max(0.0, now.waiting - self.waiting)
        return ran / (ran + waited) if ran + waited > 0 else 1.0


def _waiting() -> float | None:
    """From /proc/self/task/*/schedstat: nanoseconds that each thread ran, and that it waited to run."""
    try:
        return sum(int(path.read_text().split()[1]) for path in Path("/proc/self/task").glob("*/schedstat")) / 1e9
    except (OSError, IndexError, ValueError):
        return None


class Tower:
    """The vision tower: timed by its own hooks, and either run or replayed. Each of its runs may be told to mark where memory stands."""

    def __init__(self, module: Any, device: str) -> None:
        self.module, self.device = module, device
        self.seconds = self.cpu = self.base = 0.0
        self.mark = False
        self._output: Any = None
        module.register_forward_pre_hook(self._begin)
        module.register_forward_hook(self._end)

    @torch.no_grad()
    def alone(self, core: Any, inputs: dict[str, Any]) -> dict[str, float]:
        """Runs it as `core`, the model around it, does; seconds by the clock and of all threads. From now on it can be replayed."""
        names = ("pixel_values", "image_grid_thw")
        core.get_image_features(**{name: inputs[name] for name in names if name in inputs})
        return {"tower": self.seconds, "tower cpu": self.cpu}

    @contextlib.contextmanager
    def replayed(self, really: bool = True) -> Iterator[None]:
        if really:  # a copy, since models put their own features into what the tower returns
            self.module.forward = lambda *args, **kwargs: copy.copy(self._output)
        try:
            yield
        finally:
            self.module.__dict__.pop("forward", None)

    def _begin(self, *_: Any) -> None:
        synchronize(self.device)
        self._start, self._ran = time.perf_counter(), time.process_time()

    def _end(self, module: Any, args: Any, output: Any) -> None:
        synchronize(self.device)
        self.seconds, self.cpu = time.perf_counter() - self._start, time.process_time() - self._ran
        self._output = copy.copy(output)
        if self.mark:
            self.base = reset_peak(self.device)


def add_machine(parser: argparse.ArgumentParser, output: Path) -> None:
    """Adds the options that say on what, in what type and how deep a shape is measured, and where its results go."""
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--layers", type=int, help="so many layers in tower and language model, to try a large shape on a small machine")
    parser.add_argument("--output", type=Path, default=output, help="folder of the results")


def machine(device: str) -> str:
    """The names and versions that a report gives."""
    return environment() if device == "cpu" else f"{torch.cuda.get_device_name()}; {environment()}"


def before(path: Path, report: dict[str, Any]) -> dict[str, Any]:
    """The report that is there, {} where there is none. Ends the program where it was measured under other settings than this one's."""
    if not path.is_file():
        return {}
    there: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if differs := [key for key, value in report.items() if there[key] != value]:
        sys.exit(f"{path} was measured with other {', '.join(differs)}; move it away, or give another --output")
    return there


def earlier(path: Path, report: dict[str, Any]) -> tuple[list[Any], list[float | None]]:
    """The rounds that are measured already, and what share of its threads the machine granted in each (None: not known). Ends the program
    where they were measured under other settings."""
    there = before(path, report)
    rounds = there.get("rounds", [])
    return rounds, there.get("granted", [None] * len(rounds))


def measured(number: int, measure: Callable[[], Any], console: Console) -> tuple[Any, float | None]:
    """A round and the share of its threads that the machine granted. A round with less than `GRANTED` is measured again; after `TRIES` the
    best of them is taken, and is marked in the table."""
    found: list[tuple[float, Any]] = []
    for _ in range(TRIES):
        began = Usage()
        result, granted = measure(), began.granted()
        seconds = f"round {number + 1}: {time.perf_counter() - began.wall:.0f} s"
        if granted is None or granted >= GRANTED:
            console.print(seconds)
            return result, granted
        found.append((granted, result))
        console.print(f"{seconds}, in which the machine granted {granted:.0%} of what the threads wanted; measured at most {TRIES} times")
    granted, result = max(found, key=lambda entry: entry[0])
    return result, granted


def bar(console: Console) -> Progress:
    """How far a measurement is."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console)


def take_rounds(
    path: Path,
    report: dict[str, Any],
    done: tuple[list[Any], list[float | None]],
    labels: Sequence[str],
    once: Callable[[str], dict[str, float]],
    total: int,
    show: tuple[Callable[[dict[str, Any]], str], Callable[[dict[str, Any], Path], None]],
    progress: Progress,
) -> None:
    """Goes on from the rounds that are `done` until there are `total`. In each every label is measured once, in shuffled order, so that a
    drift of the machine hits all alike; after each all is saved. show: makes table and plot of the report."""
    rounds, granted = done
    task = progress.add_task("", total=total * len(labels), completed=len(rounds) * len(labels))

    def one(number: int) -> dict[str, dict[str, float]]:
        order = list(labels)
        random.Random(number).shuffle(order)
        found: dict[str, dict[str, float]] = {}
        for at, label in enumerate(order):
            progress.update(task, description=f"round {number + 1}: {label}", completed=number * len(order) + at)
            found[label] = once(label)
        return found

    for number in range(len(rounds), total):
        found, share = measured(number, partial(one, number), progress.console)
        rounds.append(found)
        granted.append(share)
        progress.update(task, completed=len(rounds) * len(labels))
        save(path, {**report, "rounds": rounds, "granted": granted}, *show)
    if rounds:
        save(path, {**report, "rounds": rounds, "granted": granted}, *show)
        progress.console.print(f"{path}, with .md and .png beside it")


def spread(values: Sequence[float], digits: int) -> str:
    """Median, and the whole range of the rounds."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def column(report: dict[str, Any], label: str, name: str) -> list[float]:
    """One number a round."""
    return [row[label][name] for row in report["rounds"]]


def busy(report: dict[str, Any]) -> list[str]:
    """Lines of a table about rounds in which the machine was busy with something else."""
    shares = enumerate(report.get("granted", ()), 1)
    rounds = [f"{number} ({share:.0%})" for number, share in shares if share is not None and share < GRANTED]
    if not rounds:
        return []
    text = "in parentheses, the share of the time that the threads wanted to run in which they did"
    return ["", f"**The machine was busy** in round {', '.join(rounds)}: {text}."]


def command(script: str, given: argparse.Namespace, names: Sequence[str], **lists: Sequence[Any] | None) -> str:
    """The command that measures the same: options by their names, then those that take several values."""
    words = ["python", script]
    for name in names:
        if getattr(given, name) is not None:
            words += [f"--{name}", str(getattr(given, name))]
    for name, values in lists.items():
        words += [f"--{name}", *map(str, values)] if values else []
    return " ".join(words)


def save(path: Path, report: dict[str, Any], table: Callable[[dict[str, Any]], str], draw: Callable[[dict[str, Any], Path], None]) -> None:
    """Writes the numbers at once or not at all, so that an interruption never leaves half a file; then what is made of them."""
    write_json(path, report)
    path.with_suffix(".md").write_text(table(report), encoding="utf-8")
    draw(report, path.with_suffix(".png"))
