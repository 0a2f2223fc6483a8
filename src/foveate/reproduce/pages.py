"""The comparison as files: results.json, table.md and report.html."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from foveate.files import write, write_json
from foveate.inspect.words import duration
from foveate.machine import environment
from foveate.report.page import write_page
from foveate.reproduce.compare import AVERAGE, Found, Number, Numbers, Verdict, code, verdict
from foveate.reproduce.fetch import Checkpoint
from foveate.reproduce.tables import Table

_DASH = "–"
_SIGNS = {Verdict.WITHIN: "", Verdict.OUTSIDE: " !", Verdict.SHOWN: " ?", Verdict.ABSENT: ""}
LEGEND = "ours / the paper's (difference); ! outside the tolerance, ? shown and not judged"


def markdown(table: Table, numbers: Numbers, found: Found) -> str:
    """The table beside the paper's numbers."""
    columns = [*table.columns, *([AVERAGE] if table.average else [])]
    lines = [f"| row | tokens | {' | '.join(columns)} | verdict |", "|---" * (len(columns) + 3) + "|"]
    for name in numbers:
        cells = [_cell(numbers[name].get(column)) for column in columns]
        lines.append(f"| {name} | {tokens(table, name, found)} | {' | '.join(cells)} | {verdict(numbers[name])} |")
    return "\n".join(lines)


def tokens(table: Table, row: str, found: Found) -> str:
    """Visual tokens in a layer as they went through, beside what the table expects where that is another number."""
    seen = [cell.tokens for cell in found.get(row, {}).values() if cell.tokens is not None]
    expected = table.rows[row].tokens
    if not seen:
        return f"{expected:g}"
    mean = sum(seen) / len(seen)
    return f"{mean:.4g}" if abs(mean - expected) < 0.5 else f"{mean:.4g} (expected {expected:g})"


def _cell(number: Number | None) -> str:
    if number is None or number.ours is None:
        return _DASH if number is None or number.paper is None else f"{_DASH} / {_figure(number.paper)}"
    if number.paper is None or number.difference is None:
        return f"{_figure(number.ours)} / {_DASH}"
    return f"{_figure(number.ours)} / {_figure(number.paper)} ({_figure(number.difference, '+')}){_SIGNS[number.verdict]}"


def _figure(value: float, sign: str = "") -> str:
    return f"{value:{sign}.0f}" if abs(value) >= 1000 else f"{value:{sign}.{3 if abs(value) < 2 and sign == '' else 2}f}"


def notes(table: Table) -> list[str]:
    """All that the table says about what is not known, or other than in the paper."""
    out = [table.model.note] if table.model.note else []
    out += table.notes
    out += [f"{name}: {column.note}" for name, column in table.columns.items() if column.note]
    out += [f"{name} {row.evidence}{f': {row.note}' if row.note else ''}" for name, row in table.rows.items()]
    return out + [f"left out, {name}: {reason}" for name, reason in table.left_out.items()]


def tolerances(table: Table) -> list[str]:
    """Each column's tolerance, with its reason."""
    out = [
        f"{name}: {column.tolerance:g}, {column.why}" if column.judged else f"{name}: not judged" for name, column in table.columns.items()
    ]
    about = table.average
    if about is not None:
        start = f"{AVERAGE} (mean share of row {about.full}, in %): "
        out.append(start + (f"{about.tolerance:g}" if about.judged else "not judged") + (f", {about.why}" if about.why else ""))
    return out


def write_pages(out: Path, table: Table, numbers: Numbers, found: Found, checkpoint: Checkpoint, limit: int | None) -> Path:
    """Writes the three files into `out`, and returns the page."""
    source = {"table": table.title, "paper": f"arXiv {table.paper}", "where": table.where}
    ran = {"model": checkpoint.told, "version": checkpoint.version, "limit": limit}
    write_json(out / "results.json", {**source, **ran, "code": code(numbers), "rows": _json(table, numbers, found)})
    warnings = _warnings(table, numbers, found, checkpoint, limit)
    parts = [f"# {table.title}", f"arXiv {table.paper}, {table.where}. Model: {checkpoint.told} ({checkpoint.version})."]
    parts += ["\n".join(f"- {line}" for line in warnings)] if warnings else []
    parts += [markdown(table, numbers, found), LEGEND + "."]
    for head, lines in (("Tolerances", tolerances(table)), ("Notes", notes(table))):
        parts += [f"## {head}", "\n".join(f"- {line}" for line in lines)]
    write(out / "table.md", "\n\n".join(parts) + "\n")
    context = {
        "title": table.title,
        "source": source,
        "model": f"{checkpoint.told} ({checkpoint.version})",
        "warnings": warnings,
        "columns": [*table.columns, *([AVERAGE] if table.average else [])],
        "rows": [_row(table, name, numbers[name], found) for name in numbers],
        "tolerances": tolerances(table),
        "notes": notes(table),
        "made": [(f"{row}, {column}", cell.command) for row, cells in found.items() for column, cell in cells.items() if cell.command],
        "versions": _versions(found),
    }
    return write_page("reproduce.html", out / "report.html", context)


def _json(table: Table, numbers: Numbers, found: Found) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for name, row in table.rows.items():
        cells = {}
        for column, number in numbers[name].items():
            told = {key: getattr(number, key) for key in ("paper", "ours", "difference", "tolerance", "verdict", "reason")}
            measured = found.get(name, {}).get(column)
            cells[column] = told | ({} if measured is None else {"questions": measured.questions, "tokens": measured.tokens})
        rows[name] = {
            "reduce": row.reduce,
            "budget": row.budget,
            "evidence": row.evidence,
            "verdict": verdict(numbers[name]),
            "cells": cells,
        }
    return rows


def _warnings(table: Table, numbers: Numbers, found: Found, checkpoint: Checkpoint, limit: int | None) -> list[str]:
    out = []
    if limit:
        out.append(f"Only the first {limit} questions of each benchmark were asked: nothing is judged.")
    elif all(verdict(row) is Verdict.SHOWN for row in numbers.values()):
        out.append("Nothing in this table is judged; the reasons stand below.")
    if checkpoint.name != table.model.name:
        out.append(f"The paper's numbers are of {table.model.name}, ours of {checkpoint.name}.")
    if any("expected" in tokens(table, row, found) for row in found):
        out.append("Other numbers of tokens went through the layers than the table expects: this is not the paper's budget.")
    for column, told in table.columns.items():
        seen = {cells[column].questions for cells in found.values() if column in cells}
        if not limit and told.questions and seen - {told.questions}:
            out.append(
                f"{column} has {', '.join(f'{n:,}' for n in sorted(seen))} questions here, {told.questions:,} by the table {told.counted}."
            )
    return out


def _row(table: Table, name: str, numbers: Mapping[str, Number], found: Found) -> dict[str, Any]:
    told = {
        column: {"text": _cell(number), "kind": {Verdict.WITHIN: "right", Verdict.OUTSIDE: "wrong"}.get(number.verdict, "soft")}
        for column, number in numbers.items()
    }
    seconds = sum(cell.seconds or 0.0 for cell in found.get(name, {}).values())
    row = table.rows[name]
    return {
        "name": name,
        "reduce": row.reduce,
        "budget": row.budget,
        "tokens": tokens(table, name, found),
        "cells": told,
        "verdict": str(verdict(numbers)),
        "seconds": duration(seconds) if seconds else _DASH,
    }


def _versions(found: Found) -> list[str]:
    made = {cell.harness for cells in found.values() for cell in cells.values() if cell.harness}
    return [f"foveate {version('foveate')}", *sorted(made), environment()]
