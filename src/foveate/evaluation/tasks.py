"""Tasks: questions about images with a metric, from the embedded world, a LLaVA-format file, or a Hugging Face data set on disk.

A task is named by `PATH[:option=value,...]`. A comma begins an option only where a name and "=" follow, so that a suffix may hold commas.

    scenes                      the embedded test scenes, drawn on the fly; `count=600`, `seed=100`, `size=128` (px of a side)
    FOLDER                      a world that `foveate data scenes` wrote: test.json, and images or clips
    FILE or FOLDER of rows      what `foveate.data.rows` reads: JSON, JSON lines, parquet, what datasets.save_to_disk wrote, a local clone
                                of a data set of the hub; LLaVA conversations (the last human turn asks, the gpt turn after it answers),
                                or rows with columns

| option | of | says | left out |
|---|---|---|---|
| `name` | all | what tables call it | the file's or folder's name |
| `limit` | all | ask about the first so many rows | all |
| `suffix` | all | text on a line of its own behind each question; "\\n" breaks a line | none |
| `max_new_tokens` | all | longest answer | the metric's |
| `families` | worlds | which to ask, such as `presence/count` | all |
| `metric` | data sets | how answers are scored, see `foveate.evaluation.metrics`, as are its own options | must be said |
| `images` | data sets | the folder that names of images and clips start from | only pictures inside of the data set |
| `split`, `config` | data sets | which split, of which configuration | the only one |
| `question`, `hint` | data sets | columns of the question and of text to put in front of it | `question`; no hint |
| `answer` | data sets | column of the reference or references | `answers`, `answer` |
| `image` | data sets | column of the picture or pictures | `image`, `images` |
| `video` | data sets | column of the clip or clips: names of films, or of folders with their frames | `video`, `videos` |
| `frames` | clips | which frames are shown (video.md), with colons for commas: `rate:fps=2:most=16` | `uniform:frames=8` |
| `id` | data sets | column of ids; `id=row` numbers the rows | `id`, `question_id`, `index`, else the number |
| `group` | data sets | column of categories | `category` |
| `options` | multiple choice | column of a list of options, or one column each: `a/b/c` | `options`, `choices`, else `A`, `B`, ... |

Options in columns are written behind the question as lines "A. text". All rows, images and clips are checked before a model
answers anything.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from glob import glob
from pathlib import Path
from typing import Any

from foveate.data.clips import ClipError
from foveate.data.footage import Footage
from foveate.data.pixels import Held, Picture, PictureError, open_image
from foveate.errors import FoveateError, readable
from foveate.evaluation.metrics.choice import LETTERS
from foveate.evaluation.metrics.scenes import Scenes
from foveate.evaluation.samples import Metric, Sample, Task
from foveate.evaluation.sources import each, embedded, of_families, of_rows, refuse, world_samples
from foveate.evaluation.spec import ALL, check_options, frames_of, limit_of, metric_of, read_spec, whole
from foveate.inference import progress_bar

EMBEDDED = "scenes"


def load_task(spec: str, progress: bool = True) -> Task:
    """The task of `PATH[:option=value,...]`, as the module says, checked as a whole.

    FoveateError for a path that is not there, an unknown option or metric, an empty data set, and for rows without a field, an answer or a
    readable image, all of them counted and the first ones named.
    """
    where, given = read_spec(spec)
    new = whole(given, "max_new_tokens", 1, 0)
    path = Path(where).expanduser()
    metric: Metric = Scenes()
    if where == EMBEDDED:
        check_options(spec, given, ALL | {"families", "count", "seed", "size"})
        samples = of_families(embedded(given, progress), given)
    elif "metric" not in given and (path / "test.json").is_file():
        check_options(spec, given, ALL | {"families", "frames"})
        samples = of_families(world_samples(path, frames=frames_of(given)), given)
    elif path.exists() or any(glob(str(path))):
        metric = metric_of(spec, given)
        samples = of_rows(path, given, metric)
    else:
        raise FoveateError(f"no such task: {where}; a task is PATH[:option=value,...], or {EMBEDDED} for the embedded test scenes")
    samples = samples[: limit_of(given)]
    ids = Counter(sample.id for sample in samples)
    twice = [name for name, count in ids.items() if count > 1]
    if twice:
        raise FoveateError(f"{where}: {len(twice)} ids stand for several samples, such as {twice[0]!r}; name others with id=, or id=row")
    looks = _look_at_all(where, samples, progress)
    if metric.needs_size:
        samples = [replace(s, extra={**s.extra, "size": looks[s.images[0]].size}) if s.images else s for s in samples]
    samples = metric.arrange(each(where, samples, metric.complete, lambda sample: sample.id))
    suffix = given.get("suffix", "").replace("\\n", "\n")
    asked = tuple(replace(sample, question=prompt_of(sample, suffix)) for sample in samples)
    name = given.get("name", path.name if path.is_dir() else path.stem)
    return Task(name, asked, metric, new or metric.new_tokens, _hash(asked, looks))


def prompt_of(sample: Sample, suffix: str) -> str:
    options = [f"{letter}. {text}" for letter, text in zip(LETTERS, sample.extra.get("options", ()), strict=False)]
    return "\n".join([sample.question, *options, *([suffix] if suffix else [])])


# ---- checks ----------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Look:
    """What the file of an image or clip says: hash of its bytes and (width, height), or why it cannot be read."""

    digest: str = ""
    size: tuple[int, int] = (0, 0)
    reason: str = ""


def _look(ref: Picture | Footage) -> _Look:
    digest, size = hashlib.sha256(), (0, 0)
    try:
        if isinstance(ref, Footage):
            for frame in ref.frames():  # each of them can be shown
                size = frame.size
            digest.update(f"{ref.rule}\n".encode())
            for file in sorted(ref.path.iterdir()) if ref.path.is_dir() else [ref.path]:
                if file.is_file():
                    with file.open("rb") as opened:
                        digest.update(hashlib.file_digest(opened, "sha256").digest())
        else:
            size = open_image(ref).size
            digest.update(ref.content if isinstance(ref, Held) else ref.read_bytes())
    except (PictureError, ClipError, OSError) as error:
        return _Look(reason=getattr(error, "reason", str(error)))
    return _Look(digest.hexdigest(), size)


def _look_at_all(where: str, samples: Sequence[Sample], progress: bool) -> dict[Any, _Look]:
    refs = list(dict.fromkeys(ref for sample in samples for ref in (*sample.images, *sample.clips)))
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool, progress_bar(progress) as bar:
        looks = dict(zip(refs, bar.track(pool.map(_look, refs), total=len(refs), description="checking images"), strict=True))
    bad = [f"{readable(_name(ref))} {look.reason}" for ref, look in looks.items() if look.reason]
    clips = any(isinstance(ref, Footage) for ref in refs)
    refuse(where, "images and clips" if clips else "images", bad, len(refs))
    return looks


def _name(ref: Picture | Footage) -> str:
    return ref.name if isinstance(ref, Held) else str(ref.path if isinstance(ref, Footage) else ref)


def _hash(samples: Sequence[Sample], looks: Mapping[Any, _Look]) -> str:
    digest = hashlib.sha256()
    for sample in samples:
        images = [looks[ref].digest for ref in sample.images]
        asked = [sample.id, images, sample.question, sample.answers, sample.group, dict(sample.extra)]
        asked += [[looks[clip].digest for clip in sample.clips]] if sample.clips else []
        digest.update(json.dumps(asked, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()
