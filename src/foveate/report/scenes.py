"""Pictures of a scene on a page: the windows that a bridge's tokens come from, and the answers of several runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from markupsafe import Markup, escape

from foveate.bridges import build_bridge
from foveate.data.pixels import open_image
from foveate.evaluation.evaluate import Verdict
from foveate.inspect import figures
from foveate.inspect.words import answer_text
from foveate.report.page import data_uri
from foveate.report.runs import Arm, StageBridge, read_bridges
from foveate.world.questions import RULER, box_cells

Grid = tuple[int, int]
Box = tuple[int, int, int, int]


def windows(arms: Sequence[Arm], picture: str) -> list[dict[str, Any]]:
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


def _scales(picture: str, boxes: Sequence[Box], grid: Grid) -> list[dict[str, Any]]:
    """One picture for each size of window, in the order of the tokens."""
    sizes: dict[tuple[int, int], list[Box]] = {}
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


def scene_svg(picture: str, frames: Sequence[tuple[Box, str, bool]], grid: Grid) -> Markup:
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


def example(arms: Sequence[Arm], world: Path, image: str) -> dict[str, Any]:
    """A scene with every arm's answers to its questions."""
    places = [i for i, row in enumerate(arms[0].result.rows) if row.image == image]
    lines = []
    frames: list[tuple[Box, str, bool]] = []
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
