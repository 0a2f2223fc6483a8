"""Tasks: questions about images with a metric, from the embedded world, a LLaVA-format file, or a Hugging Face data set on disk.

A task is named by `PATH[:option=value,...]`. A comma begins an option only where a name and "=" follow, so that a suffix may hold commas.

    scenes                      the embedded test scenes, drawn on the fly; `count=600`, `seed=100`, `size=128` (px of a side)
    FOLDER                      a world that `foveate data scenes` wrote: test.json and images
    FILE or FOLDER of rows      what `foveate.data.rows` reads: JSON, JSON lines, parquet, what datasets.save_to_disk wrote, a local clone
                                of a data set of the hub; LLaVA conversations (the last human turn asks, the gpt turn behind it answers),
                                or rows with columns

| option | of | says | left out |
|---|---|---|---|
| `name` | all | what tables call it | the file's or folder's name |
| `limit` | all | ask about the first so many rows | all |
| `suffix` | all | text on a line of its own behind each question; "\\n" breaks a line | none |
| `max_new_tokens` | all | longest answer | the metric's |
| `families` | worlds | which to ask, such as `presence/count` | all |
| `metric` | data sets | how answers are scored, see `foveate.evaluation.scorers`, as are its own options | must be said |
| `images` | data sets | the folder that names of images start from | only pictures inside of the data set |
| `split`, `config` | data sets | which split, of which configuration | the only one |
| `question`, `hint` | data sets | columns of the question and of text to put in front of it | `question`; no hint |
| `answer` | data sets | column of the reference or references | `answers`, `answer` |
| `image` | data sets | column of the picture or pictures | `image`, `images` |
| `id` | data sets | column of ids; `id=row` numbers the rows | `id`, `question_id`, `index`, else the number |
| `group` | data sets | column of categories | `category` |
| `options` | multiple choice | column of a list of options, or one column each: `a/b/c` | `options`, `choices`, else `A`, `B`, ... |

Options in columns are written behind the question as lines "A. text". All rows and images are checked before a model answers anything.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from glob import glob
from pathlib import Path
from typing import Any, Protocol, TypeVar

from PIL import Image

from foveate.data.conversations import IMAGES, MARKER, check_row, check_text, listed, other_media, pictures_of, turns_of
from foveate.data.pixels import Held, Picture, PictureError, open_image
from foveate.data.rows import Rows, open_rows
from foveate.errors import FoveateError, nearest, readable
from foveate.evaluation.metrics import FAMILIES
from foveate.evaluation.run import progress_bar, read_questions
from foveate.evaluation.scorers import METRICS, find, make
from foveate.evaluation.scorers.base import Scorer
from foveate.evaluation.scorers.choice import LETTERS
from foveate.evaluation.scorers.scenes import Scenes
from foveate.world.pictures import render
from foveate.world.scenes import conversation, world_scene

EMBEDDED = "scenes"
COUNT, SEED, SIZE = 600, 100, 128  # the scenes that the shipped model was tested on
LISTED = 20  # of the samples that cannot be asked, so many are named

_ALL = {"name", "limit", "suffix", "max_new_tokens"}
_COLUMNS: dict[str, tuple[str, ...]] = {
    "question": ("question",),
    "hint": (),
    "answer": ("answers", "answer"),
    "image": IMAGES,
    "id": ("id", "question_id", "index"),
    "group": ("category",),
}
_OPTIONS = ("options", "choices")

Item = TypeVar("Item")


@dataclass(frozen=True)
class Sample:
    """One question.

    id        unique within its task
    images    what `foveate.data.pixels.open_image` opens; may be empty
    question  the prompt's text, suffix included; it holds no image marker, or as many as there are images
    answers   the references, at least one
    group     family, category or subtask, for tables
    extra     what the metric needs beside: options, the question that a rotation belongs to, the image's size
    """

    id: str
    images: tuple[Picture, ...]
    question: str
    answers: tuple[str, ...]
    group: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)


class Metric(Protocol):
    """How answers are scored. `name` is what the task's option `metric=` says."""

    @property
    def name(self) -> str: ...

    def score(self, prediction: str, sample: Sample) -> float:
        """In 0..1."""

    def summary(self, samples: Sequence[Sample], predictions: Sequence[str], scores: Sequence[float]) -> dict[str, float]:
        """The figures of the whole task, the headline first, as percentages where they are shares."""


@dataclass(frozen=True)
class Task:
    """`hash`: SHA-256 over the samples and their images' bytes, so that two runs are known to have asked the same."""

    name: str
    samples: tuple[Sample, ...]
    metric: Metric
    max_new_tokens: int
    hash: str


def load_task(spec: str, progress: bool = True) -> Task:
    """The task of `PATH[:option=value,...]`, as the module says, checked as a whole.

    FoveateError for a path that is not there, an unknown option or metric, an empty data set, and for rows without a field, an answer or a
    readable image, all of them counted and the first ones named.
    """
    where, given = _read(spec)
    new = _whole(given, "max_new_tokens", 1, 0)
    path = Path(where).expanduser()
    metric: Scorer = Scenes()
    if where == EMBEDDED:
        _check_options(spec, given, _ALL | {"families", "count", "seed", "size"})
        samples = _of_families(_embedded(given, progress), given)
    elif "metric" not in given and (path / "test.json").is_file():
        _check_options(spec, given, _ALL | {"families"})
        rows = read_questions(path)
        world = [Sample(row.id, (path / "images" / row.image,), row.question, (row.answer,), row.family) for row in rows]
        samples = _of_families(world, given)
    elif path.exists() or any(glob(str(path))):
        metric = _metric(spec, given)
        samples = _of_rows(path, given, metric)
    else:
        raise FoveateError(f"no such task: {where}; a task is PATH[:option=value,...], or {EMBEDDED} for the embedded test scenes")
    samples = samples[: _limit(given)]
    ids = Counter(sample.id for sample in samples)
    twice = [name for name, count in ids.items() if count > 1]
    if twice:
        raise FoveateError(f"{where}: {len(twice)} ids stand for several samples, such as {twice[0]!r}; name others with id=, or id=row")
    looks = _look_at_all(where, samples, progress)
    if metric.needs_size:
        samples = [replace(s, extra={**s.extra, "size": looks[s.images[0]].size}) if s.images else s for s in samples]
    samples = metric.arrange(_each(where, samples, metric.complete, lambda sample: sample.id))
    suffix = given.get("suffix", "").replace("\\n", "\n")
    asked = tuple(replace(sample, question=_prompt(sample, suffix)) for sample in samples)
    name = given.get("name", path.name if path.is_dir() else path.stem)
    return Task(name, asked, metric, new or metric.new_tokens, _hash(asked, looks))


# ---- the task's text -------------------------------------------------------------------------------------------------------------------


def _read(spec: str) -> tuple[str, dict[str, str]]:
    where, *rest = re.split(r":(?=[a-z_]+=)", spec.strip(), maxsplit=1)
    given: dict[str, str] = {}
    for item in re.split(r",(?=\s*[a-z_]+=)", rest[0]) if rest else []:
        key, _, value = (part.strip() for part in item.partition("="))
        if key in given or not value:
            raise FoveateError(f"task {spec!r}: {key}= is {'there twice' if key in given else 'without a value'}")
        given[key] = value
    if not where:
        raise FoveateError(f"task {spec!r} names no data; a task is PATH[:option=value,...]")
    return where, given


def _check_options(spec: str, given: Mapping[str, str], known: set[str]) -> None:
    for name in given:
        if name not in known:
            raise FoveateError(f"task {spec!r} has no option {name!r}{nearest(name, known)}; its options are {', '.join(sorted(known))}")


def _whole(given: Mapping[str, str], name: str, least: int, default: int) -> int:
    if name not in given:
        return default
    if not given[name].isdecimal() or int(given[name]) < least:
        raise FoveateError(f"{name}={given[name]}: must be a whole number, at least {least}")
    return int(given[name])


def _limit(given: Mapping[str, str]) -> int | None:
    return _whole(given, "limit", 1, 0) or None


def _metric(spec: str, given: Mapping[str, str]) -> Scorer:
    if "metric" not in given:
        raise FoveateError(f"task {spec!r}: say how answers are scored, with metric= one of {', '.join(METRICS)}")
    kind = find(given["metric"])
    own = {option.name for option in fields(kind)}
    known = _ALL | set(_COLUMNS) | {"metric", "images", "split", "config"} | own
    _check_options(spec, given, known | {"options"} if kind.multiple_choice else known)
    return make(kind.name, {name: value for name, value in given.items() if name in own})


# ---- the embedded world ----------------------------------------------------------------------------------------------------------------


def _embedded(given: Mapping[str, str], progress: bool) -> list[Sample]:
    """The questions that `foveate data scenes` writes for the same numbers; the pictures' bytes are the same, too."""
    count, seed, size = _whole(given, "count", 1, COUNT), _whole(given, "seed", 0, SEED), _whole(given, "size", 32, SIZE)
    samples = []
    with progress_bar(progress) as bar:
        for index in bar.track(range(count), description="drawing scenes"):
            scene = world_scene(seed, "test", index)
            png = io.BytesIO()
            Image.fromarray(render(scene, size)).save(png, "PNG", compress_level=1)
            picture = Held(png.getvalue(), f"test/{index:06d}.png")
            for number, asked in enumerate(conversation(scene)):
                samples.append(Sample(f"test-{index:06d}-{number}", (picture,), asked.question, (asked.answer,), asked.family))
    return samples


def _of_families(samples: list[Sample], given: Mapping[str, str]) -> list[Sample]:
    wanted = given["families"].split("/") if "families" in given else list(FAMILIES)
    for family in wanted:
        if family not in FAMILIES:
            raise FoveateError(f"families=: unknown family {family!r}{nearest(family, FAMILIES)}; there are {', '.join(FAMILIES)}")
    kept = [sample for sample in samples if sample.group in wanted]
    if not kept:
        raise FoveateError(f"families={'/'.join(wanted)}: none of the {len(samples)} questions is of these families")
    return kept


# ---- data sets -------------------------------------------------------------------------------------------------------------------------


def _of_rows(path: Path, given: Mapping[str, str], metric: Scorer) -> list[Sample]:
    folder = Path(given["images"]).expanduser() if "images" in given else None
    if folder is not None and not folder.is_dir():
        raise FoveateError(f"images={folder}: no such folder")
    rows = open_rows(path, given.get("split"), given.get("config"), _limit(given))
    reader = _Reader(given, metric, folder)
    samples = _each(str(path), range(len(rows)), lambda number: reader.sample(number, rows[number]), lambda number: f"row {number}")
    if not any(sample.images for sample in samples):
        raise FoveateError(f"{path}: no row has a picture; name their column with image= (there are {', '.join(rows[0])})")
    reader.check_media(str(path), samples, rows)
    return samples


@dataclass(frozen=True)
class _Reader:
    """Makes samples of rows. `seen`: pictures inside of the data set by name, since one often belongs to many questions."""

    given: Mapping[str, str]
    metric: Scorer
    folder: Path | None
    seen: dict[str, Held] = field(default_factory=dict)

    def sample(self, number: int, row: Any) -> Sample:
        if not isinstance(row, dict):
            raise FoveateError(f"is no object: {str(row)[:80]!r}; the data must hold a list of objects, one for each question")
        images = self._pictures(row)
        if "conversations" in row and "question" not in self.given:
            question, answer = _talk(row, len(images))
            answer = self._needed(row, "answer") if "answer" in self.given else answer
        else:
            question, answer = self._needed(row, "question"), self._needed(row, "answer")
        if not isinstance(question, str) or not question.strip():
            raise FoveateError(f"its question is no text: {question!r}")
        hint = self._held(row, "hint")
        question = f"{hint}\n{question.strip()}" if hint else question.strip()
        options = self._options(row)
        markers = "".join((question, *options)).count(MARKER)
        if markers not in (0, len(images)):
            raise FoveateError(f"has {len(images)} images but {markers} {MARKER} markers")
        answers = tuple(text.strip() for text in self.metric.references(answer))
        if not any(answers):
            raise FoveateError("has no answer")
        name = None if self.given.get("id") == "row" else self._held(row, "id")
        group = self._held(row, "group")
        wrong = next(filter(None, map(check_text, (question, *answers, *options, str(name), str(group)))), "")
        if wrong:
            raise FoveateError(wrong)
        return Sample(
            id=str(number if name is None else name),
            images=images,
            question=question,
            answers=answers,
            group="" if group is None else str(group),
            extra={"options": options} if options else {},
        )

    def _held(self, row: Mapping[str, Any], option: str) -> Any:
        """What the row holds for an option's column; None if nothing. A column that was named must be there."""
        named = self.given.get(option)
        if named is not None and named not in row:
            raise FoveateError(f"has no field {named!r}{nearest(named, row)}; it has {', '.join(row)}")
        return next((row[name] for name in ([named] if named else _COLUMNS[option]) if row.get(name) is not None), None)

    def _needed(self, row: Mapping[str, Any], option: str) -> Any:
        value = self._held(row, option)
        if value is None:
            wanted = self.given.get(option) or " or ".join(_COLUMNS[option])
            raise FoveateError(f"has nothing in the field {wanted}; {option}= names another (it has {', '.join(row)})")
        return value

    def _pictures(self, row: Mapping[str, Any]) -> tuple[Picture, ...]:
        self._held(row, "image")  # a column that was named must be there
        found = pictures_of(row, self.folder, self.given.get("image"))
        return tuple(self.seen.setdefault(item.name, item) if isinstance(item, Held) else item for item in found)

    def check_media(self, where: str, samples: Sequence[Sample], rows: Rows) -> None:
        """That nothing but pictures is left out in silence, where nobody has said which column holds them."""
        if "image" in self.given:
            return
        known = {*self.given.values(), *LETTERS, *(name for names in _COLUMNS.values() for name in names)}
        problems = []
        for number, sample in enumerate(samples):
            lost = other_media(rows[number], len(sample.images), known)
            if lost:
                problems.append(f"{sample.id}: {lost}; or name the column of the pictures with image=")
        _refuse(where, "samples", problems, len(samples))

    def _options(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        if not self.metric.multiple_choice:
            return ()
        names = self.given["options"].split("/") if "options" in self.given else [name for name in _OPTIONS if row.get(name) is not None]
        missing = [name for name in names if name not in row]
        if missing:
            raise FoveateError(f"has no field {missing[0]!r}{nearest(missing[0], row)}; it has {', '.join(row)}")
        if not names or (len(names) > 1 and "options" in self.given):
            values = [row.get(name) for name in names or LETTERS]
            values = values[: next((at for at, value in enumerate(values) if _nothing(value)), len(values))]
        else:
            values = row[names[0]]
        if not isinstance(values, list) or not all(isinstance(value, str | int | float) for value in values):
            raise FoveateError(f"its options are not a list of texts: {str(values)[:80]!r}")
        return tuple(str(value) for value in values)


def _nothing(value: Any) -> bool:
    """Nothing, nothing but space, or the NaN that tables have in empty cells."""
    return value is None or value != value or not str(value).strip()


def _talk(row: Mapping[str, Any], images: int) -> tuple[str, str]:
    """The last question and its answer. Earlier turns are left out, and where the image stood there it stands in front."""
    row = listed(dict(row))
    wrong = check_row(row, images)
    if wrong:
        raise FoveateError(wrong)
    (_, question), (_, answer) = turns_of(row)[-2:]
    return (question if question.count(MARKER) == images else question.replace(MARKER, "")), answer


def _prompt(sample: Sample, suffix: str) -> str:
    options = [f"{letter}. {text}" for letter, text in zip(LETTERS, sample.extra.get("options", ()), strict=False)]
    return "\n".join([sample.question, *options, *([suffix] if suffix else [])])


# ---- checks ----------------------------------------------------------------------------------------------------------------------------


def _each(where: str, items: Sequence[Item], act: Callable[[Item], Sample], label: Callable[[Item], str]) -> list[Sample]:
    """What `act` makes of each item; one FoveateError for all that it refuses."""
    made, problems = [], []
    for item in items:
        try:
            made.append(act(item))
        except FoveateError as error:
            problems.append(f"{label(item)}: {error}")
    _refuse(where, "samples", problems, len(items))
    return made


def _refuse(where: str, what: str, problems: Sequence[str], total: int) -> None:
    if problems:
        more = f"\n  and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
        listed = "".join(f"\n  {problem}" for problem in problems[:LISTED])
        raise FoveateError(f"{where}: {len(problems)} of {total} {what} cannot be used:{listed}{more}")


@dataclass(frozen=True)
class _Look:
    """What an image's file says: hash of its bytes and (width, height), or why it cannot be read."""

    digest: str = ""
    size: tuple[int, int] = (0, 0)
    reason: str = ""


def _look(ref: Picture) -> _Look:
    try:
        size = open_image(ref).size
        content = ref.content if isinstance(ref, Held) else ref.read_bytes()
    except (PictureError, OSError) as error:
        return _Look(reason=getattr(error, "reason", str(error)))
    return _Look(hashlib.sha256(content).hexdigest(), size)


def _look_at_all(where: str, samples: Sequence[Sample], progress: bool) -> dict[Any, _Look]:
    refs = list(dict.fromkeys(ref for sample in samples for ref in sample.images))
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool, progress_bar(progress) as bar:
        looks = dict(zip(refs, bar.track(pool.map(_look, refs), total=len(refs), description="checking images"), strict=True))
    bad = [f"{readable(ref.name if isinstance(ref, Held) else str(ref))} {look.reason}" for ref, look in looks.items() if look.reason]
    _refuse(where, "images", bad, len(refs))
    return looks


def _hash(samples: Sequence[Sample], looks: Mapping[Any, _Look]) -> str:
    digest = hashlib.sha256()
    for sample in samples:
        images = [looks[ref].digest for ref in sample.images]
        asked = [sample.id, images, sample.question, sample.answers, sample.group, dict(sample.extra)]
        digest.update(json.dumps(asked, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()
