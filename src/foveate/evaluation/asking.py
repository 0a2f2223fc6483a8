"""A task put to a model under reducers: which samples are asked together, and what was answered at which cost."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, Self

from PIL import Image

from foveate.accounting import Ledger
from foveate.accounting.predict import observed
from foveate.cache_policies import CachePolicy
from foveate.data.chat import takes_videos
from foveate.data.clips import Clip
from foveate.data.footage import Footage, Still, framed, opened, placed, standing
from foveate.data.pixels import Picture
from foveate.engine.attach import attach
from foveate.engine.keeping import Kept, keeping
from foveate.engine.run import Run
from foveate.errors import FoveateError
from foveate.evaluation.cells import Answer, Cell
from foveate.evaluation.samples import Sample, Task, in_turn, picture
from foveate.inference import (
    Broken,
    answering,
    ask,
    loaded,
    marked,
    model_hash,
    prepared,
    prompts,
    resized,
    retiled,
    shrunk,
    warn_of_cut_thoughts,
)
from foveate.inference.strategies import Strategy
from foveate.inference.strategies import opened as searching
from foveate.reducers import Reducer, in_model, prepare

GREY = (127, 127, 127)
KEPT_BYTES = 2 << 30  # of encoded pictures; one of 576 tokens in a model 4,096 wide, in bfloat16, takes 5 MB


@dataclass(frozen=True)
class Put:
    """A sample as it is put to a model: its question with markers, and what stands for them, in order. A model without videos has the
    frames of clips among its images."""

    question: str
    images: tuple[Picture | Still, ...]
    clips: tuple[Footage, ...]

    @classmethod
    def of(cls, processor: Any, sample: Sample) -> Self:
        images, clips = sample.images, sample.clips
        text = marked(placed(sample.question, standing([sample.question], len(images), len(clips))), len(images), len(clips))
        if not clips or takes_videos(processor):
            return cls(text, images, clips)
        frames = [[Still(clip, number) for number in range(len(clip))] for clip in clips]
        [(_, text)], shown = framed([("user", text)], list[Picture | Still](images), frames)
        return cls(text, tuple(shown), ())


@dataclass(frozen=True)
class Asked:
    """A task with its prompts, what they are about, what tells the samples' pictures apart, and which samples are asked together."""

    task: Task
    prompts: list[str]
    puts: list[Put]
    pictures: list[str]
    batches: list[list[int]]

    @classmethod
    def of(cls, processor: Any, task: Task, batch_size: int) -> Self:
        puts = [Put.of(processor, sample) for sample in task.samples]
        texts = prompts(processor, [one.question for one in puts], [len(one.images) for one in puts])
        names = [picture(sample) for sample in task.samples]
        return cls(task, texts, puts, names, batches(task.samples, names, batch_size))


@dataclass
class Answered:
    """What was answered to a task's samples, and at which cost.

    texts      of the samples, in their order
    entered    image tokens in each prompt, prompts in the order of the batches, as in `visual`
    visual     visual tokens of each prompt in each decoder layer, (samples, layers); nothing where nothing was attached
    totals     visual tokens of each batch in each decoder layer, (batches, layers), as they went through it
    ledgers    of each batch; None where the model's cost is not known
    cut        answers that are thoughts which were cut off
    """

    texts: list[str]
    entered: list[int] = field(default_factory=list)
    visual: list[tuple[int, ...]] = field(default_factory=list)
    totals: list[list[int]] = field(default_factory=list)
    ledgers: list[Ledger | None] = field(default_factory=list)
    cut: int = 0
    seconds: float = 0.0

    def cell(self, asked: Asked, empty: Cell) -> Cell:
        """The empty cell with these answers, scored."""
        samples, metric, n = asked.task.samples, asked.task.metric, len(self.texts)
        scores = [float(metric.score(text, sample)) for text, sample in zip(self.texts, samples, strict=True)]
        known = [ledger for ledger in self.ledgers if ledger is not None] if None not in self.ledgers else []
        return replace(
            empty,
            answers=[
                Answer(sample.id, name, sample.group, text, score)
                for sample, name, text, score in zip(samples, asked.pictures, self.texts, scores, strict=True)
            ],
            visual_tokens=[sum(layer) / n for layer in zip(*self.totals, strict=True)],
            flops={part: sum(ledger.flops[part] for ledger in known) / n for part in (known[0].flops if known else ())},
            kv_bytes=sum(sum(ledger.kv_bytes) for ledger in known) / n,
            kv_stays=sum(sum(ledger.kv_stays or ledger.kv_bytes) for ledger in known) / n,
            seconds=self.seconds,
            summary=metric.summary(samples, self.texts, scores),
        )


class Engine(ABC):
    """Whoever answers tasks.

    name       of the engine
    model      its name: a folder, a hub name or an asset
    processor  the model's
    dtype      of its weights, such as "float32"
    device     "cpu", "cuda", …
    told       how the command line says it
    """

    name: str
    model: str
    processor: Any
    dtype: str
    device: str
    told: Sequence[str] = ()

    def hash(self) -> str:
        return model_hash(self.model)

    @abstractmethod
    def check(self, reducers: Sequence[Reducer], cache: CachePolicy | None) -> None:
        """FoveateError with the reason where the engine can run these on no model."""

    @abstractmethod
    def answered(
        self, asked: Asked, reducers: Sequence[Reducer], tell: Callable[[int], None], *, cache: CachePolicy | None, blind: bool
    ) -> Answered:
        """As the function `answered`."""

    @abstractmethod
    def close(self) -> None:
        """Gives back what the engine holds."""


class Here(Engine):
    """A model in this process: named, or loaded already and given with its processor.

    What it makes of pictures is kept for the next methods, and counts for the seconds that it took the first of them."""

    name = "transformers"

    def __init__(self, given: Any, processor: Any, call: str, device: str | None, dtype: str | None = None) -> None:
        self._given, self.told = given, [] if dtype is None else ["--dtype", dtype]
        self._kept = Kept(KEPT_BYTES)
        self.loaded, self.processor, self.model = loaded(given, processor, call, device, dtype)
        self.dtype, self.device = str(self.loaded.dtype).removeprefix("torch."), self.loaded.device.type

    def fit(self, tiling: str | None, image_size: int | None) -> None:
        """Has pictures cut and sized so, see `retiled` and `resized`; None leaves it."""
        retiled(self.loaded, self.processor, tiling)
        self.processor = resized(self.processor, image_size)

    def hash(self) -> str:
        return model_hash(self._given)

    def check(self, reducers: Sequence[Reducer], cache: CachePolicy | None) -> None:
        """Nothing is refused: what a method needs, the model has to show."""

    def answered(
        self, asked: Asked, reducers: Sequence[Reducer], tell: Callable[[int], None], *, cache: CachePolicy | None, blind: bool
    ) -> Answered:
        before = self._kept.seconds
        with answering(self.loaded), keeping(self.loaded, self._kept):
            found = answered(self.loaded, self.processor, asked, reducers, tell, cache=cache, blind=blind)
        found.seconds += self._kept.seconds - before
        return found

    def close(self) -> None:
        """Nothing is given back: a loaded model is its owner's."""


def limited(task: Task, limit: int | None) -> Task:
    """About `limit` questions of a task, its groups in turn. Pictures are taken with all of their questions, which some metrics belong to
    together, so that there may be a few more."""
    if limit is None or limit >= len(task.samples):
        return task
    if limit < 1:
        raise FoveateError(f"limit must be at least 1 question, got {limit}")
    pictures: dict[str, list[int]] = {}
    for number, sample in enumerate(task.samples):
        pictures.setdefault(picture(sample), []).append(number)
    every = list(pictures.values())
    chosen: list[int] = []
    for at in in_turn([task.samples[numbers[0]].group for numbers in every]):
        if len(chosen) < limit:
            chosen += every[at]
    return replace(task, samples=tuple(task.samples[number] for number in sorted(chosen)))


def batches(samples: Sequence[Sample], pictures: Sequence[str], size: int) -> list[list[int]]:
    """Numbers of samples that are asked together: neighbours share their pictures and, within a picture, are of similar length. Questions
    without any, and those about clips, are asked by themselves, since not every processor takes all at once."""

    def kind(number: int) -> tuple[bool, tuple[int, ...]]:
        return bool(samples[number].images), tuple(map(len, samples[number].clips))

    def place(number: int) -> tuple[tuple[bool, tuple[int, ...]], str, int]:
        return kind(number), pictures[number], len(samples[number].question)

    found = []
    for _, numbers in groupby(sorted(range(len(samples)), key=place), key=kind):
        own = list(numbers)
        found += [own[at : at + size] for at in range(0, len(own), size)]
    return found


def answered(
    model: Any,
    processor: Any,
    asked: Asked,
    reducers: Sequence[Reducer],
    tell: Callable[[int], None] = lambda number: None,
    *,
    cache: CachePolicy | None = None,
    blind: bool = False,
    observe: bool = True,
) -> Answered:
    """Answers under the reducers and a cache policy, inside of `answering(model)`. `tell` hears of each batch how many samples have been
    answered.

    blind: every picture is replaced by a plain grey one of its size. observe: tokens and costs are counted, for which the model is
    attached to even where no reducer is.
    """
    samples = asked.task.samples
    found = Answered([""] * len(samples))
    start = time.perf_counter()
    processor, before = shrunk(processor, reducers)
    with attach(model, in_model(reducers), cache=cache) if observe else nullcontext() as run:
        for batch in asked.batches:
            puts = [asked.puts[number] for number in batch]
            place = {ref: k for k, ref in enumerate(dict.fromkeys(ref for one in puts for ref in one.images))}
            pictures = [prepare(before, image) for image in shown(place, blind)]
            films = {clip: prepared(before, footage(clip, blind)) for clip in dict.fromkeys(clip for one in puts for clip in one.clips)}
            owners, clips = [[place[ref] for ref in one.images] for one in puts], [[films[clip] for clip in one.clips] for one in puts]
            if run is not None:
                run.passes.clear()
            texts = [asked.prompts[number] for number in batch]
            answers = ask(model, processor, pictures, owners, texts, asked.task.max_new_tokens, clips)
            for number, text in zip(batch, answers.texts, strict=True):
                found.texts[number] = text
            found.entered += answers.placeholders
            found.cut += sum(answers.thinking)
            if run is not None:
                _observe(run, answers.lengths, model.dtype.itemsize, found)
            tell(len(batch))
    found.seconds = time.perf_counter() - start
    warn_of_cut_thoughts(found.cut, len(samples), asked.task.max_new_tokens)
    return found


def searched(
    model: Any,
    processor: Any,
    asked: Asked,
    reducers: Sequence[Reducer],
    strategy: Strategy,
    tell: Callable[[int], None] = lambda number: None,
    *,
    blind: bool = False,
) -> Answered:
    """As `answered`, each answer found by a strategy under the reducers. Tokens and costs are those of all its passes, one sample a batch,
    in the order of the samples. FoveateError for a sample that has not one image."""
    samples = asked.task.samples
    if any(sample.clips for sample in samples):
        raise FoveateError(f"{strategy} searches pictures, and {asked.task.name} asks about clips")
    found = Answered([""] * len(samples))
    start = time.perf_counter()
    with searching(model, processor, reducers) as eyes:
        for number, sample in enumerate(samples):
            pictures = list(shown(sample.images, blind))
            one = strategy.run(eyes, pictures, sample.question, new_tokens=asked.task.max_new_tokens)
            found.texts[number] = one.answer
            found.entered.append(one.visual_tokens)
            found.ledgers.append(one.ledger)
            if one.ledger is not None:
                found.visual.append(one.ledger.visual_tokens)
                found.totals.append(list(one.ledger.visual_tokens))
            tell(1)
    found.seconds = time.perf_counter() - start
    return found


def shown(refs: Iterable[Picture | Still], blind: bool) -> Iterator[Image.Image]:
    """Pictures of samples; `blind`: plain grey ones of their sizes. Broken where one cannot be read."""
    try:
        for image in opened(refs):
            yield Image.new("RGB", image.size, GREY) if blind else image
    except FoveateError as error:
        raise Broken(str(error)) from error


def footage(clip: Footage, blind: bool) -> Clip:
    """A clip of a sample; `blind`: of grey frames. Broken where it cannot be read."""
    try:
        found = clip.open()
    except FoveateError as error:
        raise Broken(str(error)) from error
    return replace(found, frames=tuple(Image.new("RGB", frame.size, GREY) for frame in found.frames)) if blind else found


def _observe(run: Run, lengths: list[int], dtype_bytes: int, found: Answered) -> None:
    """Adds the tokens and the cost of the batch just answered."""
    depth = len(run.anatomy.layers)
    if run.passes:
        found.visual += zip(*(layout.visual.sum(1).tolist() for layout in run.last.layouts), strict=True)
        found.totals.append(run.last.visual_tokens)
    else:
        found.visual += [(0,) * depth] * len(lengths)
        found.totals.append([0] * depth)
    try:
        if run.passes:
            found.ledgers.append(run.last.ledger(run.config, dtype_bytes=dtype_bytes))
        else:
            found.ledgers.append(observed(run.config, [[0] * len(lengths)] * depth, [lengths] * depth, images=0, dtype_bytes=dtype_bytes))
    except FoveateError:
        found.ledgers.append(None)
