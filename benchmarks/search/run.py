"""Searched schedules against FastV and PyramidDrop at equal cost, on scenes that the search has not seen.

    python benchmarks/search/run.py

For each budget P-Sigmoid searches a schedule on calibration scenes, and FastV and PyramidDrop get as many tokens as the same budget allows:
FastV at its own layer and at the one that is best on the calibration questions, PyramidDrop with its renumbered positions and with kept
ones, as the schedule's are. G-Search, which has no budget, finds what costs a point at most; the others then get what that comes to in
FLOPs. All of them answer the same held-out questions. Relations are left out, since the model has not learnt them.

Differences are the searched schedule's, question by question, with 95 % intervals from drawing pictures anew. What is done is kept in the
folder of --work, and an interrupted run goes on there.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from foveate.errors import FoveateError
from foveate.evaluation.asking import Asked, answered
from foveate.evaluation.cells import CELLS, Cell, load_cell, save_cell
from foveate.evaluation.paired import Paired, compare
from foveate.evaluation.tasks import load_task
from foveate.inference import answering, load_model, progress_bar
from foveate.inspect.figures import COLOURS
from foveate.machine import environment
from foveate.reducers import FastV, PyramidDrop, Reducer, spell
from foveate.reducers.common import meant
from foveate.search.costs import Cost, flops_share, most_even, tokens_share
from foveate.search.run import Found, search

HERE = Path(__file__).parent
MODEL, FAMILIES = "asset:vlm", "presence/count/attribute/reading/locating"
BUDGETS = (("tokens", 0.5), ("tokens", 0.35), ("flops", 0.6), ("flops", 0.38))
LOSS = 1.0
LAYERS = (1, 2, 3, 4)  # of FastV
SEARCHED, FASTV, BEST_FASTV = "searched schedule", "FastV, layer 2", "FastV, best layer"
PYRAMID, BEST_PYRAMID = "PyramidDrop", "PyramidDrop, positions kept"
NAMES = (SEARCHED, FASTV, BEST_FASTV, PYRAMID, BEST_PYRAMID)


@dataclass(frozen=True)
class Row:
    """A method within a budget. accuracy: share of the test questions; tokens, flops: observed shares of the bare model's; counts: in each
    layer; difference: the searched schedule less this method, None for itself."""

    name: str
    reducer: str
    accuracy: float
    tokens: float
    flops: float
    counts: list[float]
    difference: Paired | None


@dataclass(frozen=True)
class Part:
    """All methods within one budget."""

    title: str
    rows: list[Row]
    missing: list[str]  # methods that cannot be had so cheaply


class Asker:
    """The model, and two sets of questions; every answer is kept in files."""

    def __init__(self, work: Path, calibration: str, test: str) -> None:
        self.work = work
        self.model, self.processor = load_model(MODEL)
        self.tasks = {"calibration": load_task(calibration), "test": load_task(test)}
        self.asked = {name: Asked.of(self.processor, task, 64) for name, task in self.tasks.items()}

    def cell(self, which: str, reducers: Sequence[Reducer]) -> Cell:
        empty = Cell(which, spell(reducers), 1.0, None, spell(reducers))
        path = self.work / CELLS / f"{empty.name}.json"
        if not path.is_file():
            with answering(self.model), progress_bar(True) as bar:
                row = bar.add_task(f"{which}: {empty.reducer}", total=len(self.tasks[which].samples))
                found = answered(self.model, self.processor, self.asked[which], reducers, lambda n: bar.advance(row, n))
            save_cell(self.work, found.cell(self.asked[which], empty))
        return load_cell(path)

    def best(self, options: Sequence[Reducer]) -> Reducer:
        """On the calibration questions, by the figure that the search looks at."""
        return max(options, key=lambda reducer: self.cell("calibration", [reducer]).accuracy)


def within(cost: Cost, limit: Fraction, per_image: int, layers: int, layer: int) -> FastV | None:
    """FastV with as many tokens as the limit allows."""
    try:
        return FastV(keep=most_even(cost, limit, per_image, layers, layer), layer=layer)
    except FoveateError:
        return None


def pyramid(cost: Cost, limit: Fraction, per_image: int, layers: int) -> PyramidDrop:
    """The largest λ, in thousandths, within the limit."""
    fits = [n for n in range(1, 1000) if cost(tuple(PyramidDrop(keep=n / 1000).visual_tokens(per_image, layers))) <= limit]
    return PyramidDrop(keep=max(fits) / 1000)


def part(asker: Asker, title: str, found: Found, cost: Cost, limit: Fraction) -> Part:
    shape = found.prompt.per_image, found.prompt.layers
    fast = {layer: within(cost, limit, *shape, layer) for layer in LAYERS}
    drop = pyramid(cost, limit, *shape)
    chosen: dict[str, Reducer | None] = {SEARCHED: found.reducer, FASTV: fast[2], PYRAMID: drop}
    chosen[BEST_FASTV] = asker.best([reducer for reducer in fast.values() if reducer is not None])
    chosen[BEST_PYRAMID] = replace(drop, positions="keep")
    bare, own = asker.cell("test", []), asker.cell("test", [found.reducer])
    rows, missing = [], []
    for name in NAMES:
        reducer = chosen[name]
        if reducer is None:
            missing.append(name)
            continue
        cell = asker.cell("test", [reducer])
        rows.append(
            Row(
                name,
                str(reducer),
                accuracy(cell),
                cell.mean_tokens / bare.mean_tokens,
                decoder_flops(cell) / decoder_flops(bare),
                cell.visual_tokens,
                None if name == SEARCHED else compare(cell, [own]),
            )
        )
    return Part(title, rows, missing)


def accuracy(cell: Cell) -> float:
    return sum(answer.score for answer in cell.answers) / len(cell.answers)


def decoder_flops(cell: Cell) -> float:
    return cell.flops["lm_linear"] + cell.flops["lm_attention"]


# ---- what is said ----------------------------------------------------------------------------------------------------------------------


def verdict(difference: Paired) -> str:
    return "better" if difference.low > 0 else "worse" if difference.high < 0 else "not told apart"


def points(difference: Paired) -> str:
    return f"{100 * difference.difference:+.1f} ({100 * difference.low:+.1f} to {100 * difference.high:+.1f})".replace("-", "−")


def conclusion(parts: Sequence[Part], name: str) -> str:
    """In one sentence, how the searched schedules stand against a method."""
    seen = [row.difference for part in parts for row in part.rows if row.name == name and row.difference is not None]
    counts = {word: sum(verdict(difference) == word for difference in seen) for word in ("better", "worse", "not told apart")}
    told = ", ".join(f"{word} at {count}" for word, count in counts.items() if count)
    return f"Against {name} (at {len(seen)} of {len(parts)} budgets), the searched schedule is {told}."


def markdown(settings: dict[str, Any], bare: float, parts: Sequence[Part]) -> str:
    lines = [
        f"Model {MODEL}, all tokens: {100 * bare:.1f} % of {settings['test_questions']:,} held-out questions. The searches saw "
        f"{settings['calibration_questions']} others.",
        "",
        "| budget | method | setting | correct, % | schedule's lead, points | tokens | FLOPs |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    for part in parts:
        for row in part.rows:
            lead = "" if row.difference is None else points(row.difference)
            cells = [part.title, row.name, f"`{row.reducer}`", f"{100 * row.accuracy:.1f}", lead, f"{row.tokens:.3f}", f"{row.flops:.3f}"]
            lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "Tokens: visual ones, mean over decoder layers; FLOPs: of the decoder layers in the prefill, text included; both as observed, "
        "shares of the bare model's. Lead: the searched schedule less the method on the same questions, 95 % interval from drawing "
        "pictures anew, not corrected for the number of comparisons. FastV's best layer is the best of "
        f"{', '.join(map(str, LAYERS))} on the calibration questions.",
        "",
        *(f"{part.title}: {', '.join(part.missing)} cannot be had so cheaply." for part in parts if part.missing),
        "",
        *(conclusion(parts, name) for name in NAMES[1:]),
    ]
    return "\n".join(lines) + "\n"


def plot(bare: float, parts: Sequence[Part]) -> Figure:
    """Left: accuracy over FLOPs; right: tokens in each layer within one budget."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    shown = parts[1]
    for number, name in enumerate(NAMES):
        colour = COLOURS[number]
        rows = sorted((row for part in parts for row in part.rows if row.name == name), key=lambda row: row.flops)
        left.plot([row.flops for row in rows], [100 * row.accuracy for row in rows], "o-", color=colour, markersize=4.5, label=name)
        for row in shown.rows:
            if row.name == name:
                right.stairs(row.counts, [layer - 0.5 for layer in range(len(row.counts) + 1)], baseline=None, color=colour, linewidth=1.6)
    left.axhline(100 * bare, color="#606060", linewidth=1, linestyle="--", label="all tokens")
    left.set_xlabel("FLOPs of the decoder layers, share")
    left.set_ylabel("correct, %")
    right.set_xlabel("decoder layer")
    right.set_ylabel("visual tokens")
    right.set_title(shown.title, fontsize=10, loc="left")
    for axes in (left, right):
        axes.grid(color="#88888840", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, fontsize=8)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--calibration", type=int, default=45, help="scenes to search on")
    parser.add_argument("--test", type=int, default=280, help="scenes to compare on")
    parser.add_argument("--trials", type=int, default=30, help="schedules that each search tries")
    parser.add_argument("--work", type=Path, default=Path("runs/search"), help="where trials and answers go")
    parser.add_argument("--output", type=Path, default=HERE, help="folder of the results")
    given = parser.parse_args()
    start = time.perf_counter()
    calibration = f"scenes:count={given.calibration},seed=1,families={FAMILIES},name=calibration"
    test = f"scenes:count={given.test},seed=100,families={FAMILIES},name=test"
    asker = Asker(given.work / f"{given.calibration}-{given.test}", calibration, test)
    bare = asker.cell("test", [])

    def searched(name: str, **aim: Any) -> Found:
        out = asker.work / name
        return search(asker.model, [asker.tasks["calibration"]], out, processor=asker.processor, samples=None, trials=given.trials, **aim)

    parts, searches = [], {}
    for kind, share in BUDGETS:
        found = searched(f"{kind}-{share}", **{kind: share})
        cost: Callable[..., Fraction] = tokens_share(found.prompt) if kind == "tokens" else flops_share(asker.model.config, found.prompt)
        title = f"{100 * share:g} % of the {'visual tokens' if kind == 'tokens' else 'FLOPs'}"
        parts.append(part(asker, title, found, cost, meant(share)))
        searches[title] = found
    found = searched("lossless", loss=LOSS)
    cost = flops_share(asker.model.config, found.prompt)
    title = f"G-Search, {LOSS:g} point to lose"
    parts.append(part(asker, title, found, cost, cost(found.counts)))
    searches[title] = found

    settings = {
        "command": shlex.join(["python", *sys.argv]),
        "environment": environment(),
        "calibration": calibration,
        "test": test,
        "calibration_questions": len(asker.tasks["calibration"].samples),
        "test_questions": len(asker.tasks["test"].samples),
        "trials": given.trials,
        "seconds": round(time.perf_counter() - start),
    }
    report = {
        **settings,
        "bare": {"accuracy": accuracy(bare), "summary": bare.summary},
        "searches": {title: {**asdict(found), "reducer": str(found.reducer)} for title, found in searches.items()},
        "parts": [asdict(one) for one in parts],
    }
    given.output.mkdir(parents=True, exist_ok=True)
    (given.output / "results.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (given.output / "table.md").write_text(markdown(settings, accuracy(bare), parts), encoding="utf-8")
    plot(accuracy(bare), parts).savefig(given.output / "plot.png", dpi=120, metadata={"Software": None})
    print((given.output / "table.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
