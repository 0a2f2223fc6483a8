"""Measured numbers beside the paper's: which of them are judged, and how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from statistics import mean

from foveate.errors import FoveateError, nearest
from foveate.reproduce.harness import Measured
from foveate.reproduce.tables import Column, Table

AVERAGE = "average"


class Verdict(StrEnum):
    WITHIN = "within"
    OUTSIDE = "outside"
    SHOWN = "not judged"
    ABSENT = "not run"


@dataclass(frozen=True)
class Number:
    """One number of a table beside ours, in the paper's unit. `reason`: why it is not judged."""

    paper: float | None
    ours: float | None
    tolerance: float
    verdict: Verdict
    reason: str = ""

    @property
    def difference(self) -> float | None:
        """Ours less the paper's, without what floats add at the end."""
        return None if self.paper is None or self.ours is None else round(self.ours - self.paper, 9)


Found = Mapping[str, Mapping[str, Measured]]
"""What was measured, by row and column."""
Numbers = dict[str, dict[str, Number]]
"""By row and column, AVERAGE last."""


def value(column: Column, measured: Measured) -> float:
    """The measured number in the paper's unit. FoveateError where the harness' result has no such metric."""
    for name in column.metric:
        if name not in measured.metrics:
            raise FoveateError(
                f"lmms-eval's result of {column.task} has no metric {name!r}{nearest(name, measured.metrics)}; "
                f"it has {', '.join(measured.metrics) or 'none'}. Name one of them in the table (columns: metric)"
            )
    return column.scale * sum(measured.metrics[name] for name in column.metric)


def compare(table: Table, found: Found, limit: int | None = None) -> Numbers:
    """All numbers of the table beside what was measured. With a `limit` of questions nothing is judged."""
    partial = f"the first {limit} questions only" if limit else ""
    ours = {
        row: {name: value(table.columns[name], one) for name, one in cells.items() if name in table.columns} for row, cells in found.items()
    }
    numbers: Numbers = {}
    for name, row in table.rows.items():
        numbers[name] = {}
        for at, column in table.columns.items():
            if not row.judged:
                reason = row.note or "the row is not judged"
            else:
                reason = "" if column.judged else column.note or "the column is not judged"
            numbers[name][at] = _number(row.paper.get(at), ours.get(name, {}).get(at), column.tolerance, reason or partial)
        if table.average is not None and name != table.average.full:
            numbers[name][AVERAGE] = _average(table, name, ours, partial)
    return numbers


def _number(paper: float | None, ours: float | None, tolerance: float, reason: str) -> Number:
    if ours is None:
        return Number(paper, None, tolerance, Verdict.ABSENT)
    if paper is None:
        return Number(None, ours, tolerance, Verdict.SHOWN, "the paper's number is not known here")
    if reason:
        return Number(paper, ours, tolerance, Verdict.SHOWN, reason)
    within = round(abs(ours - paper), 9) <= tolerance
    return Number(paper, ours, tolerance, Verdict.WITHIN if within else Verdict.OUTSIDE)


def _average(table: Table, name: str, ours: Mapping[str, Mapping[str, float]], partial: str) -> Number:
    """The mean share of the full model, in %: over the columns that both rows have, on both sides the same ones."""
    about = table.average
    assert about is not None
    row, full = table.rows[name], table.rows[about.full]
    mine, whole = ours.get(name, {}), ours.get(about.full, {})
    columns = [at for at in table.columns if mine.get(at) is not None and whole.get(at)]
    if row.average is None:
        columns = [at for at in columns if at in row.paper and full.paper.get(at)]
    if not columns:
        return Number(row.average, None, about.tolerance, Verdict.ABSENT)
    paper = row.average if row.average is not None else 100 * mean(row.paper[at] / full.paper[at] for at in columns)
    said = "the paper's own, over other benchmarks" if row.average is not None else ""
    reason = "" if about.judged and row.judged and not said else about.why or said
    return _number(paper, 100 * mean(mine[at] / whole[at] for at in columns), about.tolerance, reason or partial)


def verdict(numbers: Mapping[str, Number]) -> Verdict:
    """Of a row: outside if one number is; within if one is judged and all of them are there and within."""
    verdicts = [number.verdict for number in numbers.values()]
    for one in (Verdict.OUTSIDE, Verdict.ABSENT, Verdict.WITHIN):
        if one in verdicts:
            return one
    return Verdict.SHOWN


def code(numbers: Mapping[str, Mapping[str, Number]]) -> int:
    """The command's exit code: 1 if a judged number lies outside, else 0."""
    return int(any(number.verdict is Verdict.OUTSIDE for row in numbers.values() for number in row.values()))
