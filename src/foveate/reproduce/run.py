"""`foveate reproduce`: a table's cells, one run of lmms-eval each, a file each, and the comparison of what is there.

OUT/cells/*.json    one benchmark under one row, with all its metrics; written when it is finished, and not asked again
OUT/logs/*.log      what lmms-eval printed
OUT/results.json, table.md, report.html
"""

from __future__ import annotations

import errno
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from foveate.errors import FoveateError, nearest
from foveate.files import write_json
from foveate.reproduce import plan
from foveate.reproduce.compare import Numbers, code, compare, value
from foveate.reproduce.fetch import Checkpoint, check_space, fetch, free, locate, read_config, size
from foveate.reproduce.harness import Harness, Job, Measured, lmms_eval, require
from foveate.reproduce.pages import LEGEND, markdown, notes, write_pages
from foveate.reproduce.tables import Table, load_table, names

PROBE = 16  # questions
Cell = tuple[str, str]
"""Row and column."""


@dataclass(frozen=True)
class Choice:
    """What is run of a table, and how.

    only    rows; all unless named. tasks: columns, or "COLUMN=TASK" to ask another task of lmms-eval in its place
    model   another checkpoint than the table's: a hub name, a folder or an "asset:" name
    include a folder of lmms-eval tasks; the table's own unless given
    """

    only: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    model: str | None = None
    limit: int | None = None
    batch_size: int = 8
    device: str | None = None
    include: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What came of it: the comparison, the page, and the command's exit code."""

    numbers: Numbers
    page: Path
    code: int


class Reproduction:
    """A table, what is chosen of it, the checkpoint, and the cells in the folder `out`. FoveateError for rows and columns that it lacks."""

    def __init__(self, name: str, out: Path | None, choice: Choice, harness: Harness = lmms_eval) -> None:
        self.table = chosen(load_table(name), choice)
        self.choice, self.harness = choice, harness
        self.out = out or Path("runs") / "reproduce" / self.table.name
        if self.out.exists() and not self.out.is_dir():
            raise FoveateError(f"{self.out} is a file; name a folder with --out")
        own = choice.model is None
        self.checkpoint = locate(choice.model or self.table.model.name, self.table.model.revision if own else None)
        self.told = self.table.model.config if own else None

    def found(self) -> dict[str, dict[str, Measured]]:
        """What is there, by row and column."""
        cells: dict[str, dict[str, Measured]] = {}
        for row, column in self.cells:
            path = self.path(row, column)
            if path.is_file():
                cells.setdefault(row, {})[column] = _load(path)
        return cells

    @property
    def cells(self) -> list[Cell]:
        return [(row, column) for row in self.table.rows for column in self.table.columns]

    @property
    def todo(self) -> list[Cell]:
        return [cell for cell in self.cells if not self.path(*cell).is_file()]

    def path(self, row: str, column: str) -> Path:
        """A cell's file: its name says what it is, and a hash of all that the numbers depend on tells it from others."""
        asked = self.table.columns[column]
        what: list[Any] = [self.checkpoint.name, self.checkpoint.version, self.table.dtype, self.table.rows[row].reduce]
        what += [asked.task, asked.base, asked.changes, self.choice.limit, self.choice.include or self.table.tasks]
        plain = "".join(letter if letter.isalnum() else "-" for letter in f"{row}-{column}")
        return self.out / "cells" / f"{plain[:80]}-{hashlib.sha256(json.dumps(what).encode()).hexdigest()[:12]}.json"

    def job(self, row: str, column: str, limit: int | None) -> Job:
        choice, table = self.choice, self.table
        return Job(
            self.checkpoint.folder or self.checkpoint.name,
            table.rows[row].reduce,
            table.columns[column],
            table.dtype,
            choice.batch_size,
            choice.device,
            limit,
            choice.include or table.tasks,
        )

    def run(self, tell: Callable[[str], None]) -> None:
        """All cells that are not there yet. FoveateError where one cannot be had; what is finished stays."""
        self.checkpoint = fetch(self.checkpoint)
        todo = self.todo
        for number, (row, column) in enumerate(todo):
            path = self.path(row, column)
            log = self.out / "logs" / f"{path.stem}.log"
            log.parent.mkdir(parents=True, exist_ok=True)
            tell(f"{number + 1} of {len(todo)}: {self.table.rows[row].reduce} on {column}")
            measured = self.harness(self.job(row, column, self.choice.limit), log)
            write_json(path, asdict(measured))
            value(self.table.columns[column], measured)  # said at once, not after hours

    def probe(self, cost: dict[str, plan.Cost]) -> plan.Rate | None:
        """The rate of this machine, from a few questions of the first cell that is to run; None where there is none, or no cost."""
        if not self.todo:
            return None
        self.checkpoint = fetch(self.checkpoint)
        row, column = self.todo[0]
        (self.out / "logs").mkdir(parents=True, exist_ok=True)
        measured = self.harness(self.job(row, column, PROBE), self.out / "logs" / "probe.log")
        return plan.measured_rate(cost, [(row, measured)], f"measured on {measured.questions} questions of {column}")

    def compared(self) -> Outcome:
        """The comparison of what is there, with its pages."""
        found = self.found()
        numbers = compare(self.table, found, self.choice.limit)
        page = write_pages(self.out, self.table, numbers, found, self.checkpoint, self.choice.limit)
        return Outcome(numbers, page, code(numbers))


def chosen(table: Table, choice: Choice) -> Table:
    """The rows and columns that are asked for. An average over the full model keeps that row only if it is asked for."""
    rows, columns = dict(table.rows), dict(table.columns)
    if choice.only:
        rows = {name: _known("row", name, table.rows, table.name) for name in choice.only}
    if choice.tasks:
        columns = {}
        for word in choice.tasks:
            name, equals, task = word.partition("=")
            column = _known("benchmark", name, table.columns, table.name)
            told = f"asked as lmms-eval's task {task} in place of {column.task}"
            other: dict[str, Any] = {"task": task, "base": None, "changes": {}, "note": f"{column.note}; {told}" if column.note else told}
            columns[name] = column.model_copy(update=other) if equals else column
    if choice.limit is not None and choice.limit < 1:
        raise FoveateError(f"limit={choice.limit} is not possible; give a number of questions of at least 1")
    average = table.average if table.average is not None and table.average.full in rows else None
    kept = {
        name: row.model_copy(update={"paper": {at: number for at, number in row.paper.items() if at in columns}})
        for name, row in rows.items()
    }
    return table.model_copy(update={"rows": kept, "columns": columns, "average": average})


def _known(kind: str, name: str, known: dict[str, Any], table: str) -> Any:
    if name not in known:
        raise FoveateError(f"table {table} has no {kind} {name!r}{nearest(name, known)}; there are {', '.join(known)}")
    return known[name]


def _load(path: Path) -> Measured:
    try:
        return Measured(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise FoveateError(f"{path} is not a cell of a reproduction: {error}; remove it, and the same command runs it again") from error


# ---- what is printed


def listing() -> str:
    """The shipped tables, a line each."""
    lines = []
    for name in names():
        table = load_table(name)
        means = table.average is not None and table.average.judged
        judged = f"{table.numbers} numbers" if table.numbers else "judged by its averages" if means else "nothing is judged"
        lines.append(f"{name:12} arXiv {table.paper:12} {table.title}: {', '.join(table.rows)}; {judged}")
    return "\n".join([*lines, "run one: foveate reproduce TABLE --plan, then without --plan"])


def announce(work: Reproduction, rate: plan.Rate | None, cost: dict[str, plan.Cost], config: Any) -> list[str]:
    """What would run, what it takes, and what would be downloaded."""
    table, todo = work.table, work.todo
    found = work.found()
    seen = {column: cell.questions for cells in found.values() for column, cell in cells.items()}
    counts = {
        column: plan.prompts(table, column, work.choice.limit, None if work.choice.limit else seen.get(column)) for column in table.columns
    }
    done = [(row, cell) for row, cells in found.items() for cell in cells.values()]
    rate = rate or plan.measured_rate(cost, done, "measured on what is finished") or plan.declared(None)
    out = [f"{table.title} (arXiv {table.paper}, {table.where})"]
    size_told = f"{len(table.rows)} rows x {len(table.columns)} benchmarks"
    out += [f"{size_told}: {len(todo)} runs of lmms-eval to do, {len(work.cells) - len(todo)} finished"]
    out += ["", *plan.lines(table, cost, todo, counts, rate), ""] if todo else []
    out += [*_downloads(work.checkpoint, table, todo, config)]
    out += ["not known, or other than in the paper:", *(f"  {line}" for line in notes(table))]
    return [*out, f"results go to {work.out}"]


def _downloads(checkpoint: Checkpoint, table: Table, todo: Sequence[Cell], config: Any) -> list[str]:
    where = f"in {checkpoint.folder}" if checkpoint.folder else f"to be downloaded; {free() / 1e9:.1f} GB are free"
    model = f"model: {checkpoint.told}, {size(config) / 1e9:.1f} GB at two bytes a parameter, {where}"
    data = dict.fromkeys(table.columns[column].data for _, column in todo)
    sets = ", ".join(name for name in data if name)
    return [model, *([f"data: {sets}; lmms-eval downloads what is not in the cache, how much is not known here"] if sets else [])]


# ---- the command


@dataclass(frozen=True)
class How:
    """How the command goes about it. tflops: a declared rate; probe: measure it; plan: print and stop; yes: do not ask."""

    plan: bool = False
    yes: bool = False
    probe: bool = False
    tflops: float | None = None


def main(name: str | None, out: Path | None, choice: Choice, how: How, *, harness: Harness = lmms_eval) -> int:
    """Lists the tables, or runs one. Returns the exit code: 0 if all that is judged lies within its tolerance, 1 if not."""
    if name is None:
        print(listing())
        return 0
    if how.tflops is not None and not 0 < how.tflops < float("inf"):
        raise FoveateError(f"tflops={how.tflops} is not possible; give the rate of your machine in TFLOP/s, such as 100")
    work = Reproduction(name, out, choice, harness)
    config = read_config(work.checkpoint, work.told)
    cost = plan.costs(work.table, config)
    runs = bool(work.todo) and (how.probe or not how.plan)
    if runs and harness is lmms_eval:
        require()
    if runs and work.checkpoint.folder is None:
        check_space(size(config))
    try:
        if how.probe and work.todo and not how.yes:
            _ask()
        rate = plan.declared(how.tflops) if how.tflops is not None else work.probe(cost) if how.probe else None
        print("\n".join(announce(work, rate, cost, config)))
        if how.plan:
            return 0
        if work.todo:
            if not how.yes:
                _ask()
            try:
                work.run(lambda text: print(text, file=sys.stderr, flush=True))
            finally:
                if work.found():
                    outcome = work.compared()
        else:
            outcome = work.compared()
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise FoveateError(f"the disk is full: {work.out}; make room, and the same command goes on") from error
        raise
    print("\n".join([markdown(work.table, outcome.numbers, work.found()), LEGEND, str(outcome.page)]))
    return outcome.code


def _ask() -> None:
    if not sys.stdin.isatty():
        raise FoveateError("nobody is there to be asked: give --yes to download and run, or --plan to see the plan alone")
    if input("Download and run? [y/N] ").strip().lower() not in ("y", "yes"):
        raise FoveateError("nothing was downloaded or run")
