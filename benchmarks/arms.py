"""What benchmarks share that train arms with several seeds and ask each the same questions: options, runs that are resumed."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.figure import Figure

from foveate.evaluation.evaluate import Result
from foveate.files import write_json
from foveate.machine import environment
from foveate.world.scenes import write_world

SETTINGS = ("scenes", "test", "questions", "steps")
Report = dict[str, Any]
Measure = Callable[[str, int, argparse.Namespace, Sequence[dict[str, Any]]], list[dict[str, Any]]]


def options(doc: str, arms: Sequence[str], seeds: Sequence[int], steps: int, work: str, output: Path) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--arms", nargs="+", choices=arms, default=arms, metavar="ARM", help=", ".join(arms))
    parser.add_argument("--seeds", type=int, nargs="+", default=seeds)
    parser.add_argument("--scenes", type=int, default=2000, help="to train on")
    parser.add_argument("--test", type=int, default=200, help="scenes to ask about")
    parser.add_argument("--questions", type=int, help="at most so many, all families in turn")
    parser.add_argument("--steps", type=int, default=steps, help="of each training on questions; 0: one epoch")
    parser.add_argument("--table", action="store_true", help="only write the table and the plot")
    parser.add_argument("--work", type=Path, default=Path(work), help="where data, features, checkpoints and models go")
    parser.add_argument("--output", type=Path, default=output, help="folder of the results")
    return parser


def run(given: argparse.Namespace, measure: Measure, table: Callable[[Report], str], plot: Callable[[Report], Figure]) -> None:
    """Measures the arms and seeds that results.json has not, and writes table.md and the plot. measure: (arm, seed, options, rows) to
    rows, each with its `arm` and `seed`."""
    path = given.output / "results.json"
    settings = {name: getattr(given, name) for name in SETTINGS}
    report: Report = whole(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {**settings, "rows": []}
    if not given.table:
        if any(report[name] != value for name, value in settings.items()):
            raise SystemExit(f"{path} was made with other settings; move it away, or give another --output")
        write_world(given.work / "data", train=given.scenes, test=given.test, seed=0)
        for seed in given.seeds:
            for arm in given.arms:
                if not any((row["arm"], row["seed"]) == (arm, seed) for row in report["rows"]):
                    report["rows"] += measure(arm, seed, given, report["rows"])
                    report |= {"machine": environment(), "threads": torch.get_num_threads()}
                    keep(path, report)
    (given.output / "table.md").write_text(table(report), encoding="utf-8")
    figure = plot(report)
    with mpl.rc_context({"svg.hashsalt": "foveate"}):  # the same marks, the same file
        figure.savefig(given.output / "plot.svg", metadata={"Date": None})
    figure.savefig(given.output / "plot.png", dpi=120)


def answers(result: Result) -> dict[str, Any]:
    """Of what a row holds: accuracy by family, and of each question the picture and whether it was answered rightly."""
    families = {family: score.accuracy for family, score in result.families.items()}
    return {"families": families, "pictures": [row.image for row in result.rows], "correct": [int(row.correct) for row in result.rows]}


def whole(kept: Report) -> Report:
    """The report of what `keep` wrote."""
    rest = {name: value for name, value in kept.items() if name != "pictures"}
    return {**rest, "rows": [{**row, "pictures": kept["pictures"]} for row in kept["rows"]]}


def keep(path: Path, report: Report) -> None:
    """Writes a report. All rows are of the same questions, so that their pictures stand in it once."""
    pictures = report["rows"][0]["pictures"]
    if any(row["pictures"] != pictures for row in report["rows"]):
        raise ValueError(f"{path}: rows of other questions than the first")
    rows = [{name: value for name, value in row.items() if name != "pictures"} for row in report["rows"]]
    write_json(path, {**report, "pictures": pictures, "rows": rows}, indent=None)
