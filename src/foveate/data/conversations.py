"""Training conversations: LLaVA's JSON with an image folder, or any other data set with the same fields.

A row is {"id": ..., "image" or "images": a name, a list of names, or missing, "conversations": [{"from": "human", "value":
"<image>\\n..."}, {"from": "gpt", "value": ...}, ...]}, with one image marker for each image. Pictures may be names of files, encoded bytes,
or what the datasets library keeps of them. Clips stand under "video" or "videos", see `foveate.data.footage`.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from foveate.data.boxes import Box, boxes_of
from foveate.data.checked import Checked as Checked
from foveate.data.clips import Clip, ClipError
from foveate.data.footage import CLIPS, FRAMES, Footage, clips_of, framed, placed, standing
from foveate.data.footage import MARKER as MARKER
from foveate.data.pixels import Held, Outline, Picture, PictureError, open_image
from foveate.data.rows import Rows, open_rows
from foveate.data.rows import Unusable as Unusable
from foveate.data.spelled import marked, wrong_with
from foveate.errors import FoveateError, readable
from foveate.tokens import ImagePlan

log = logging.getLogger(__name__)

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
IMAGES = ("image", "images")
SAMPLE = '{"id": "1", "image": "a.png", "conversations": [{"from": "human", "value": "<image>\\n..."}, {"from": "gpt", "value": "..."}]}'
SHOWN = 5  # of a long list of bad samples, so many stand in the message; all of them stand in the file
CHECKED = 3  # raised when other pictures are good than before, or more is remembered of them: what is known of earlier checks is then void

_SUFFIX = r"([_-]?(path|file|name|url|uri|bytes|data|base64|b64|list|\d))*"
_FILM = re.compile(rf"(video|film|movie|audio|sound|frame|media|point_?cloud|pdf)s?{_SUFFIX}", re.IGNORECASE)
_PICTURE = re.compile(rf"(image|img|picture|photo|pic)s?{_SUFFIX}", re.IGNORECASE)
_NUMBERED = re.compile(r"(image|img|picture|photo|pic)[_-]?\d+", re.IGNORECASE)
_FILE = re.compile(r".{1,500}\.(png|jpe?g|gif|webp|bmp|tiff?|avif|heic|mp4|mov|avi|mkv|webm|wav|mp3|flac|ogg|m4a)", re.IGNORECASE)

load_image = open_image  # its name before there was one for all who open pictures


@dataclass(frozen=True)
class Conversation:
    """One training sample: turns are (role, text) with roles user and assistant in turn, images are decoded to RGB (or outlines, where
    features of them are read), `plans` are what each of them and of the clips becomes, filled in by whoever makes model inputs of it.
    `source`: the number of its source, where samples of several are mixed. `clips`: for a model with videos, in the order of the CLIPs.
    `boxes`: names and places of what its image shows, where they are read."""

    index: int
    id: str
    turns: list[tuple[str, str]]
    images: Sequence[Any]
    plans: list[ImagePlan] = field(default_factory=list)
    source: int = 0
    clips: Sequence[Clip] = ()
    boxes: Sequence[tuple[str, Box]] = ()


@dataclass(frozen=True)
class Bad:
    """A sample that cannot be trained on, and why."""

    index: int
    id: str
    image: str
    reason: str

    def __str__(self) -> str:
        return f"{self.id}{f' ({self.image})' if self.image else ''}: {self.reason}"


# ---- what a row holds ----------------------------------------------------------------------------------------------------------------


def row_id(row: Any, index: int) -> str:
    """The sample's name in messages, on one line."""
    name = row.get("id") if isinstance(row, dict) else None
    return f"row {index}" if name is None or name == "" else readable(str(name)[:200])


def pictures_of(row: Mapping[str, Any], folder: Path | None, field: str | None = None) -> list[Picture]:
    """The pictures of a row, in order: of `field`, or of `image` or `images`. Names of files start from `folder`, and are taken as they
    are: a path may be absolute, and "%20" is no space.

    Unusable for what is neither a name nor a picture, and where both fields have one; FoveateError for a name where there is no folder.
    """
    held = [name for name in ([field] if field else IMAGES) if row.get(name) not in (None, [])]
    if len(held) > 1:
        raise Unusable("has pictures under both `image` and `images`; leave one of them out")
    value = row[held[0]] if held else []
    return [_picture(item, folder) for item in (value if isinstance(value, list) else [value])]


def _picture(item: Any, folder: Path | None) -> Picture:
    content, path = (item.get("bytes"), item.get("path")) if isinstance(item, dict) else (item, None)
    content = path if content is None else content
    if isinstance(content, bytes):
        # The same picture has the same name, and another of the same file name has not.
        name = Path(path).name if isinstance(path, str) else "image"
        return Held(content, f"{name}-{hashlib.sha256(content).hexdigest()[:12]}")
    if not isinstance(content, str) or not content:
        raise Unusable(f"its image is neither a path nor the bytes of a picture: {str(item)[:80]!r}")
    if re.match(r"(https?|data|s3|gs|file):", content):
        raise Unusable(f"its image is an address, {content[:80]!r}, and nothing is fetched: save the picture and give the name of its file")
    if folder is None and not Path(content).is_absolute():
        raise FoveateError(f"names the image {content!r}, but no images=FOLDER says where that is")
    return (folder or Path()) / content


def other_media(row: Mapping[str, Any], images: int, known: Collection[str] = ()) -> str:
    """What a row holds that would be lost without a word, "" if nothing: films and sound, and pictures in other fields than `image` and
    `images`, or than those that are `known`, which are clips' where those are read."""
    for name, value in row.items():
        if name in (*IMAGES, "id", "conversations", *known) or not isinstance(value, str | bytes | list | dict) or not value:
            continue
        if _FILM.fullmatch(name):
            read = "pictures, clips (under `video`)" if CLIPS[0] in known else "pictures"
            return (
                f"has {readable(name)!r}, but only {read} and text are read: "
                f"take pictures out of it and list them under `images`, with a {MARKER} marker for each, or leave the field out"
            )
        if _NUMBERED.fullmatch(name) or (not images and (_PICTURE.fullmatch(name) or _is_file(value))):
            return f"has {readable(name)!r}, but pictures stand under `image` or `images`: rename the field, or leave it out"
    return ""


def _is_file(value: Any) -> bool:
    """Whether a value is that of a picture, film or sound, or names its file."""
    if isinstance(value, list):
        return any(_is_file(item) for item in value)
    if isinstance(value, dict):
        return isinstance(value.get("bytes"), bytes) or (isinstance(value.get("path"), str) and _is_file(value["path"]))
    return isinstance(value, bytes) or (isinstance(value, str) and _FILE.fullmatch(value.strip()) is not None)


def check_text(text: str) -> str:
    """Why a text cannot be put to a tokenizer, "" if it can."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"its text is no valid Unicode: half of a surrogate pair at character {error.start} ({readable(text[error.start])})"
    return f"its text has a NUL at character {text.index(chr(0))}" if "\0" in text else ""


class Source:
    """Rows, and the folder that names of images and clips start from.

    frames  the sampling of the clips
    films   whether who reads takes clips as they are; else their frames are shown as pictures
    boxes   whether who reads wants to know where things are, `foveate.data.boxes`
    """

    def __init__(self, rows: Rows, folder: Path | None = None, frames: str = FRAMES, films: bool = False, boxes: bool = False) -> None:
        if folder is not None and not folder.is_dir():
            raise FoveateError(f"image folder {folder.absolute()} does not exist")
        if rows.columns is not None and "conversations" not in rows.columns:
            raise FoveateError(f"dataset {rows.name} has no column `conversations`; it has {', '.join(map(readable, rows.columns))}")
        self.rows, self.name, self.folder = rows, rows.name, folder
        self.frames, self.films, self.boxed = frames, films, boxes

    @property
    def fingerprint(self) -> str:
        return self.rows.fingerprint

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, index: int) -> dict[str, Any]:
        """Unusable for what is no object."""
        try:
            row = self.rows[index]
        except FoveateError as error:
            raise Unusable(str(error)) from None
        if not isinstance(row, dict):
            raise Unusable(f"is no object with conversations: {str(row)[:80]!r}")
        return listed(row)

    def images(self, row: dict[str, Any]) -> list[Picture]:
        with self._named():
            return pictures_of(row, self.folder)

    def clips(self, row: dict[str, Any]) -> list[Footage]:
        with self._named():
            return clips_of(row, self.folder, self.frames)

    def boxes(self, row: dict[str, Any], images: int) -> list[tuple[str, Box]]:
        return boxes_of(row, images) if self.boxed else []

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except Unusable:
            raise
        except FoveateError as error:
            raise FoveateError(f"{self.name} {error}: the recipe gives no `images` folder") from None

    def sizes(self) -> np.ndarray:
        """What stands for the length of each row where lengths are compared."""
        return self.rows.lengths()


def listed(row: dict[str, Any]) -> dict[str, Any]:
    """A row whose conversation, a list of structs, was not stored as a struct of lists."""
    turns = row.get("conversations")
    if not isinstance(turns, dict) or not turns or not all(isinstance(values, list) for values in turns.values()):
        return row
    if len({len(values) for values in turns.values()}) > 1:
        return row
    return {**row, "conversations": [dict(zip(turns, values, strict=True)) for values in zip(*turns.values(), strict=True)]}


# ---- the data set --------------------------------------------------------------------------------------------------------------------


class Conversations:
    """Map-style data set. `index[i]` is the row of item i: bad samples that the recipe says to skip are not in it. `show` makes of a
    picture what samples have."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.show: Callable[[Picture], Image.Image | Outline] = open_image
        self.index = np.arange(len(source))

    @classmethod
    def open(
        cls,
        conversations: Path | None = None,
        images: Path | None = None,
        dataset: str | None = None,
        split: str = "train",
        limit: int | None = None,
        config: str | None = None,
        frames: str = FRAMES,
        films: bool = False,
        boxes: bool = False,
    ) -> Conversations:
        """From a file or folder, such as LLaVA's JSON, or from a data set that may be on the hub as well. `frames`, `films`, `boxes`: see
        `Source`. FoveateError if it cannot be read."""
        where = conversations if conversations is not None else dataset
        assert where is not None
        try:
            rows = open_rows(where, split, config, limit, hub=conversations is None)
        except FoveateError as error:
            raise FoveateError(f"{'dataset' if conversations is None else 'conversations'} {error}") from None
        return cls(Source(rows, images, frames, films, boxes))

    @property
    def name(self) -> str:
        return self.source.name

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, item: int) -> Conversation:
        index = int(self.index[item])
        row = self.source.row(index)
        try:
            images = [self.show(image) for image in self.source.images(row)]
            clips = [clip.open() for clip in self.source.clips(row)]
        except (PictureError, ClipError) as error:  # it was good when it was checked
            what = "an image" if isinstance(error, PictureError) else "a clip"
            raise FoveateError(f"{self.source.name}: {what} of sample {row_id(row, index)} cannot be read any more: {error}") from None
        turns, boxes = marked(turns_of(row, len(images), len(clips)), row), self.source.boxes(row, len(images))
        if clips and not self.source.films:
            turns, images = framed(turns, images, [clip.frames for clip in clips])
            clips = []
        return Conversation(index, row_id(row, index), turns, images, clips=clips, boxes=boxes)

    def name_of(self, item: int) -> str:
        """What messages call a sample."""
        index = int(self.index[item])
        return row_id(self.source.row(index), index)

    def pictures(self, item: int) -> list[Picture]:
        """FoveateError for a sample with clips."""
        row = self.source.row(int(self.index[item]))
        if self.source.clips(row):
            raise FoveateError(f"sample {self.name_of(item)} shows a clip, and only of pictures features are kept: leave `features` out")
        return self.source.images(row)

    def after(self, item: int, number: int) -> int:
        """The sample `number` places further on, from the beginning again after the last one."""
        return (item + number) % len(self)

    def skip(self, bad: Sequence[Bad]) -> None:
        """Leave these samples out. FoveateError if none is left."""
        self.index = np.setdiff1d(self.index, [sample.index for sample in bad])
        if not len(self.index):
            raise FoveateError(f"{self.source.name}: no sample is left, all {len(self.source)} are bad")


def turns_of(row: dict[str, Any], images: int = 0, clips: int = 0) -> list[tuple[str, str]]:
    """(role, text) of a row of so many images and clips that `check_row` has found good; CLIP stands for each clip."""
    turns = [(ROLES[turn["from"]], turn["value"]) for turn in row["conversations"]]
    stands = standing([text for role, text in turns if role == "user"], images, clips)
    return [(role, placed(text, stands) if role == "user" else text) for role, text in turns]


# ---- the check before training -------------------------------------------------------------------------------------------------------


def check_row(row: dict[str, Any], images: int, clips: int | None = None) -> str:
    """What is wrong with the text of a row of so many images and clips (None: of whoever reads no clips), "" if nothing is."""
    turns = row.get("conversations")
    if not isinstance(turns, list) or not turns:
        others = ", ".join(readable(str(name)) for name in row if name != "conversations")
        return f"has no conversations{f', but {others[:200]}' if others else ''}; a sample is {SAMPLE}"
    for turn in turns:
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str) or turn.get("from") not in list(ROLES):
            return f'a turn must be {{"from": "human" or "gpt", "value": text}}, found {str(turn)[:80]!r}'
    roles = [ROLES[turn["from"]] for turn in turns]
    if roles[0] == "system":
        roles = roles[1:]
    if len(roles) < 2 or len(roles) % 2 or any(role != ("user", "assistant")[i % 2] for i, role in enumerate(roles)):
        return f"human and gpt must take turns, beginning with human and ending with gpt; found {', '.join(t['from'] for t in turns)}"
    asked = [turn["value"] for turn in turns if ROLES[turn["from"]] == "user"]
    stands = standing(asked, images, clips or 0)
    for marker in dict.fromkeys(filter(None, (MARKER, stands))):
        if any(marker in turn["value"] for turn in turns if ROLES[turn["from"]] != "user"):
            return f"{marker} stands outside of the human turns"
        markers = sum(text.count(marker) for text in asked)
        many, what = (clips or 0, "clip") if marker == stands else (images, "image")
        if markers != many:
            return f"has {many} {what}{'s' if many != 1 else ''} but {markers} {marker} marker{'s' if markers != 1 else ''}"
    if any(not turn["value"].strip() for turn in turns if ROLES[turn["from"]] == "assistant"):
        return "has an empty answer"
    wrong = [check_text(turn["value"]) or wrong_with(turn, ROLES[turn["from"]] == "assistant") for turn in turns]
    return next(filter(None, wrong), "") or other_media(row, images, () if clips is None else CLIPS)


def cache_file(source: Source) -> Path:
    """Where good images are remembered: in the user's cache, a file for each image folder or data set."""
    name = os.path.abspath(source.folder) if source.folder is not None else source.name
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return Path.home() / ".cache" / "foveate" / "checked-images" / f"{digest}-{CHECKED}.tsv"


def find_bad(
    source: Source,
    cache: Path | None,
    rows: Sequence[int] | None = None,
    fits: Callable[[list[tuple[str, str]], list[tuple[int, int]]], str] = lambda turns, sizes: "",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Bad]:
    """Every sample (of `rows`) that cannot be trained on: text, markers, each image and clip decoded once, and what `fits` says of its
    turns and of the (height, width) of its images, and of frames that are shown as such.

    `progress(done, total)` is called after each sample."""
    rows = range(len(source)) if rows is None else rows
    checked, bad = Checked(cache), []

    def check(index: int) -> Bad | None:
        row: Any = None
        try:
            row = source.row(index)
            images, clips = source.images(row), source.clips(row)
            reason = check_row(row, len(images), len(clips))
            source.boxes(row, len(images))
        except Unusable as error:
            reason = str(error)
        if reason:
            return Bad(index, row_id(row, index), "", reason)
        sizes, frames = [], []
        for image in images:
            try:
                sizes.append(checked.size(image))
            except PictureError as error:
                return Bad(index, row_id(row, index), readable(image.name), f"image {error.reason}")
        for clip in clips:
            try:
                count, *size = checked.shape(clip)
            except ClipError as error:
                return Bad(index, row_id(row, index), readable(clip.path.name), f"clip {error.reason}")
            frames.append([(size[0], size[1])] * count)
        turns = marked(turns_of(row, len(images), len(clips)), row)
        if clips and not source.films:
            turns, sizes = framed(turns, sizes, frames)
        reason = fits(turns, sizes)
        return Bad(index, row_id(row, index), "", reason) if reason else None

    last = time.monotonic()
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:  # Pillow decodes outside of the interpreter's lock
        for done, found in enumerate(_windowed(pool, check, rows), start=1):
            if found is not None:
                bad.append(found)
            if done % 256 == 0 and time.monotonic() - last > 30:
                checked.save()
                last = time.monotonic()
            progress(done, len(rows))
    checked.save()
    return bad


def _windowed(pool: ThreadPoolExecutor, check: Callable[[int], Bad | None], rows: Sequence[int]) -> Iterator[Bad | None]:
    """`pool.map` in slices: it would otherwise hold a future for each of a million rows."""
    for start in range(0, len(rows), 4096):
        yield from pool.map(check, rows[start : start + 4096])


def refuse_or_skip(data: Conversations, bad: Sequence[Bad], policy: str, report: Path | None) -> None:
    """Stop with the list of bad samples, written whole to `report`; or leave them out, counted and named in the log.

    Without a `report` nothing is written or logged: another process does that."""
    if not bad:
        return
    if report is not None:
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text("".join(f"{sample}\n" for sample in bad), encoding="utf-8")
    first = "\n".join(f"  {sample}" for sample in bad[:SHOWN])
    more = f"\n  and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
    summary = f"{data.source.name}: {len(bad)} of {len(data)} samples cannot be trained on (full list: {report}):\n{first}{more}"
    if policy == "stop":
        raise FoveateError(f"{summary}\nRepair them, or set on_bad_sample: skip to train without them")
    if report is not None:
        log.warning("skipped: %s", summary)
    data.skip(bad)
