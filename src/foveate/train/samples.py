"""What a stage reads: its samples, checked before the first step, what makes batches of them, and what it notes of them while it runs."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn, track
from torch import Tensor
from transformers import AutoTokenizer

from foveate.data.chat import Renderer
from foveate.data.collate import Collator, Cut, Fit, told
from foveate.data.conversations import MARKER, Conversations, cache_file, find_bad, refuse_or_skip, turns_of
from foveate.data.features import FeatureStore
from foveate.data.footage import FRAMES
from foveate.data.library import LibraryCollator, image_plan
from foveate.data.spelled import marked
from foveate.errors import FoveateError
from foveate.model.processing import FoveateProcessor, default_template
from foveate.tokens import ImagePlan
from foveate.train.mixture import Mixture, Part
from foveate.train.opening import Opened, open_processor
from foveate.train.order import Order, seed_of
from foveate.train.settings import Data, Recipe, Source, Stage
from foveate.train.stages import Setup, first_line, naming
from foveate.world import resolve

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StageData:
    train: Mixture
    validation: Conversations | None


def open_data(recipe: Recipe, setup: Setup, renderer: Renderer, state: PartialState) -> StageData:
    """What a stage trains on, and what it holds back."""
    stage, plan_image = setup.stage, planner(recipe, setup)
    share = setup.config.share if setup.assembled else None

    def opened(spec: Data, name: str) -> Conversations:
        fits = Fit(renderer, plan_image, stage.max_length, share, spells=setup.assembled)
        return open_samples(recipe, spec, name, fits, state, bool(stage.boxes))

    held = None if stage.validation is None else opened(stage.validation, f"{stage.name}-validation")
    several = len(stage.sources) > 1
    parts = []
    for source in stage.sources:
        name = f"{stage.name}+{re.sub(r'[^A-Za-z0-9._-]+', '-', source.label)}" if several else stage.name
        parts.append(Part(source.label, opened(source, name), source.on_bad_sample, source.share))
    mixture = Mixture(parts)
    with naming(stage):
        mixture.drawn()  # a share of nothing is told now
    return StageData(mixture, held)


def open_samples(recipe: Recipe, spec: Data, name: str, fits: Fit, state: PartialState, boxes: bool = False) -> Conversations:
    """Samples, each of them and each image checked; the processes share the work. `boxes`: whether they say what is where."""
    where = spec.conversations, spec.images, spec.dataset, spec.split, spec.limit, spec.config
    data = Conversations.open(*where, frames=spec.frames or FRAMES, films=fits.renderer.videos, boxes=boxes)
    if isinstance(spec, Source) and spec.samples is not None:
        data.index = chosen(len(data), spec.samples, recipe.seed, spec.label)
    rows = data.index.tolist()[state.process_index :: state.num_processes]
    columns = (TextColumn("checking {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not state.is_main_process) as bar:
        task = bar.add_task(data.source.name, total=len(rows))
        bad = find_bad(data.source, cache_file(data.source), rows, fits, lambda done, total: bar.update(task, completed=done))
    bad = sorted(gather_object(bad), key=lambda sample: sample.index)
    cut: list[Cut] = gather_object(fits.cut)
    if state.is_main_process and cut:
        log.warning("stage %s: %s", name, told(cut, data.name, len(data), fits.max_length))
    report = recipe.output / f"bad-samples-{name}.txt"
    refuse_or_skip(data, bad, spec.on_bad_sample, report if state.is_main_process else None)
    return data


def chosen(samples: int, most: int, seed: int, source: str) -> np.ndarray:
    """At most so many rows of a source, in order; those of a smaller number are among those of a greater."""
    return np.sort(np.random.RandomState(seed_of(seed, source, "samples")).permutation(samples)[:most])


def planner(recipe: Recipe, setup: Setup) -> Callable[..., ImagePlan]:
    """What becomes of an image of a height and width in a stage; at least one token where only training will show it."""
    if setup.assembled:
        plan_image: Callable[..., ImagePlan] = setup.config.plan_image
        return plan_image
    plan = image_plan(open_processor(recipe.model.checkpoint or "", recipe.model.chat_template)) or ImagePlan.whole(1)
    return lambda height, width: plan


def facts_of(data: StageData) -> dict[str, Any]:
    """What must not change about the data while a run goes on."""

    def of(samples: Conversations) -> dict[str, Any]:
        return {"data": samples.source.fingerprint, "samples": len(samples)}

    parts = data.train.parts
    found = {"sources": {part.name: of(part.samples) for part in parts}} if len(parts) > 1 else of(parts[0].samples)
    if data.validation is not None:
        found["validation"] = of(data.validation)
    return found


def open_renderer(recipe: Recipe) -> Renderer:
    """The chat format that the model will have. FoveateError if the language model has no image token and the recipe adds none."""
    spec = recipe.model
    if spec.checkpoint is not None:
        return Renderer(open_processor(spec.checkpoint, spec.chat_template))
    assert spec.text is not None
    try:
        tokenizer = AutoTokenizer.from_pretrained(resolve(spec.text))
    except (OSError, ValueError) as error:
        raise FoveateError(f"the tokenizer of {spec.text!r} could not be loaded: {first_line(error)}") from None
    if spec.add_image_token:
        tokenizer.add_tokens([MARKER], special_tokens=True)
    elif MARKER not in tokenizer.get_vocab():
        raise FoveateError(f"the tokenizer of {spec.text!r} has no token {MARKER!r}; set model.add_image_token: true to add it")
    template = default_template(tokenizer, MARKER, spec.chat_template)
    return Renderer(SimpleNamespace(tokenizer=tokenizer, chat_template=template, image_token=MARKER))


def make_collator(opened: Opened, max_length: int, remember: bool = False, features: FeatureStore | None = None) -> Any:
    """What makes batches for a Foveate model, or for one of the library."""
    if isinstance(opened.processor, FoveateProcessor):
        return Collator(opened.processor, max_length, remember, features)
    return LibraryCollator(opened.processor, max_length, opened.model.config.image_token_id)


def word_pieces(samples: Sequence[Conversations], collator: Collator) -> Tensor:
    """(W,) int64: the different word pieces of all answers, and of the names in place of them in rows that say what is where."""
    renderer, found = collator.renderer, set[int]()
    rows = [(data.source, int(index)) for data in samples for index in data.index]
    for source, index in track(rows, "reading words", console=Console(stderr=True), transient=True):
        row = source.row(index)
        boxes = source.boxes(row, len(source.images(row)))
        for name, _ in boxes:
            found.update(collator.pieces(name).tolist())
        if not boxes:  # nothing that is asked reaches into an answer
            turns = [(role, text if role == "assistant" else "?") for role, text in marked(turns_of(row), row)]
            tokens = renderer.encode(*renderer.render(turns))
            found.update(tokens.ids[tokens.supervised].tolist())
    return torch.tensor(sorted(found), dtype=torch.int64)


def order_of(recipe: Recipe, stage: Stage, samples: Mixture, budgets: Sequence[int] = ()) -> Order:
    """Which samples stand in which batch of a stage, and which of the `budgets` of visual tokens is drawn for it."""
    sizes = samples.sizes() if stage.group_by_length else None
    return Order(len(samples), stage.batch_size, recipe.seed, stage.name, sizes, samples.drawn(), budgets)


def notes(recipe: Recipe, stage: Stage) -> tuple[Path, Path]:
    """Where it is noted which samples were skipped in training, and what `max_length` cut off them."""
    return recipe.output / f"skipped-{stage.name}.txt", recipe.output / f"cut-{stage.name}.txt"


def report_notes(recipe: Recipe, stage: Stage, name: str, read: int) -> None:
    """What the notes of a finished stage, in which `read` samples were read, come to."""
    skipped, lost = notes(recipe, stage)
    if skipped.is_file():
        count = len(set(skipped.read_text(encoding="utf-8").splitlines()))
        log.warning("stage %s: %d samples turned out bad in training and were skipped (list: %s)", stage.name, count, skipped)
    if lost.is_file():
        rows = [Cut(*map(int, line.split())) for line in lost.read_text(encoding="utf-8").splitlines()]
        log.warning("stage %s: as read, %s", stage.name, told(rows, name, read, stage.max_length))
