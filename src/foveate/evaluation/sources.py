"""Where samples come from: the embedded world, worlds on disk, and the rows of data sets."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from foveate.data.conversations import check_row, check_text, listed, other_media, pictures_of, turns_of
from foveate.data.footage import FRAMES, Footage, clips_of, markers
from foveate.data.pixels import Held, Picture
from foveate.data.rows import Rows, open_rows, read_json
from foveate.errors import FoveateError, nearest, readable
from foveate.evaluation.metrics.choice import LETTERS
from foveate.evaluation.metrics.scenes import RULES, check_truth
from foveate.evaluation.samples import Metric, Sample, in_turn
from foveate.evaluation.spec import COLUMNS, frames_of, limit_of, whole
from foveate.inference import progress_bar
from foveate.world.pictures import render
from foveate.world.scenes import conversation, world_scene

COUNT, SEED, SIZE = 600, 100, 128  # the scenes that the shipped model was tested on
LISTED = 20  # of the samples that cannot be asked, so many are named
_OPTIONS = ("options", "choices")
WORLD = (
    'A world is a folder with `images` or `clips` and with test.json, a list of {"id": "1", "image": a file in images, or "video": one in '
    f'clips, "family": one of {", ".join(RULES)}, "question": "...", "answer": "..."}}; '
    "`foveate data scenes FOLDER` makes one. Questions of any other "
    'kind about pictures of your own, a list of {"image": "a.jpg", "question": "...", "answer": "..."}, are asked by '
    "`foveate bench MODEL --tasks FILE.json:metric=exact,images=FOLDER --out RUN`"
)

Item = TypeVar("Item")


# ---- the embedded world ----------------------------------------------------------------------------------------------------------------


def embedded(given: Mapping[str, str], progress: bool) -> list[Sample]:
    """The questions that `foveate data scenes` writes for the same numbers; the pictures' bytes are the same, too."""
    count, seed, size = whole(given, "count", 1, COUNT), whole(given, "seed", 0, SEED), whole(given, "size", 32, SIZE)
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


# ---- worlds on disk -------------------------------------------------------------------------------------------------------------------


def world_samples(data_dir: str | Path, limit: int | None = None, frames: str = FRAMES) -> list[Sample]:
    """The checked rows of `data_dir`/test.json, in file order.

    With a limit: the first rows of every family, taken in turn, so that each family has its share. `frames`: the sampling of clips.
    """
    folder = Path(data_dir)
    if not folder.is_dir():
        raise FoveateError(f"no such data folder: {folder}; make one with `foveate data scenes {folder}`")
    path = folder / "test.json"
    if not path.is_file():
        raise FoveateError(f"{folder} has no test.json, so it is no world. {WORLD}")
    raw, _ = read_json(path)
    if not raw:
        raise FoveateError(f"{path} holds no questions; it must be a list with at least one")
    if limit is not None and limit < 1:
        raise FoveateError(f"limit must be at least 1 question, got {limit}")
    for number, item in enumerate(raw):
        _check_question(item, f"{path}, row {number}")
    for kind, place in (("image", "images"), ("video", "clips")):
        names = sorted({item[kind] for item in raw if _kind(item) == kind})
        there = os.path.isfile if kind == "image" else os.path.exists  # a clip may be a folder of frames
        missing = [name for name in names if not there(folder / place / name)]
        if missing:
            where = readable(str((folder / place).absolute() / missing[0]))
            raise FoveateError(
                f"{path}: {len(missing)} {kind}(s) are missing in {folder / place}, the first is {missing[0]}: no file {where}"
            )
    samples = [
        Sample(
            row["id"],
            (folder / "images" / row["image"],) if _kind(row) == "image" else (),
            row["question"],
            (row["answer"],),
            row["family"],
            clips=(Footage(folder / "clips" / row["video"], frames),) if _kind(row) == "video" else (),
        )
        for row in raw
    ]
    if limit is None:
        return samples
    return [samples[number] for number in sorted(in_turn([sample.group for sample in samples])[:limit])]


def _check_question(item: Any, where: str) -> None:
    if not isinstance(item, dict):
        raise FoveateError(f"{where}: expected an object, got {item!r}. {WORLD}")
    if isinstance(item.get("image"), str) and isinstance(item.get("video"), str):
        raise FoveateError(f"{where}: a question is about an image or a video, not about both. {WORLD}")
    names = ("id", _kind(item), "family", "question", "answer")
    for name in names:
        if not isinstance(item.get(name), str):
            raise FoveateError(f"{where}: the field {name!r} must be a text, got {item.get(name)!r}. {WORLD}")
        if wrong := check_text(item[name]):
            raise FoveateError(f"{where}: the field {name!r}: {wrong}")
    check_truth(item["family"], item["answer"], where)


def _kind(row: Mapping[str, Any]) -> str:
    """What a question of a world is about."""
    return "video" if isinstance(row.get("video"), str) and row.get("image") is None else "image"


def of_families(samples: list[Sample], given: Mapping[str, str]) -> list[Sample]:
    wanted = given["families"].split("/") if "families" in given else list(RULES)
    for family in wanted:
        if family not in RULES:
            raise FoveateError(f"families=: unknown family {family!r}{nearest(family, RULES)}; there are {', '.join(RULES)}")
    kept = [sample for sample in samples if sample.group in wanted]
    if not kept:
        raise FoveateError(f"families={'/'.join(wanted)}: none of the {len(samples)} questions is of these families")
    return kept


# ---- data sets -------------------------------------------------------------------------------------------------------------------------


def of_rows(path: Path, given: Mapping[str, str], metric: Metric) -> list[Sample]:
    folder = Path(given["images"]).expanduser() if "images" in given else None
    if folder is not None and not folder.is_dir():
        raise FoveateError(f"images={folder}: no such folder")
    rows = open_rows(path, given.get("split"), given.get("config"), limit_of(given))
    reader = _Reader(given, metric, folder)
    samples = each(str(path), range(len(rows)), lambda number: reader.sample(number, rows[number]), lambda number: f"row {number}")
    if not any(sample.images or sample.clips for sample in samples):
        raise FoveateError(f"{path}: no row has a picture; name their column with image= (there are {', '.join(rows[0])}), or with video=")
    reader.check_media(str(path), samples, rows)
    return samples


@dataclass(frozen=True)
class _Reader:
    """Makes samples of rows. `seen`: pictures inside of the data set by name, since one often belongs to many questions."""

    given: Mapping[str, str]
    metric: Metric
    folder: Path | None
    seen: dict[str, Held] = field(default_factory=dict)

    def sample(self, number: int, row: Any) -> Sample:
        if not isinstance(row, dict):
            raise FoveateError(f"is no object: {str(row)[:80]!r}; the data must hold a list of objects, one for each question")
        images, clips = self._pictures(row), self._clips(row)
        if "conversations" in row and "question" not in self.given:
            question, answer = _talk(row, len(images), len(clips))
            answer = self._needed(row, "answer") if "answer" in self.given else answer
        else:
            question, answer = self._needed(row, "question"), self._needed(row, "answer")
        if not isinstance(question, str) or not question.strip():
            raise FoveateError(f"its question is no text: {question!r}")
        hint = self._held(row, "hint")
        question = f"{hint}\n{question.strip()}" if hint else question.strip()
        options = self._options(row)
        _check_markers("".join((question, *options)), len(images), len(clips))
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
            clips=clips,
        )

    def _held(self, row: Mapping[str, Any], option: str) -> Any:
        """What the row holds for an option's column; None if nothing. A column that was named must be there."""
        named = self.given.get(option)
        if named is not None and named not in row:
            raise FoveateError(f"has no field {named!r}{nearest(named, row)}; it has {', '.join(row)}")
        return next((row[name] for name in ([named] if named else COLUMNS[option]) if row.get(name) is not None), None)

    def _needed(self, row: Mapping[str, Any], option: str) -> Any:
        value = self._held(row, option)
        if value is None:
            wanted = self.given.get(option) or " or ".join(COLUMNS[option])
            raise FoveateError(f"has nothing in the field {wanted}; {option}= names another (it has {', '.join(row)})")
        return value

    def _pictures(self, row: Mapping[str, Any]) -> tuple[Picture, ...]:
        self._held(row, "image")  # a column that was named must be there
        found = pictures_of(row, self.folder, self.given.get("image"))
        return tuple(self.seen.setdefault(item.name, item) if isinstance(item, Held) else item for item in found)

    def _clips(self, row: Mapping[str, Any]) -> tuple[Footage, ...]:
        self._held(row, "video")
        if "image" in self.given and "video" not in self.given:  # it is said what is shown
            return ()
        return tuple(clips_of(row, self.folder, frames_of(self.given), self.given.get("video")))

    def check_media(self, where: str, samples: Sequence[Sample], rows: Rows) -> None:
        """That nothing but pictures is left out in silence, where nobody has said which column holds them."""
        if "image" in self.given:
            return
        known = {*self.given.values(), *LETTERS, *(name for names in COLUMNS.values() for name in names)}
        problems = []
        for number, sample in enumerate(samples):
            lost = other_media(rows[number], len(sample.images) + len(sample.clips), known)
            if lost:
                problems.append(f"{sample.id}: {lost}; or name the column of the pictures with image=")
        refuse(where, "samples", problems, len(samples))

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


def _check_markers(text: str, images: int, clips: int) -> None:
    """FoveateError where some of the images and clips have markers, and not all of them."""
    wanted = markers([text], images, clips)
    found = {marker: text.count(marker) for marker in wanted}
    if any(found.values()) and found != wanted:
        what = f"{images} images" if images or not clips else f"{clips} clips"
        what += f" and {clips} clips" if images and clips else ""
        raise FoveateError(f"has {what} but {' and '.join(f'{many} {marker} markers' for marker, many in found.items())}")


def _nothing(value: Any) -> bool:
    """Nothing, nothing but space, or the NaN that tables have in empty cells."""
    return value is None or value != value or not str(value).strip()


def _talk(row: Mapping[str, Any], images: int, clips: int) -> tuple[str, str]:
    """The last question and its answer. Earlier turns are left out, and where an image or clip stood there they stand in front."""
    row = listed(dict(row))
    wrong = check_row(row, images, clips)
    if wrong:
        raise FoveateError(wrong)
    turns = turns_of(row)
    (_, question), (_, answer) = turns[-2:]
    wanted = markers([text for role, text in turns if role == "user"], images, clips)
    if any(question.count(marker) != many for marker, many in wanted.items()):
        for marker in wanted:
            question = question.replace(marker, "")
    return question, answer


def each(where: str, items: Sequence[Item], act: Callable[[Item], Sample], label: Callable[[Item], str]) -> list[Sample]:
    """What `act` makes of each item; one FoveateError for all that it refuses."""
    made, problems = [], []
    for item in items:
        try:
            made.append(act(item))
        except FoveateError as error:
            problems.append(f"{label(item)}: {error}")
    refuse(where, "samples", problems, len(items))
    return made


def refuse(where: str, what: str, problems: Sequence[str], total: int) -> None:
    if problems:
        more = f"\n  and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
        listed = "".join(f"\n  {problem}" for problem in problems[:LISTED])
        raise FoveateError(f"{where}: {len(problems)} of {total} {what} cannot be used:{listed}{more}")
