"""The table of a bench run, a row a method and a column a budget: printed, as Markdown, CSV and JSON, and as a section of a model card."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from foveate.errors import FoveateError
from foveate.evaluation.cells import Bench, Cell
from foveate.evaluation.paired import Paired, compare
from foveate.files import write, write_json

LEVELS = ((0.001, "***"), (0.01, "**"), (0.05, "*"))
LEGEND = (
    "Accuracy, in brackets its change to the bare model; then visual tokens of a sample, mean over the decoder layers, as they were. "
    "* p < 0.05, ** p < 0.01, *** p < 0.001 on the same questions, not corrected for the number of comparisons."
)
CACHES = (
    "Under a cache policy all visual tokens go through all layers; beside the accuracy stands how much of the prompt's keys and values is "
    "left for the answer, whose first token is the bare model's. A policy without a budget stands at keep 1."
)
ALONE = "The bare model alone: there is no method to compare it with. Name some (--reduce), at budgets below 1, or leave the baselines on."
CARD_BEGIN, CARD_END = "<!-- foveate bench: begin -->", "<!-- foveate bench: end -->"


@dataclass(frozen=True)
class Row:
    """A method at a budget on a task: means over its seeds, of which there are `seeds`. Nothing but the names where it was `refused`.

    accuracy, spread, change  the metric's headline, its standard deviation over the seeds, and its difference to the bare model's
    paired                    the comparison of the scores of single questions; None for the bare model
    tokens                    visual tokens of a sample, mean over decoder layers
    flops, kv_bytes           of a sample's prompt; None where the model's cost cannot be predicted. kv_stays: what a cache policy, `cache`,
                              has left of the bytes; all of them without one
    """

    task: str
    method: str
    keep: float
    reducer: str
    seeds: int
    refused: str = ""
    accuracy: float | None = None
    spread: float | None = None
    change: float | None = None
    paired: Paired | None = None
    tokens: float | None = None
    flops: float | None = None
    kv_bytes: float | None = None
    seconds: float | None = None
    cache: str = ""
    kv_stays: float | None = None

    @property
    def kept(self) -> str:
        """What is left of the cache, as a share."""
        return f"KV {self.kv_stays / self.kv_bytes:.1%}" if self.kv_bytes and self.kv_stays is not None else "KV unknown"

    @property
    def mark(self) -> str:
        """Stars of significance."""
        return next((mark for level, mark in LEVELS if self.paired is not None and self.paired.p < level), "")


def rows(bench: Bench) -> list[Row]:
    """Of the tasks that the bare model has answered, task by task, the bare model first, methods in their order, large budgets first."""
    found = []
    for task in bench.meta["tasks"]:
        own = [cell for cell in bench.cells if cell.task == task["name"]]
        bare = next((cell for cell in own if cell.method == "none"), None)
        if bare is None:
            continue
        methods = list(dict.fromkeys([bare.method, *(cell.method for cell in own)]))
        groups: dict[tuple[int, float], list[Cell]] = {}
        for cell in own:
            groups.setdefault((methods.index(cell.method), -cell.keep), []).append(cell)
        found += [_row(bare, groups[place]) for place in sorted(groups)]
    return found


def _row(bare: Cell, cells: Sequence[Cell]) -> Row:
    first = cells[0]
    names: dict[str, Any] = {"task": first.task, "method": first.method, "keep": first.keep, "reducer": first.reducer, "seeds": len(cells)}
    names["cache"] = first.cache
    refused = next((cell.refused for cell in cells if cell.refused), "")
    if refused:
        return Row(**names, refused=refused)
    figures = [cell.accuracy for cell in cells]
    priced = all(cell.flops for cell in cells)
    return Row(
        **names,
        accuracy=fmean(figures),
        spread=stdev(figures) if len(figures) > 1 else 0.0,
        change=fmean(figures) - bare.accuracy,
        paired=None if first is bare else compare(bare, cells),
        tokens=fmean(cell.mean_tokens for cell in cells),
        flops=fmean(cell.total_flops for cell in cells) if priced else None,
        kv_bytes=fmean(cell.kv_bytes for cell in cells) if priced else None,
        seconds=fmean(cell.seconds for cell in cells),
        kv_stays=fmean(cell.kv_stays for cell in cells) if priced else None,
    )


def write_tables(bench: Bench) -> None:
    """summary.json and summary.csv with a line a row, and table.md."""
    found = rows(bench)
    flat = []
    for row in found:
        line = asdict(row)
        line |= dict.fromkeys(Paired.__dataclass_fields__) | (line.pop("paired") or {})
        flat.append(line)
    write_json(bench.folder / "summary.json", {**bench.meta, "rows": flat})
    text = io.StringIO()
    writer = csv.DictWriter(text, list(flat[0]) if flat else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    write(bench.folder / "summary.csv", text.getvalue())
    write(bench.folder / "table.md", markdown(bench))


def print_table(bench: Bench, console: Console) -> None:
    """A table for each task that the bare model has answered."""
    found = _tables(bench)
    if not found:
        console.print("The bare model has not answered a whole task yet: there is nothing to show.", markup=False, highlight=False)
    for title, header, lines, notes in found:
        if not lines:
            console.print(f"{title}\n{ALONE}", markup=False, highlight=False)
            continue
        table = Table()
        for name in header:
            table.add_column(escape(name), justify="left" if name == header[0] else "right")
        for line in lines:
            table.add_row(*(escape(text).replace(" · ", "\n") for text in line))
        for text in (title, table, LEGEND, *notes):
            console.print(text, markup=False, highlight=False)


def markdown(bench: Bench) -> str:
    """The tables as Markdown."""
    parts = []
    for title, header, lines, notes in _tables(bench):
        if not lines:
            parts.append(f"**{_plain(title)}**\n\n{_plain(ALONE)}\n")
            continue
        table = [header, ["---", *["---:"] * (len(header) - 1)], *lines]
        parts.append(f"**{_plain(title)}**\n\n" + "".join(f"| {' | '.join(map(_plain, line))} |\n" for line in table))
        parts.append("".join(f"{_plain(note)}  \n" for note in (LEGEND, *notes)))
    return "\n".join(parts)


def _plain(text: str) -> str:
    """Without what Markdown or HTML would take for their own."""
    for mark in "\\`*_|":
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.replace("&", "&amp;").replace("<", "&lt;").split())


def _tables(bench: Bench) -> list[tuple[str, list[str], list[list[str]], list[str]]]:
    """Of each task the title, the header, the lines and the notes."""
    every, found = rows(bench), []
    for task in bench.meta["tasks"]:
        own = [row for row in every if row.task == task["name"]]
        if not own:
            continue
        bare, *others = own
        keeps = sorted({row.keep for row in others}, reverse=True)
        by_place = {(row.method, row.keep): row for row in others}
        title = f"{bench.meta['model']} on {task['name']} ({task['metric']}, {task['samples']:,} questions)"
        figure = next(iter(bench.bare(task["name"]).summary))  # which may be the mean of families, unlike a share of all questions
        title += f": bare model {bare.accuracy:.1f} ({figure}) with {bare.tokens:.1f} visual tokens"
        lines = [
            [method, *(_told(by_place.get((method, keep))) for keep in keeps)] for method in dict.fromkeys(row.method for row in others)
        ]
        notes = [CACHES] if any(row.cache for row in others) else []
        notes += [f"{row.method} at {row.keep:g}: {row.refused}" for row in others if row.refused]
        found.append((title, ["method", *(f"keep {keep:g}" for keep in keeps)], lines, notes))
    return found


def _told(row: Row | None) -> str:
    if row is None:
        return ""
    if row.refused:
        return "not possible"
    return f"{row.accuracy:.1f} ({row.change:+.1f}{row.mark}) · " + (row.kept if row.cache else f"{row.tokens:.1f}")


def push_to_model_card(bench: Bench, card: Path) -> None:
    """Writes the tables into a Markdown file, between two marks of ours, appended where it has none. Uploads nothing."""
    try:
        text = card.read_text(encoding="utf-8") if card.exists() else ""
    except (OSError, ValueError) as error:
        raise FoveateError(f"cannot read the model card {card}: {error}") from error
    begin, end = text.find(CARD_BEGIN), text.find(CARD_END)
    if (begin < 0) != (end < 0) or end < begin:
        raise FoveateError(f"{card} holds only one of the marks {CARD_BEGIN} and {CARD_END}, or the second first")
    section = f"{CARD_BEGIN}\n## Accuracy on fewer visual tokens\n\n{markdown(bench)}\n{CARD_END}"
    if begin >= 0:
        text = text[:begin] + section + text[end + len(CARD_END) :]
    else:
        text = (text.rstrip("\n") + "\n\n" if text.strip() else "") + section + "\n"
    try:
        card.parent.mkdir(parents=True, exist_ok=True)
        card.write_text(text, encoding="utf-8")
    except OSError as error:
        raise FoveateError(f"cannot write the model card {card}: {error}") from error
