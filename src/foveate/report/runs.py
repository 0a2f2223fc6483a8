"""Read what a training run has logged, stage by stage, for tables and plots."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from foveate.errors import FoveateError
from foveate.evaluation.evaluate import Result


@dataclass(frozen=True)
class Point:
    """One logged step. `seconds` and `flops` are since the start of the stage; `layers` is visual tokens per image in each LM layer;
    `sources` the loss of each source that had samples, where the stage mixes several; `figures` those of each task that was asked then,
    headline first."""

    step: int
    loss: float
    seconds: float
    flops: float
    tokens: float
    layers: tuple[float, ...]
    reducer: str
    sources: dict[str, float] = field(default_factory=dict)
    figures: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """The steps of a stage that ran under one reducer, from the first to the last of them."""

    reducer: str
    first: int
    last: int
    layers: tuple[float, ...]


@dataclass(frozen=True)
class StageLog:
    """One stage of a run. `images` is how many it has seen."""

    name: str
    points: list[Point]
    images: int

    @property
    def seconds(self) -> float:
        return self.points[-1].seconds

    @property
    def flops(self) -> float:
        return self.points[-1].flops

    @property
    def tokens(self) -> float:
        """Visual tokens per image as they leave the bridge, mean over the steps."""
        return self._mean(lambda point: point.tokens)

    @property
    def layer_tokens(self) -> float:
        """Visual tokens per image in a layer of the language model, mean over layers and steps."""
        return self._mean(lambda point: sum(point.layers) / len(point.layers))

    @property
    def parts(self) -> list[Part]:
        """One part for each reducer, in the order of their beginnings. Steps between two logged ones count to the later."""
        parts: dict[str, Part] = {}
        before = 0
        for point in self.points:
            known = parts.get(point.reducer)
            parts[point.reducer] = Part(point.reducer, known.first if known else before + 1, point.step, point.layers)
            before = point.step
        return list(parts.values())

    def _mean(self, of: Callable[[Point], float]) -> float:
        """Mean over the steps: a logged step stands for itself and the unlogged ones before it."""
        steps = [0, *(point.step for point in self.points)]
        return sum(of(point) * (step - before) for point, before, step in zip(self.points, steps, steps[1:], strict=False)) / steps[-1]


@dataclass(frozen=True)
class Arm:
    """One training run in a comparison: the folder that `foveate train` wrote and the evaluation of its final model."""

    name: str
    description: str
    run: Path
    result: Result


def read_log(run: str | Path) -> list[StageLog]:
    """The stages of `run`/log.jsonl in the order in which they ran.

    Seconds and FLOPs are logged as totals of the whole run so far; here they count from the start of their stage. Where a resumed run has
    logged a step twice, the later line holds.
    """
    path = Path(run) / "log.jsonl"
    if not path.is_file():
        raise FoveateError(f"no training log at {path}; give the output folder of a `foveate train` run")
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            rows[row["stage"], int(row["step"])] = row
        except (ValueError, KeyError, TypeError) as error:
            raise FoveateError(f"{path}, line {number} is not a logged step: {error}") from error
    if not rows:
        raise FoveateError(f"{path} is empty: the run has not logged a step yet")
    stages = []
    seconds = flops = images = 0.0
    try:
        for name in dict.fromkeys(stage for stage, _ in rows):
            own = sorted((row for (stage, _), row in rows.items() if stage == name), key=lambda row: int(row["step"]))
            points = [
                Point(
                    step=int(row["step"]),
                    loss=float(row["loss"]),
                    seconds=row["seconds"] - seconds,
                    flops=row["flops"] - flops,
                    tokens=float(row["tokens_per_image"]),
                    layers=tuple(float(count) for count in row["visual_tokens_per_layer"]),
                    reducer=str(row["reducer"]),
                    sources={source: own["loss"] for source, own in row.get("sources", {}).items() if own["tokens"]},
                    figures=row.get("evaluation", {}),
                )
                for row in own
            ]
            stages.append(StageLog(name, points, int(own[-1]["images"] - images)))
            seconds, flops, images = own[-1]["seconds"], own[-1]["flops"], own[-1]["images"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FoveateError(f"{path}: a logged step lacks a value or has a wrong one: {error}") from error
    return stages


@dataclass(frozen=True)
class Mark:
    """An evaluation in the middle of a run: seconds of training and FLOPs from the run's beginning, and the figures of each task."""

    stage: str
    step: int
    seconds: float
    flops: float
    figures: dict[str, dict[str, float]]


def marks(stages: Sequence[StageLog]) -> list[Mark]:
    """The evaluations of a run, in order."""
    found, seconds, flops = [], 0.0, 0.0
    for stage in stages:
        asked = [point for point in stage.points if point.figures]
        found += [Mark(stage.name, point.step, seconds + point.seconds, flops + point.flops, point.figures) for point in asked]
        seconds, flops = seconds + stage.seconds, flops + stage.flops
    return found


@dataclass(frozen=True)
class StageBridge:
    """The bridge that a stage ended with, as its configuration, and the grid (rows, columns) of patches of its images."""

    name: str
    bridge: dict[str, Any]
    grid: tuple[int, int]


def read_bridges(run: str | Path) -> list[StageBridge]:
    """The bridges of the finished stages of a run, in order; none for a model that was not assembled by Foveate."""
    found = []
    for path in sorted(Path(run).glob("*/model/config.json"), key=lambda path: int(path.parts[-3].partition("-")[0])):
        config = json.loads(path.read_text(encoding="utf-8"))
        if "bridge" in config:
            side = config["image_size"] // config["vision_config"]["patch_size"]
            found.append(StageBridge(path.parts[-3].partition("-")[2], config["bridge"], (side, side)))
    return found


def split_stages(stages: list[StageLog]) -> tuple[list[StageLog], StageLog]:
    """Pre-training and fine-tuning: the last stage is the fine-tuning, all before it are pre-training."""
    if len(stages) < 2:
        raise FoveateError(f"a comparison needs a run with pre-training and fine-tuning, got one stage: {stages[0].name!r}")
    return stages[:-1], stages[-1]
