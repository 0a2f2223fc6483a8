"""Questions put to the model while it is trained: figures for the log, at no cost to what is trained, and the weights that did best."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import nn

from foveate.errors import FoveateError
from foveate.evaluation.asking import Asked, answered, limited
from foveate.evaluation.samples import Task
from foveate.evaluation.tasks import load_task
from foveate.files import write_json
from foveate.reducers import parse
from foveate.train import files
from foveate.train.scheduled import ScheduleCallback
from foveate.train.settings import Evaluate, Recipe, Stage
from foveate.train.stages import naming

BEST_NOTE = "best.json"

Figures = dict[str, dict[str, float]]  # of each task, as its metric has them, headline first


def open_tasks(recipe: Recipe, state: PartialState) -> list[list[Task]]:
    """What each stage is asked. FoveateError naming the stage for a task that cannot be read, and for a figure that it does not have."""
    read = lru_cache(maxsize=None)(lambda spec: load_task(spec, state.is_main_process))
    found = []
    for stage in recipe.stages:
        with naming(stage):
            tasks = [] if stage.evaluate is None else [limited(read(spec), stage.evaluate.limit) for spec in stage.evaluate.tasks]
            check(stage, tasks)
        found.append(tasks)
    return found


def check(stage: Stage, tasks: Sequence[Task]) -> None:
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        raise FoveateError(f"evaluate.tasks: each task needs a name of its own (name=...); got {', '.join(names)}")
    if stage.evaluate is not None and stage.evaluate.keep_best is not None:
        nothing = {t.name: t.metric.summary(t.samples, [""] * len(t.samples), [0.0] * len(t.samples)) for t in tasks}
        best_of(nothing, stage.evaluate.keep_best)


def best_of(figures: Figures, wanted: str) -> float:
    """The figure by which a model is the best: FIGURE of the only task, or TASK:FIGURE. FoveateError if there is none of that name."""
    every = {f"{task}:{name}": value for task, own in figures.items() for name, value in own.items()}
    if len(figures) == 1:
        every |= next(iter(figures.values()))
    if wanted not in every:
        raise FoveateError(f"evaluate.keep_best: no figure is called {wanted!r}; there are {', '.join(every)}")
    return every[wanted]


class Examiner:
    """Puts a stage's tasks to its model. `folder`: of the stage, where the best weights are kept until it ends. The processes share the
    questions, and all have the same figures then."""

    def __init__(self, spec: Evaluate, tasks: Sequence[Task], processor: Any, folder: Path, state: PartialState) -> None:
        self.spec, self.processor, self.folder = spec, processor, folder
        self.asked = [Asked.of(processor, task, spec.batch_size) for task in tasks]
        self.rank, self.world = state.process_index, state.num_processes

    @property
    def questions(self) -> int:
        """Of this process."""
        return sum(len(batch) for asked in self.asked for batch in asked.batches[self.rank :: self.world])

    def examine(self, model: nn.Module, switch: ScheduleCallback, tell: Callable[[int], None]) -> tuple[Figures, float]:
        """(figures, seconds) of the model as it is, in evaluation mode, under the stage's own reducers for it or else those of the moment.
        Random numbers, gradients and reducers are what they were after it."""
        own, begun = self.spec.own_reducers, time.monotonic()
        bare: AbstractContextManager[None] = nullcontext() if own is None else switch.away()
        figures = {}
        with aside(model), bare:
            for asked in self.asked:
                mine = replace(asked, batches=asked.batches[self.rank :: self.world])
                reducers = parse(own or "")
                found = answered(model, self.processor, mine, reducers, tell, observe=bool(reducers))
                numbers = [number for batch in mine.batches for number in batch]
                texts = dict(gather_object([(number, found.texts[number]) for number in numbers]))
                figures[asked.task.name] = scored(asked.task, [texts[number] for number in range(len(texts))])
        return figures, time.monotonic() - begun

    def keep(self, figures: Figures, stage: str, step: int, reducer: str, save: Callable[[str], None]) -> None:
        """Let `save` write the model's weights into a folder if they are better than those of every evaluation of the stage before."""
        if self.spec.keep_best is None:
            return
        value, own = best_of(figures, self.spec.keep_best), self.spec.own_reducers
        before = files.newest_best(self.folder)
        known = {} if before is None else best_note(before)
        if known.get("figure") == self.spec.keep_best and value <= known["value"]:
            return
        folder = self.folder / f"best-{step}"
        save(str(folder))
        note = {"stage": stage, "step": step, "figure": self.spec.keep_best, "value": value, "reducer": reducer if own is None else own}
        write_json(folder / BEST_NOTE, note)
        files.mark(folder)
        for other in files.bests(self.folder):
            if other != folder:
                files.remove(other)


def scored(task: Task, texts: Sequence[str]) -> dict[str, float]:
    scores = [float(task.metric.score(text, sample)) for text, sample in zip(texts, task.samples, strict=True)]
    return task.metric.summary(task.samples, texts, scores)


@contextmanager
def aside(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; after it the model is in training mode, and the random numbers go on where they were.

    Not `inference_mode`: what a model remembers of a forward pass may be read in the next step."""
    device = next(model.parameters()).device
    model.eval()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
            yield
    finally:
        model.train()


def best_note(best: Path) -> dict[str, Any]:
    """Which step of which stage these weights are of, and the figure that they were kept for."""
    found: dict[str, Any] = json.loads((best / BEST_NOTE).read_text(encoding="utf-8"))
    return found
