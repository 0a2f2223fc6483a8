"""Blocks of rows -> their answers, a JSON line for each row: by transformers, or by whoever else can be asked."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from foveate.batch.parts import Alone, entry
from foveate.batch.questions import Questions
from foveate.data.chat import Renderer, takes_videos
from foveate.data.clips import Clip
from foveate.data.clips import parse as sampling
from foveate.data.conversations import Unusable
from foveate.data.footage import FRAMES, Still, framed, opened
from foveate.data.pixels import Picture
from foveate.engine.attach import attach
from foveate.errors import FoveateError
from foveate.inference import answering, ask, checked_dtype, load_model, model_hash, prepared, shrunk
from foveate.reducers import Reducer, in_model, parse, prepare, saved_reducers, spell
from foveate.world import resolve


@dataclass(frozen=True)
class Job:
    """What is to be done, by whichever engine.

    data            see `Questions`, which `images` goes to as well
    model           a folder, a hub name, or an asset
    reducers        a spelling; None: what the model's `foveate.json` says, if it has one
    max_new_tokens  of an answer
    batch_size      rows that are asked together, and written together
    dtype           one of `inference.loading.DTYPES`
    frames          the sampling that says which frames of clips are shown; None: `FRAMES`
    """

    data: str
    model: str
    reducers: str | None = None
    images: str | None = None
    max_new_tokens: int = 128
    batch_size: int = 16
    dtype: str = "float32"
    frames: str | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.max_new_tokens < 1:
            raise FoveateError(f"batch_size and max_new_tokens must be at least 1, got {self.batch_size} and {self.max_new_tokens}")
        if self.frames is not None:
            sampling(self.frames)
        checked_dtype(self.dtype)

    def questions(self) -> Questions:
        return Questions(self.data, self.images, FRAMES if self.frames is None else self.frames)

    @property
    def reducing(self) -> list[Reducer]:
        return (saved_reducers(resolve(self.model)) or []) if self.reducers is None else parse(self.reducers)

    def facts(self, questions: Questions) -> dict[str, Any]:
        """What tells the job apart from others."""
        told = {"data": self.data, "images": str(questions.folder), "model": self.model, "data_hash": questions.rows.fingerprint}
        told |= {"model_hash": model_hash(self.model), "reducers": spell(self.reducing)}
        told |= {} if self.frames is None else {"frames": str(sampling(self.frames))}
        return {**told, "rows": len(questions), "batch_size": self.batch_size, "dtype": self.dtype}


@dataclass(frozen=True)
class Prompt:
    """A row that can be asked: its number, the prompt as the template writes it, its pictures and their images, opened, among them the
    frames of clips where the model has no videos, and else its clips."""

    row: int
    text: str
    pictures: tuple[Picture | Still, ...]
    images: tuple[Image.Image, ...]
    clips: tuple[Clip, ...] = ()


class Answerer(ABC):
    """Answers rows of a job. `processor`: that of the model. `films`: whether clips can be shown to a model that has videos."""

    films = True

    def __init__(self, job: Job, processor: Any) -> None:
        self.job, self.processor = job, processor
        self.questions = job.questions()
        self._renderer = Renderer(processor)
        self._alone = Alone()

    @abstractmethod
    def said(self, prompts: Sequence[Prompt]) -> list[tuple[str, bool]]:
        """Of each prompt its answer, and whether that is a thought which was cut off."""

    def __call__(self, rows: Sequence[int]) -> str:
        """A line for each row. FoveateError for what is wrong with more than single rows."""
        told: dict[int, dict[str, Any] | FoveateError] = {}
        prompts = []
        for row in rows:
            try:
                prompts.append(self._prompt(row))
            except FoveateError as error:
                told[row] = error
        for prompt, found in zip(prompts, self._alone(self.said, prompts), strict=True):
            if isinstance(found, FoveateError):
                told[prompt.row] = found
                continue
            text, thinking = found
            cut = FoveateError(f"its answer is still a thought after {self.job.max_new_tokens} tokens; allow for more new tokens")
            told[prompt.row] = cut if thinking else {"answer": text}
        lines = [entry(row, self.questions.name(row), told[row]) for row in rows]
        return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)

    def _prompt(self, row: int) -> Prompt:
        question = self.questions[row]
        turns, pictures, clips = question.turns, list[Picture | Still](question.pictures), question.clips
        if clips and not takes_videos(self.processor):
            turns, pictures = framed(turns, pictures, [[Still(clip, number) for number in range(len(clip))] for clip in clips])
            clips = []
        if clips and not self.films:
            raise Unusable("is about a clip, which only the engine transformers shows to a model that has videos: leave out --engine")
        films = tuple(clip.open() for clip in clips)
        return Prompt(row, self._renderer.ask(turns), tuple(pictures), tuple(opened(pictures)), films)


class Attached(Answerer):
    """A model in this process, with the job's reducers attached."""

    def __init__(self, job: Job, device: str | None = None) -> None:
        self.model, processor = load_model(job.model, device, dtype=job.dtype)
        super().__init__(job, processor)
        self._processor, self._before = shrunk(processor, job.reducing)
        attach(self.model, in_model(job.reducing), record="none")

    def said(self, prompts: Sequence[Prompt]) -> list[tuple[str, bool]]:
        found: dict[int, tuple[str, bool]] = {}
        kinds = [(bool(prompt.images), tuple(len(clip.frames) for clip in prompt.clips)) for prompt in prompts]
        for kind in dict.fromkeys(kinds):  # not every processor takes all at once
            own = [prompt for prompt, of in zip(prompts, kinds, strict=True) if of == kind]
            images = {picture: image for prompt in own for picture, image in zip(prompt.pictures, prompt.images, strict=True)}
            place = {picture: number for number, picture in enumerate(images)}
            owners = [[place[picture] for picture in prompt.pictures] for prompt in own]
            shown = [prepare(self._before, image) for image in images.values()]
            films = [[prepared(self._before, clip) for clip in prompt.clips] for prompt in own]
            texts = [prompt.text for prompt in own]
            with answering(self.model):
                answers = ask(self.model, self._processor, shown, owners, texts, self.job.max_new_tokens, films)
            for prompt, text, thinking in zip(own, answers.texts, answers.thinking, strict=True):
                found[prompt.row] = text, thinking
        return [found[prompt.row] for prompt in prompts]


def absolute(where: str) -> str:
    """A file or folder by its whole name, for processes that start elsewhere; other names as they are."""
    path = Path(where).expanduser()
    return str(path.absolute()) if path.exists() else where
