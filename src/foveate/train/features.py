"""Features of a stage's frozen tower: how much they take on disk, agreed to before the first step, and the encoding of what is missing."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.func import functional_call

from foveate.data.features import FeatureStore, Shape, crop_digest, facts_of, fill
from foveate.data.pixels import open_image, outline
from foveate.errors import FoveateError
from foveate.tokens import ImagePlan
from foveate.train.bf16_copy import halved
from foveate.train.mixture import Mixture
from foveate.train.opening import Opened
from foveate.train.progress import QUIET_EVERY
from foveate.train.samples import StageData, order_of
from foveate.train.schedule import stage_steps
from foveate.train.settings import Features, Recipe, Stage
from foveate.train.sizes import written
from foveate.train.stages import Setup, naming

THREADS = 8


@dataclass(frozen=True, order=True)
class Place:
    """Where a crop is found: among the samples held back or not, in which sample, which picture of it, and which crop of that."""

    held: bool
    item: int
    picture: int
    crop: int


@dataclass(frozen=True)
class Wanted:
    """The crops whose features a stage reads, by digest, in the order of its samples; `tower`: how many stages before train it."""

    setup: Setup
    features: Features
    data: StageData
    shape: Shape
    crops: Mapping[bytes, Place]
    tower: int

    @property
    def shares_with(self) -> tuple[Any, ...]:
        """The same for stages that read the same store, as far as that is known before any weight is there."""
        config, stage = self.setup.config, self.setup.stage
        layers = tuple(config.vision_feature_layer)
        return self.tower, config.image_size, layers, self.shape, stage.precision, self.features.cache, self.features.storage


# ---- before the first step -------------------------------------------------------------------------------------------------------------


def look_through(recipe: Recipe, setups: Sequence[Setup], data: Sequence[StageData], state: PartialState, done: int) -> list[Wanted | None]:
    """What each stage behind stage `done` reads of a cache, said and held against its limits. FoveateError for one that takes more."""
    found: list[Wanted | None] = []
    for index, (setup, samples) in enumerate(zip(setups, data, strict=True)):
        tower = sum(earlier.stage.train.tower for earlier in setups[:index])
        features = setup.stage.features
        if features is None or index <= done:
            found.append(None)
            continue
        with naming(setup.stage):
            refuse_shapes(setup.config)
            crops = crops_of(recipe, setup, samples, state)
        found.append(Wanted(setup, features, samples, shape_of(recipe, setup), crops, tower))
    for wanted in found:
        if wanted is not None:
            with naming(wanted.setup.stage):
                agree(wanted, [other for other in found if other is not None], state)
    return found


def refuse_shapes(config: Any) -> None:
    """FoveateError for a tiling whose views have no one shape."""
    if config.tiled is not None and config.tiled.shapes:
        raise FoveateError(f"features of views of many shapes ({config.tiling}) cannot be kept; leave `features` out")


def shape_of(recipe: Recipe, setup: Setup) -> Shape:
    """What the bridge gets of a crop: in the type of its weights, to which whatever the tower gives is cast."""
    config = setup.config
    dtype = torch.bfloat16 if setup.stage.precision == "bf16-copy" else getattr(torch, recipe.model.dtype)
    return Shape(len(config.vision_feature_layer), math.prod(config.grid), config.vision_config.hidden_size, dtype)


def agree(wanted: Wanted, all_wanted: Sequence[Wanted], state: PartialState) -> None:
    """Say what a stage's features take, and hold all that the run puts into that folder against the stage's limit."""
    features = wanted.features
    here = [other for other in all_wanted if other.features.cache == features.cache]
    total = 0
    for shared in dict.fromkeys(other.shares_with for other in here):
        crops = set().union(*(other.crops for other in here if other.shares_with == shared))
        total += wanted_size(next(other for other in here if other.shares_with == shared), len(crops))
    own = wanted_size(wanted, len(wanted.crops))
    levels = f"{wanted.shape.levels} x {wanted.shape.patches} x {wanted.shape.width}, {features.storage}"
    said = f"features of {len(wanted.crops):,} images ({levels}) take {written(own)} in {features.cache}"
    if total != own:
        said += f", those of all stages {written(total)}"
    if features.at_most is None:
        raise FoveateError(f"{said}: agree to that with features.at_most: {written(total, up=True)}")
    if total > features.at_most:
        raise FoveateError(
            f"{said}, more than features.at_most ({written(features.at_most)}): allow {written(total, up=True)}, take storage half or "
            "int8, or leave `features` out"
        )
    if state.is_main_process:
        print(f"stage {wanted.setup.stage.name}: {said}", file=sys.stderr, flush=True)


def wanted_size(wanted: Wanted, crops: int) -> int:
    return wanted.shape.size(crops, wanted.features.storage)


def crops_of(recipe: Recipe, setup: Setup, data: StageData, state: PartialState) -> dict[bytes, Place]:
    """The crops of all images that a stage reads, each once; the processes share the reading of their files."""
    items = [(False, item) for item in items_read(recipe, setup.stage, data.train)]
    items += [(True, item) for item in range(len(data.validation))] if data.validation is not None else []

    def look(at: tuple[bool, int]) -> list[tuple[Place, bytes]]:
        held, item = at
        found = []
        shown = [outline(picture) for picture in pictures(data, held, item)]
        plans = setup.config.plan_images([(seen.height, seen.width) for seen in shown])
        for number, (seen, plan) in enumerate(zip(shown, plans, strict=True)):
            found += [(Place(held, item, number, at), crop_digest(seen.digest, crop.recipe)) for at, crop in enumerate(plan.crops)]
        return found

    mine = items[state.process_index :: state.num_processes]
    found: list[tuple[Place, bytes]] = []
    with told(setup.stage, state) as tell, ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, len(mine), 1024):
            for crops in pool.map(look, mine[start : start + 1024]):
                found += crops
            tell("reading", min(start + 1024, len(mine)), len(mine))
    first: dict[bytes, Place] = {}
    for place, digest in sorted(gather_object(found)):
        first.setdefault(digest, place)
    return first


def items_read(recipe: Recipe, stage: Stage, samples: Mixture) -> list[int]:
    """Samples that the steps of a stage read; all of them where one may have to stand in for another."""
    steps = stage_steps(len(samples), stage.batch_size, epochs=stage.epochs, steps=stage.steps)
    whole = samples.drawn() is None and steps * stage.batch_size >= len(samples)
    if whole or any(source.on_bad_sample == "skip" for source in stage.sources):
        return list(range(len(samples)))
    order = order_of(recipe, stage, samples)
    return [int(item) for item in np.unique(np.concatenate([order.batch(step) for step in range(steps)]))]


def pictures(data: StageData, held: bool, item: int) -> list[Any]:
    samples = data.validation if held else data.train
    assert samples is not None
    return samples.pictures(item)


# ---- the tower -------------------------------------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """A model's way from pixels to features with the tower alone as its part."""

    def __init__(self, core: Any) -> None:
        super().__init__()
        self.tower = core.vision_tower
        self._encode = core.encode_crops

    def forward(self, pixel_values: Tensor) -> Tensor:
        features: Tensor = self._encode(pixel_values)
        return features


def open_features(wanted: Wanted, opened: Opened, state: PartialState) -> FeatureStore:
    """The store of a stage with all that it reads. From then on its samples have outlines in the place of images.

    FoveateError for a tower that makes other features in training, by dropout or by norms over the batch."""
    stage, config, processor = wanted.setup.stage, opened.model.config, opened.processor
    encoder = Encoder(opened.model.model)
    facts = facts_of(encoder.tower, config.vision_feature_layer, config.image_size, processor.image_processor, stage.precision)
    store = FeatureStore(wanted.features.cache, facts, wanted.shape, wanted.features.storage)

    def load(place: Place) -> Tensor:
        images = [open_image(picture) for picture in pictures(wanted.data, place.held, place.item)]
        plan = processor.plan_images([(image.height, image.width) for image in images])[place.picture]
        pixels: Tensor = processor.pixels([images[place.picture]], [only(plan, place.crop)], return_tensors="pt")["pixel_values"][0]
        return pixels

    def encode(pixels: Tensor) -> Sequence[Tensor]:
        return run(encoder, pixels.to(state.device), stage.precision).to(wanted.shape.dtype).unbind(1)

    training, device = encoder.tower.training, next(encoder.tower.parameters()).device
    encoder.to(state.device)
    begun = time.monotonic()
    with naming(stage), torch.no_grad():
        refuse_noise(encoder, config, stage.precision, state)
        encoder.eval()
        with told(stage, state) as tell:
            count = fill(store, wanted.crops, load, encode, share=(state.process_index, state.num_processes), progress=tell)
    encoder.train(training).to(device)
    count = sum(gather_object([count]))
    store.refresh()
    if state.is_main_process:
        seconds = f", {count:,} of them encoded now in {time.monotonic() - begun:.0f} s" if count else ", all of them there"
        print(f"stage {stage.name}: tower: from cache, {len(wanted.crops):,} images{seconds} ({store.folder})", file=sys.stderr, flush=True)
    wanted.data.train.show(outline)
    if wanted.data.validation is not None:
        wanted.data.validation.show = outline
    return store


def only(plan: ImagePlan, crop: int) -> ImagePlan:
    """The plan with one of its crops alone."""
    return replace(plan, crops=(plan.crops[crop],))


def run(encoder: Encoder, pixels: Tensor, precision: str, buffers: Mapping[str, Tensor] | None = None) -> Tensor:
    """Features in the precision in which the stage calls its model."""
    values = dict(buffers or {})
    if precision == "bf16-copy":
        values |= {name: parameter.to(torch.bfloat16) for name, parameter in halved(encoder).items()}
    halves = {"bf16": torch.bfloat16, "fp16": torch.float16}
    with torch.autocast(pixels.device.type, halves.get(precision), enabled=precision in halves):
        features: Tensor = functional_call(encoder, values, (pixels,))
    return features


def refuse_noise(encoder: Encoder, config: Any, precision: str, state: PartialState) -> None:
    shape = 2, getattr(config.vision_config, "num_channels", 3), config.image_size, config.image_size
    pixels = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(state.device)
    made = []
    with torch.random.fork_rng():
        for training in (False, True):  # on copies of the buffers, which norms over the batch would change
            buffers = {name: value.clone() for name, value in encoder.named_buffers()}
            made.append(run(encoder.train(training), pixels, precision, buffers))
    if not torch.equal(*made):
        raise FoveateError(
            "the tower makes other features in training than in evaluation, by dropout or by norms over the batch, so that they cannot be "
            "kept; set its dropout to 0, or leave `features` out"
        )


# ---- what is seen of it ----------------------------------------------------------------------------------------------------------------


@contextmanager
def told(stage: Stage, state: PartialState) -> Iterator[Any]:
    """A function that takes (task, done, total) and shows it: a bar on a terminal, a line every ten seconds elsewhere."""
    console, last = Console(stderr=True), [time.monotonic()]
    columns = (TextColumn(f"stage {stage.name}: {{task.description}}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    shown = state.is_main_process and console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=not shown) as bar:
        tasks: dict[str, Any] = {}

        def tell(task: str, done: int, total: int) -> None:
            if task not in tasks:
                tasks[task] = bar.add_task(task, total=total)
            bar.update(tasks[task], completed=done)
            if state.is_main_process and not shown and time.monotonic() - last[0] > QUIET_EVERY:
                last[0] = time.monotonic()
                print(f"stage {stage.name}: {task} {done:,} of {total:,}", file=sys.stderr, flush=True)

        yield tell
