"""Clips in rows: under `video` or `videos` names of films, or of folders with their frames, and `<video>` in the text for each of them.

    {"id": "1", "video": "cat.mp4", "conversations": [{"from": "human", "value": "<video>\\n..."}, {"from": "gpt", "value": "..."}]}

In a row without pictures `<image>` may stand for a clip as well, as in LLaVA-Video's data. In a row without clips `<video>` is text like
any other. A model without videos is shown the frames of a clip as pictures.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from PIL import Image

from foveate.data.clips import Clip, open_clip, open_film, parse
from foveate.data.pixels import Picture, open_image
from foveate.data.rows import Unusable
from foveate.errors import FoveateError

MARKER, VIDEO = "<image>", "<video>"
CLIP = "\ue002video\ue003"
"""Stands for a clip from where its row is read on: private characters, which no text holds."""
CLIPS = ("video", "videos")
FRAMES = "uniform:frames=8"
"""The frames of a clip that a model is shown, unless something else is asked for."""

Turns = list[tuple[str, str]]
Shown = TypeVar("Shown")


@dataclass(frozen=True)
class Footage:
    """A clip that is still on disk: the file or folder of its film, and the spelling of the sampling that says which frames it has."""

    path: Path
    rule: str = FRAMES

    def open(self) -> Clip:
        """The clip, decoded. ClipError with the reason for what cannot be shown."""
        return open_clip(self.path, self.rule)

    def frames(self) -> Iterator[Image.Image]:
        """Its frames one after the other, of which none is held; of films that change in size, each has its own."""
        film = open_film(self.path)
        return film.frames(parse(self.rule).choose(film))

    def __len__(self) -> int:
        """How many frames it has, for which few samplings decode any. ClipError as in `open`."""
        return _count(self.path, self.rule)


@lru_cache(maxsize=2**16)
def _count(path: Path, rule: str) -> int:
    return len(parse(rule).choose(open_film(path)))


class Still(NamedTuple):
    """One frame of a clip, where frames are shown as pictures."""

    clip: Footage
    number: int


def clips_of(row: Mapping[str, Any], folder: Path | None, rule: str, field: str | None = None) -> list[Footage]:
    """The clips of a row, in order: of `field`, or of `video` or `videos`. Names of files start from `folder`.

    Unusable for what names no file, and where both fields have one; FoveateError for a name where there is no folder."""
    held = [name for name in ([field] if field else CLIPS) if row.get(name)]
    if len(held) > 1:
        raise Unusable("has clips under both `video` and `videos`; leave one of them out")
    value = row[held[0]] if held else []
    return [Footage(_path(item, folder), rule) for item in (value if isinstance(value, list) else [value])]


def _path(item: Any, folder: Path | None) -> Path:
    if isinstance(item, dict) and item.get("bytes") is not None:
        raise Unusable("its clip lies within the data set; save it as a file of its own, and give the file's name")
    name = item.get("path") if isinstance(item, dict) else item
    if not isinstance(name, str) or not name or "\0" in name:
        raise Unusable(f"its clip is no name of a film or of a folder of frames: {str(item)[:80]!r}")
    if re.match(r"(https?|data|s3|gs|file):", name):
        raise Unusable(f"its clip is an address, {name[:80]!r}, and nothing is fetched: save the film and give the name of its file")
    if folder is None and not Path(name).is_absolute():
        raise FoveateError(f"names the clip {name!r}, but no images=FOLDER says where that is")
    return (folder or Path()) / name


# ---- in texts ------------------------------------------------------------------------------------------------------------------------


def standing(texts: Iterable[str], images: int, clips: int) -> str:
    """What stands for a clip in the texts of a row of so many images and clips; "": nothing does, and `<video>` is text."""
    if not clips:
        return ""
    held = "".join(texts)
    return MARKER if not images and VIDEO not in held and MARKER in held else VIDEO


def markers(texts: Iterable[str], images: int, clips: int) -> dict[str, int]:
    """How often each marker is to stand in the texts of a row of so many images and clips."""
    stands = standing(texts, images, clips)
    return {MARKER: images} | ({stands: clips} if stands else {})


def placed(text: str, marker: str) -> str:
    """A text with CLIP wherever `standing`'s marker stands."""
    return text.replace(marker, CLIP) if marker else text


def framed(turns: Sequence[tuple[str, str]], images: Sequence[Shown], clips: Sequence[Sequence[Shown]]) -> tuple[Turns, list[Shown]]:
    """Turns (role, text) with markers for images and CLIPs, for a model without videos: each frame of a clip has a marker, on lines of
    their own. With what is shown, in the order of the markers."""
    pictures, films = iter(images), iter(clips)
    said: Turns = []
    shown: list[Shown] = []
    for role, text in turns:
        pieces = re.split(f"({MARKER}|{CLIP})", text)
        for at, piece in enumerate(pieces if role == "user" else ()):
            if piece == CLIP:
                frames = next(films)
                shown += frames
                pieces[at] = "\n".join([MARKER] * len(frames))
            elif piece == MARKER:
                shown.append(next(pictures))
        said.append((role, "".join(pieces)))
    return said, shown


def opened(shown: Iterable[Picture | Still]) -> Iterator[Image.Image]:
    """Pictures and frames, decoded; of a clip all at once. PictureError and ClipError for what cannot be shown."""
    clips: dict[Footage, Clip] = {}
    for one in shown:
        if not isinstance(one, Still):
            yield open_image(one)
            continue
        if one.clip not in clips:
            clips[one.clip] = one.clip.open()
        yield clips[one.clip].frames[one.number]
