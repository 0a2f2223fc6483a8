"""The demo's report as one self-contained HTML file, and its numbers as a short table for the terminal.

First a finished model on fewer tokens (`report.finished`), then training runs side by side (`report.arms`).
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from markupsafe import Markup
from rich.console import Console
from rich.table import Table

from foveate.data.pixels import open_image
from foveate.evaluation.evaluate import Result
from foveate.inspect import figures
from foveate.machine import environment
from foveate.report import plots
from foveate.report.arms import (
    PER_LAYER,
    accuracy_table,
    check_arms,
    clock_of,
    cost_table,
    findings,
    learned_families,
    presence_table,
)
from foveate.report.finished import finished
from foveate.report.page import data_uri, write_page
from foveate.report.runs import Arm, StageLog, marks, read_log
from foveate.report.scenes import example, windows


def write_report(
    path: str | Path,
    arms: Sequence[Arm],
    world: str | Path,
    *,
    bench: str | Path | None = None,
    blind: Result | None = None,
    title: str = "Fewer visual tokens",
    scenes: int = 2,
    progress: bool = True,
) -> Path:
    """Write the report on `arms` to `path` and return it.

    The first arm is the one that the others are compared with. `world` is the data folder that they were evaluated on; `bench` the folder
    of a bench run, which makes the first part of the page; `blind` an evaluation of the first arm's model with grey images. `scenes`: how
    many test scenes to show with the answers, and how many questions with what was kept of their pictures.
    FoveateError if the arms were not evaluated on the same questions, or a run has no log or only one stage.
    """
    check_arms(arms, blind)
    logs = [read_log(arm.run) for arm in arms]
    rows = arms[0].result.rows
    names = list(dict.fromkeys(row.image for row in rows))
    picture = data_uri(open_image(Path(world) / "images" / names[0]))
    learned, clock = learned_families(arms), clock_of(arms, logs)
    with figures.style():
        stages = _stage_figures(arms, logs, clock.quiet)
        curves = _curves(arms, logs, clock.quiet)
        accuracy_figure = Markup(figures.svg(plots.accuracy_bars(arms), "accuracy"))
    context = {
        "title": title,
        "finished": None if bench is None else finished(bench, scenes, progress),
        "arms": [
            {"name": arm.name, "description": arm.description, "colour": figures.COLOURS[i % len(figures.COLOURS)]}
            for i, arm in enumerate(arms)
        ],
        "questions": len(rows),
        "images": len(names),
        "findings": findings(arms, logs),
        "cost": cost_table(logs, clock.quiet),
        "quiet": clock.quiet,
        "accuracy": accuracy_table(arms, blind, learned),
        "blind": blind is not None,
        "unlearned": len(learned) < len(arms[0].result.families),
        "learned": bool(learned),
        "majority_answers": "; ".join(
            f"{family}: {score.majority_answer}" for family, score in arms[0].result.families.items() if family != "locating"
        ),
        "presence": presence_table(arms),
        "accuracy_figure": accuracy_figure,
        "stages": stages,
        "curves": curves,
        "windows": windows(arms, picture),
        "examples": [example(arms, Path(world), name) for name in names[:scenes]],
        "environment": environment(),
        "version": version("foveate"),
    }
    return write_page("demo.html", path, context)


def print_summary(arms: Sequence[Arm], console: Console | None = None) -> None:
    """Print the cost and the accuracy of the arms as two short tables, and what they say; ratios are to the first arm."""
    check_arms(arms)
    logs = [read_log(arm.run) for arm in arms]
    learned = learned_families(arms)
    cost = Table(title="Cost of training", title_justify="left", caption_justify="left")
    accuracy = Table(title="Accuracy, %", title_justify="left", caption_justify="left")
    cost.add_column("")
    accuracy.add_column("")
    accuracy.add_column("n", justify="right")
    accuracy.add_column("majority", justify="right")
    for arm in arms:
        cost.add_column(arm.name, justify="right")
        accuracy.add_column(arm.name, justify="right")
    for group, lines in cost_table(logs, clock_of(arms, logs).quiet):
        for label, cells in lines:
            if label in ("wall clock", "FLOPs", PER_LAYER):
                name = "visual tokens per layer" if label == PER_LAYER else label
                cost.add_row(f"{group}: {name}", *(f"{value} {note.replace('ratio ', '×')}".strip() for value, note in cells))
        cost.add_section()
    cost.caption = f"× is the ratio to {arms[0].name}. FLOPs: 2 per multiply-add, predicted."
    for line in accuracy_table(arms, None, learned):
        mark = "" if line["learned"] else " *"
        accuracy.add_row(line["family"] + mark, str(line["n"]), line["majority"], *(value for value, _ in line["cells"]))
    accuracy.caption = "One seed. Majority: the best constant answer."
    if len(learned) < len(arms[0].result.families):
        accuracy.caption += " *: no run is clearly above it."
    console = console or Console()
    console.print(cost)
    console.print(accuracy)
    for sentence in findings(arms, logs):
        console.print(f"- {sentence}", markup=False, highlight=False)


def _stage_figures(arms: Sequence[Arm], logs: Sequence[list[StageLog]], quiet: bool) -> list[dict[str, Any]]:
    """Loss curves and tokens per layer for every stage name, in the order of the first arm's; arms without a stage are left out of it."""
    names = dict.fromkeys(stage.name for log in logs for stage in log)
    out = []
    for number, name in enumerate(names):
        own = [(arm.name, stage) for arm, log in zip(arms, logs, strict=True) for stage in log if stage.name == name]
        against = ("step", "seconds") if quiet else ("step",)
        out.append(
            {
                "name": name,
                "losses": [Markup(figures.svg(plots.loss_curves(own, cost), f"{cost}{number}")) for cost in against],
                "layers": Markup(figures.svg(plots.tokens_per_layer(own), f"layers{number}")),
                "sources": [
                    (arm, Markup(figures.svg(figure, f"sources{number}-{place}")))
                    for place, (arm, stage) in enumerate(own)
                    if (figure := plots.source_losses(stage)) is not None
                ],
            }
        )
    return out


def _curves(arms: Sequence[Arm], logs: Sequence[list[StageLog]], quiet: bool) -> list[tuple[str, list[Markup]]]:
    """(task, plots against FLOPs and perhaps seconds) of every task that was asked in the middle of a run."""
    runs = [(arm.name, marks(log)) for arm, log in zip(arms, logs, strict=True)]
    tasks = dict.fromkeys(task for _, found in runs for mark in found for task in mark.figures)
    costs = ("seconds", "flops") if quiet else ("flops",)
    return [
        (
            task,
            [Markup(figures.svg(plots.accuracy_curves(runs, cost, task), f"curve{number}-{place}")) for place, cost in enumerate(costs)],
        )
        for number, task in enumerate(tasks)
    ]
