"""The demo's report: several training runs side by side as one self-contained HTML file and as a short table for the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from markupsafe import Markup, escape
from rich.console import Console
from rich.table import Table

from foveate.bridges import build_bridge
from foveate.data.pixels import open_image
from foveate.errors import FoveateError
from foveate.evaluation.evaluate import Result, Verdict
from foveate.inspect import figures
from foveate.inspect.words import answer_text, duration, si
from foveate.machine import environment
from foveate.report import plots
from foveate.report.page import data_uri, write_page
from foveate.report.runs import Arm, StageBridge, StageLog, marks, read_bridges, read_log, split_stages
from foveate.world.questions import RULER, box_cells

Grid = tuple[int, int]
Cell = tuple[str, str]
_PER_LAYER = "visual tokens per image, per layer"


def write_report(
    path: str | Path,
    arms: Sequence[Arm],
    world: str | Path,
    *,
    blind: Result | None = None,
    title: str = "Training on few visual tokens",
    scenes: int = 3,
) -> Path:
    """Write the report on `arms` to `path` and return it.

    The first arm is the one that the others are compared with. `world` is the data folder that they were evaluated on; `blind` is an
    evaluation of the first arm's model with grey images. `scenes`: how many test scenes to show with the answers.
    FoveateError if the arms were not evaluated on the same questions, or a run has no log or only one stage.
    """
    check_arms(arms, blind)
    logs = [read_log(arm.run) for arm in arms]
    rows = arms[0].result.rows
    names = list(dict.fromkeys(row.image for row in rows))
    picture = data_uri(open_image(Path(world) / "images" / names[0]))
    learned = learned_families(arms)
    with figures.style():
        stages = _stage_figures(arms, logs)
        curves = _curves(arms, logs)
        accuracy_figure = Markup(figures.svg(plots.accuracy_bars(arms), "accuracy"))
    counted = learned or list(arms[0].result.families)
    context = {
        "title": title,
        "arms": [
            {"name": arm.name, "description": arm.description, "colour": figures.COLOURS[i % len(figures.COLOURS)]}
            for i, arm in enumerate(arms)
        ],
        "questions": len(rows),
        "images": len(names),
        "findings": findings(arms, logs),
        "cost": _cost_table(logs),
        "accuracy": _accuracy_table(arms, blind, learned),
        "mean": {
            "majority": _percent(_mean([arms[0].result.families[family].majority_accuracy for family in counted])),
            "blind": _percent(_mean_accuracy(blind, counted)) if blind else "",
            "cells": [_percent(_mean_accuracy(arm.result, counted)) for arm in arms],
        },
        "blind": blind is not None,
        "unlearned": len(learned) < len(arms[0].result.families),
        "learned": bool(learned),
        "majority_answers": "; ".join(
            f"{family}: {score.majority_answer}" for family, score in arms[0].result.families.items() if family != "locating"
        ),
        "presence": _presence_table(arms),
        "accuracy_figure": accuracy_figure,
        "stages": stages,
        "curves": curves,
        "windows": _windows(arms, picture),
        "examples": [_example(arms, Path(world), name) for name in names[:scenes]],
        "environment": environment(),
        "version": version("foveate"),
    }
    return write_page("demo.html", path, context)


def print_summary(arms: Sequence[Arm], console: Console | None = None) -> None:
    """Print the cost and the accuracy of the arms as two short tables; ratios are to the first arm."""
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
    for group, lines in _cost_table(logs):
        for label, cells in lines:
            if label in ("wall clock", "FLOPs", _PER_LAYER):
                name = "visual tokens per layer" if label == _PER_LAYER else label
                cost.add_row(f"{group}: {name}", *(f"{value} {note.replace('ratio ', '×')}".strip() for value, note in cells))
        cost.add_section()
    cost.caption = f"× is the ratio to {arms[0].name}. FLOPs: 2 per multiply-add, predicted."
    for line in _accuracy_table(arms, None, learned):
        mark = "" if line["learned"] else " *"
        accuracy.add_row(line["family"] + mark, str(line["n"]), line["majority"], *(value for value, _ in line["cells"]))
    accuracy.caption = "One seed. Majority: the best constant answer."
    if len(learned) < len(arms[0].result.families):
        accuracy.caption += " *: no run is clearly above it."
    console = console or Console()
    console.print(cost)
    console.print(accuracy)


def check_arms(arms: Sequence[Arm], blind: Result | None = None) -> None:
    """FoveateError unless there are arms and all were asked the same questions."""
    if not arms:
        raise FoveateError("a report needs at least one arm")
    asked = [(row.id, row.image, row.question) for row in arms[0].result.rows]
    others = [(arm.name, arm.result) for arm in arms[1:]] + ([("the grey-image evaluation", blind)] if blind else [])
    for name, result in others:
        if [(row.id, row.image, row.question) for row in result.rows] != asked:
            raise FoveateError(f"{name} and {arms[0].name} were not asked the same questions; evaluate them on one data folder")


def learned_families(arms: Sequence[Arm]) -> list[str]:
    """Families in which at least one arm is above the majority answer with its whole 95 % interval; the others compare nothing."""
    return [
        family
        for family in arms[0].result.families
        if any(arm.result.families[family].low > arm.result.families[family].majority_accuracy for arm in arms)
    ]


def findings(arms: Sequence[Arm], logs: Sequence[list[StageLog]]) -> list[str]:
    """One sentence for each arm after the first: its cost as a share of the first arm's, and the difference of their accuracies."""
    counted = learned_families(arms)
    sentences = []
    for arm, log in list(zip(arms, logs, strict=True))[1:]:
        (pre, fine), (first_pre, first_fine) = _halves(log), _halves(logs[0])
        text = (
            f"{arm.name}: pre-training took {pre[0] / first_pre[0]:.2f} of the wall clock and {pre[1] / first_pre[1]:.2f} of the FLOPs of "
            f"{arms[0].name}, fine-tuning {fine[0] / first_fine[0]:.2f} and {fine[1] / first_fine[1]:.2f}"
        )
        if counted:
            points = 100 * (_mean_accuracy(arm.result, counted) - _mean_accuracy(arms[0].result, counted))
            which = "all families" if len(counted) == len(arms[0].result.families) else f"{', '.join(counted)}"
            text += f"; mean accuracy ({which}) {_signed(points)} points."
        else:
            text += "; no run has learned a family well enough to compare accuracies."
        sentences.append(text)
    return sentences


# ---- tables --------------------------------------------------------------------------------------------------------------------------


def _halves(log: list[StageLog]) -> tuple[tuple[float, float], tuple[float, float]]:
    """(seconds, FLOPs) of pre-training and of fine-tuning."""
    before, last = split_stages(log)
    return (sum(stage.seconds for stage in before), sum(stage.flops for stage in before)), (last.seconds, last.flops)


def _cost_table(logs: Sequence[list[StageLog]]) -> list[tuple[str, list[tuple[str, list[Cell]]]]]:
    """Groups of (label, one (value, ratio to the first arm) for each arm)."""

    def line(stages: list[list[StageLog]], of: Callable[[StageLog], float], spell: Callable[[float], str], ratio: bool) -> list[Cell]:
        values = [sum(of(stage) for stage in arm) for arm in stages]
        return [(spell(value), f"ratio {value / values[0]:.2f}" if ratio and i else "") for i, value in enumerate(values)]

    def weighted(stages: list[list[StageLog]], of: Callable[[StageLog], float]) -> list[Cell]:
        means = [sum(of(stage) * stage.images for stage in arm) / sum(stage.images for stage in arm) for arm in stages]
        return [(f"{mean:.4g}", "") for mean in means]

    def group(stages: list[list[StageLog]]) -> list[tuple[str, list[Cell]]]:
        return [
            ("wall clock", line(stages, lambda stage: stage.seconds, duration, True)),
            ("FLOPs", line(stages, lambda stage: stage.flops, si, True)),
            ("visual tokens per image, from the bridge", weighted(stages, lambda stage: stage.tokens)),
            (_PER_LAYER, weighted(stages, lambda stage: stage.layer_tokens)),
            ("images seen", line(stages, lambda stage: stage.images, lambda value: f"{value:,.0f}", False)),
        ]

    halves = [split_stages(log) for log in logs]
    return [
        ("Pre-training", group([before for before, _ in halves])),
        ("Fine-tuning", group([[last] for _, last in halves])),
        ("Both", group(list(logs))[:2]),
    ]


def _accuracy_table(arms: Sequence[Arm], blind: Result | None, learned: list[str]) -> list[dict[str, Any]]:
    lines = []
    for family, first in arms[0].result.families.items():
        scores = [arm.result.families[family] for arm in arms]
        lines.append(
            {
                "family": family,
                "n": first.n,
                "learned": family in learned,
                "majority": _percent(first.majority_accuracy),
                "blind": _percent(blind.families[family].accuracy) if blind else "",
                "cells": [(_percent(score.accuracy), f"{100 * score.low:.0f}–{100 * score.high:.0f}") for score in scores],
            }
        )
    return lines


def _presence_table(arms: Sequence[Arm]) -> list[tuple[str, list[str]]]:
    if "presence" not in arms[0].result.families:
        return []
    labels = {"precision": "precision", "recall": "recall", "f1": "F1", "yes_ratio": "answered yes"}
    return [(label, [_percent(arm.result.families["presence"].details[key]) for arm in arms]) for key, label in labels.items()]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _mean_accuracy(result: Result, families: Sequence[str]) -> float:
    return _mean([result.families[family].accuracy for family in families])


def _signed(points: float) -> str:
    return f"{points:+.1f}".replace("-", "−")


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


# ---- figures and pictures ------------------------------------------------------------------------------------------------------------


def _stage_figures(arms: Sequence[Arm], logs: Sequence[list[StageLog]]) -> list[dict[str, Any]]:
    """Loss curves and tokens per layer for every stage name, in the order of the first arm's; arms without a stage are left out of it."""
    names = dict.fromkeys(stage.name for log in logs for stage in log)
    out = []
    for number, name in enumerate(names):
        own = [(arm.name, stage) for arm, log in zip(arms, logs, strict=True) for stage in log if stage.name == name]
        out.append(
            {
                "name": name,
                "loss_step": Markup(figures.svg(plots.loss_curves(own, "step"), f"step{number}")),
                "loss_seconds": Markup(figures.svg(plots.loss_curves(own, "seconds"), f"seconds{number}")),
                "layers": Markup(figures.svg(plots.tokens_per_layer(own), f"layers{number}")),
                "sources": [
                    (arm, Markup(figures.svg(figure, f"sources{number}-{place}")))
                    for place, (arm, stage) in enumerate(own)
                    if (figure := plots.source_losses(stage)) is not None
                ],
            }
        )
    return out


def _curves(arms: Sequence[Arm], logs: Sequence[list[StageLog]]) -> list[tuple[str, Markup, Markup]]:
    """(task, against seconds, against FLOPs) of every task that was asked in the middle of a run."""
    runs = [(arm.name, marks(log)) for arm, log in zip(arms, logs, strict=True)]
    tasks = dict.fromkeys(task for _, found in runs for mark in found for task in mark.figures)
    out = []
    for number, task in enumerate(tasks):
        drawn = (plots.accuracy_curves(runs, against, task) for against in ("seconds", "flops"))
        seconds, flops = (Markup(figures.svg(figure, f"curve{number}-{side}")) for side, figure in enumerate(drawn))
        out.append((task, seconds, flops))
    return out


def _windows(arms: Sequence[Arm], picture: str) -> list[dict[str, Any]]:
    """Pictures of the windows of every bridge that a stage has used, equal ones once."""
    users: dict[str, dict[str, list[str]]] = {}
    bridges: dict[str, StageBridge] = {}
    for arm in arms:
        for stage in read_bridges(arm.run):
            key = repr((stage.bridge, stage.grid))
            bridges[key] = stage
            users.setdefault(key, {}).setdefault(arm.name, []).append(stage.name)
    groups = []
    for key, stage in bridges.items():
        with torch.device("meta"):
            boxes = build_bridge(stage.bridge).boxes(stage.grid)
        rows, columns = stage.grid
        who = "; ".join(f"{name} ({', '.join(stages)})" for name, stages in users[key].items())
        title = f"{who}: {rows} × {columns} patches, {len(boxes)} tokens"
        groups.append({"title": title, "pictures": list(_scales(picture, boxes, stage.grid))})
    return groups


def _scales(picture: str, boxes: Sequence[tuple[int, int, int, int]], grid: Grid) -> list[dict[str, Any]]:
    """One picture for each size of window, in the order of the tokens."""
    sizes: dict[tuple[int, int], list[tuple[int, int, int, int]]] = {}
    for box in boxes:
        sizes.setdefault((box[2] - box[0], box[3] - box[1]), []).append(box)
    out = []
    for (height, width), own in sizes.items():
        windows = Counter(own)
        each = "–".join(str(count) for count in sorted(set(windows.values())))
        unit = f"{height} × {width} patches" if (height, width) != (1, 1) else "1 patch"
        caption = f"{_many(len(windows), 'window')} of {unit}, {each} token{'' if each == '1' else 's'} each"
        frames = [(box, "#ff9f1c", False) for box in windows]
        out.append({"svg": scene_svg(picture, frames, grid), "caption": caption})
    return out


def _many(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def scene_svg(picture: str, frames: Sequence[tuple[tuple[int, int, int, int], str, bool]], grid: Grid) -> Markup:
    """An image (data URI) under frames of (half-open box in cells of `grid`, colour, dashed)."""
    rows, columns = grid
    stroke = max(rows, columns) / 190
    shadows, lines = [], []
    for (row0, column0, row1, column1), colour, dashed in frames:
        rectangle = (
            f'<rect x="{column0 + stroke:.3g}" y="{row0 + stroke:.3g}" width="{column1 - column0 - 2 * stroke:.4g}" '
            f'height="{row1 - row0 - 2 * stroke:.4g}" fill="none" '
        )
        dash = f'stroke-dasharray="{4 * stroke:.3g}" ' if dashed else ""
        shadows.append(rectangle + f'stroke="#00000080" stroke-width="{2 * stroke:.3g}"/>')
        lines.append(rectangle + dash + f'stroke="{escape(colour)}" stroke-width="{stroke:.3g}"/>')
    image = f'<image href="{picture}" width="{columns}" height="{rows}" preserveAspectRatio="none"/>'
    return Markup(f'<svg viewBox="0 0 {columns} {rows}" role="img">{image}{"".join(shadows + lines)}</svg>')


def _example(arms: Sequence[Arm], world: Path, image: str) -> dict[str, Any]:
    """A scene with every arm's answers to its questions."""
    places = [i for i, row in enumerate(arms[0].result.rows) if row.image == image]
    lines = []
    frames: list[tuple[tuple[int, int, int, int], str, bool]] = []
    for place in places:
        rows: list[Verdict] = [arm.result.rows[place] for arm in arms]
        truth = rows[0]
        question = truth.question.replace("<image>", "").strip()
        lines.append(
            {
                "question": question,
                "answer": answer_text(truth.answer),
                "cells": [(answer_text(row.prediction), row.correct) for row in rows],
            }
        )
        if truth.family == "locating" and not frames:
            drawn = [(box_cells(row.prediction), figures.COLOURS[i % len(figures.COLOURS)], False) for i, row in enumerate(rows)]
            drawn.append((box_cells(truth.answer), "#ffffff", True))
            frames = [(box, colour, dashed) for box, colour, dashed in drawn if box is not None]
    return {"svg": scene_svg(data_uri(open_image(world / "images" / image)), frames, (RULER, RULER)), "rows": lines}
