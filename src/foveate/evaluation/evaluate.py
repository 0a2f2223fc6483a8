"""`foveate eval`: one arm of a bench run on one world, with the figures of its families of questions beside their majority answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from foveate.data.clips import parse as sampling
from foveate.data.footage import FRAMES
from foveate.errors import FoveateError
from foveate.evaluation.asking import Asked, answered, searched
from foveate.evaluation.bench import BLIND, Arm
from foveate.evaluation.metrics.scenes import FAMILY_RULES, RULES, FamilyScore, Scenes, score_family
from foveate.evaluation.samples import Task
from foveate.evaluation.sources import world_samples
from foveate.files import write_json
from foveate.inference import answering, loaded, progress_bar
from foveate.inference.strategies import Strategy
from foveate.inference.strategies import parse as parse_strategy
from foveate.reducers import parse, saved_reducers, spell

Range = tuple[int, int]  # fewest, most


@dataclass(frozen=True)
class Verdict:
    """One question with its true answer, the model's answer and whether that is right."""

    id: str
    image: str
    family: str
    question: str
    answer: str
    prediction: str
    correct: bool


@dataclass(frozen=True)
class Result:
    """What a model answered.

    `visual_tokens`: per question, as they enter the language model; `layer_tokens`: per question in each of its layers, as observed, where
    reducers were attached; both are means over all questions, and the ranges hold the fewest and the most. `seconds`: wall clock of
    answering. `strategy`: what searched the images, whose tokens are those of all its passes; "" where each question was asked once.
    """

    model: str
    data: str
    reducers: str
    blind: bool
    visual_tokens: float
    layer_tokens: list[float] | None
    seconds: float
    families: dict[str, FamilyScore]
    rows: list[Verdict]
    visual_range: Range | None = None
    layer_ranges: list[Range] | None = None
    strategy: str = ""

    @property
    def mean(self) -> float:
        """Mean of the families' accuracies, each family counting the same."""
        return sum(score.accuracy for score in self.families.values()) / len(self.families)

    def save(self, path: str | Path) -> None:
        write_json(Path(path), {**asdict(self), "mean": self.mean})

    @classmethod
    def load(cls, path: str | Path) -> Result:
        """A result written by `save`; FoveateError if the file is not one."""
        try:
            raw = json.loads(Path(path).read_text(encoding="utf-8"))
            del raw["mean"]
            families = {name: FamilyScore(**score) for name, score in raw.pop("families").items()}
            if raw.get("visual_range") is not None:
                raw["visual_range"] = tuple(raw["visual_range"])
            if raw.get("layer_ranges") is not None:
                raw["layer_ranges"] = [tuple(ends) for ends in raw["layer_ranges"]]
            return cls(families=families, rows=[Verdict(**row) for row in raw.pop("rows")], **raw)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise FoveateError(f"{path} is not an evaluation result written by foveate eval --output: {error}") from error


def evaluate(
    model_or_dir: Any,
    data_dir: str | Path,
    *,
    processor: Any = None,
    reducers: Any = None,
    limit: int | None = None,
    batch_size: int = 64,
    max_new_tokens: int = 8,
    blind: bool = False,
    device: str | None = None,
    dtype: str | None = None,
    progress: bool = True,
    strategy: str | Strategy | None = None,
    frames: str = FRAMES,
) -> Result:
    """The answers to `data_dir`/test.json, greedy, scored per family.

    `model_or_dir`: a folder, hub name or "asset:" name (loaded in float32, or another `dtype`), or a loaded model together with its
    `processor`.
    `reducers`: what `foveate.attach` takes; left out, those that the model was saved with, if any ("none" is the bare model).
    `blind`: every image is replaced by a plain grey one of its size, which shows what the questions give away by themselves.
    `limit`: at most that many questions, all families in turn.
    `strategy`: how each image is searched for the answer, a spelling or a Strategy; unless given, each question is asked once.
    `frames`: which frames of clips are shown, a sampling of `foveate.data.clips`.
    FoveateError for a missing or empty folder, a broken test.json, an unknown family, an unreadable image, and logits that are not finite.
    """
    if batch_size < 1 or max_new_tokens < 1:
        raise FoveateError(f"batch_size and max_new_tokens must be at least 1, got {batch_size} and {max_new_tokens}")
    task = Task(str(data_dir), tuple(world_samples(data_dir, limit, str(sampling(frames)))), Scenes(), max_new_tokens, hash="")
    model, processor, name = loaded(model_or_dir, processor, "evaluate(model, data_dir, processor=...)", device, dtype)
    if reducers is None:
        reducers = saved_reducers(model.config.name_or_path)
    elif isinstance(reducers, str):
        reducers = parse(reducers)
    search = parse_strategy(strategy) if isinstance(strategy, str) else strategy
    reducers = list(reducers) if isinstance(reducers, list | tuple) else [reducers] if reducers is not None else []
    arm = Arm(BLIND if blind else spell(reducers), 1.0, None, tuple(reducers), blind=blind)
    asked = Asked.of(processor, task, batch_size)
    with answering(model), progress_bar(progress) as bar:
        tell = partial(bar.advance, bar.add_task("answering", total=len(task.samples)))
        if search is None:
            found = answered(model, processor, asked, arm.reducers, tell, blind=blind, observe=bool(reducers))
        else:
            found = searched(model, processor, asked, arm.reducers, search, tell, blind=blind)

    cell = found.cell(asked, arm.cell(task.name))
    images, clips = (f"{Path(data_dir) / name}/" for name in ("images", "clips"))
    rows = []
    for sample, said in zip(task.samples, cell.answers, strict=True):
        image, (answer,) = said.image.removeprefix(images).removeprefix(clips), sample.answers
        rows.append(Verdict(sample.id, image, sample.group, sample.question, answer, said.prediction, said.score == 1))
    families = {}
    for family in RULES:
        own = [row for row in rows if row.family == family]
        if own:
            families[family] = score_family(family, [row.prediction for row in own], [row.answer for row in own])
    layers = list(zip(*found.visual, strict=True))
    return Result(
        name,
        str(data_dir),
        spell(reducers),
        blind,
        sum(found.entered) / len(found.entered),
        [sum(counts) / len(counts) for counts in layers] or None,
        found.seconds,
        families,
        rows,
        (min(found.entered), max(found.entered)),
        [(min(counts), max(counts)) for counts in layers] or None,
        "" if search is None else str(search),
    )


def spread(mean: float, ends: Range | None) -> str:
    """A number of tokens, with its range where it is not always the same."""
    return f"{mean:.4g}" + (f" ({ends[0]} to {ends[1]})" if ends is not None and ends[0] != ends[1] else "")


def print_result(result: Result, console: Console | None = None) -> None:
    """Print the accuracy of each family beside its majority answer."""
    kind = "clip" if result.families.keys() - FAMILY_RULES.keys() else "image"
    what = f"reducers {result.reducers}, {spread(result.visual_tokens, result.visual_range)} visual tokens per {kind}"
    what += ", grey images" if result.blind else ""
    what += f"\nin all passes of {result.strategy}" if result.strategy else ""
    if result.layer_tokens is not None:
        ranges: Sequence[Range | None] = result.layer_ranges or [None] * len(result.layer_tokens)
        counts = map(spread, result.layer_tokens, ranges)
        what += "\nthrough the layers: " + ", ".join(f"{count} x{len(list(same))}" for count, same in groupby(counts))
    table = Table(title=f"{result.model} on {result.data}", title_justify="left", caption=what, caption_justify="left")
    for column in ("family", "n", "accuracy %", "95 % interval", "majority %", "majority answer"):
        table.add_column(column, justify="left" if column in ("family", "majority answer") else "right")
    for family, score in result.families.items():
        interval = f"{100 * score.low:.1f} to {100 * score.high:.1f}"
        majority = f"{100 * score.majority_accuracy:.1f}"
        table.add_row(family, str(score.n), f"{100 * score.accuracy:.1f}", interval, majority, escape(score.majority_answer))
    table.add_section()
    table.add_row("mean", str(len(result.rows)), f"{100 * result.mean:.1f}")
    (console or Console()).print(table)
