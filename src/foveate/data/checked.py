"""What was found good before: a resumed or repeated run does not decode all pictures and clips again."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable
from pathlib import Path

from foveate.data.clips import ClipError
from foveate.data.footage import Footage
from foveate.data.pixels import Held, Picture, PictureError, shown_size
from foveate.errors import readable

log = logging.getLogger(__name__)


class Checked:
    """Pictures and clips that were found good before, files by path, size and time of change, others by their bytes; clips also by their
    sampling."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._known: dict[str, tuple[int, ...] | str] = {}  # (height, width), of clips behind frames, or why it cannot be shown
        self._new: list[str] = []
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path is not None and path.is_file() else ():
            key, _, size = line.rpartition("\t")
            sides = size.split("x")
            if len(sides) in (2, 3) and all(side.isdecimal() for side in sides):  # a line may be torn
                self._known[key] = tuple(map(int, sides))

    @staticmethod
    def key(picture: Picture) -> str:
        """On one line; "" for a file that is not there."""
        if isinstance(picture, Held):
            return hashlib.sha256(picture.content).hexdigest()
        try:
            stat = os.stat(picture)
        except (OSError, ValueError):
            return ""
        return f"{readable(os.path.abspath(picture))}\t{stat.st_size}\t{stat.st_mtime_ns}"

    def size(self, picture: Picture) -> tuple[int, int]:
        """(height, width) of a picture as it is shown, which is decoded unless it is known. PictureError if it cannot be shown."""
        found = self._found(self.key(picture), lambda: shown_size(picture))
        if isinstance(found, str):
            raise PictureError(picture.name, found)
        height, width = found
        return height, width

    def shape(self, clip: Footage) -> tuple[int, int, int]:
        """(frames, height, width) of a clip, which is decoded frame by frame unless it is a file that is known. ClipError if it cannot be
        shown."""
        key = self.key(clip.path) if os.path.isfile(clip.path) else ""
        found = self._found(key and f"{key}\t{clip.rule}", lambda: _shape(clip))
        if isinstance(found, str):
            raise ClipError(str(clip.path), found)
        frames, height, width = found
        return frames, height, width

    def _found(self, key: str, look: Callable[[], tuple[int, ...]]) -> tuple[int, ...] | str:
        found = self._known.get(key)
        if found is not None:
            return found
        try:
            found = look()
        except (PictureError, ClipError) as error:
            found = error.reason
        if key:
            self._known[key] = found
            if not isinstance(found, str):
                self._new.append(f"{key}\t{'x'.join(map(str, found))}")
        return found

    def save(self) -> None:
        """Appended, because several runs may share the file; a folder that cannot be written to only costs the next run its time."""
        if self.path is None or not self._new:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(line + "\n" for line in self._new))
        except OSError as error:
            log.info("the list of checked images was not kept: %s", error)
        self._new = []


def _shape(clip: Footage) -> tuple[int, int, int]:
    """All frames have the size of the first one, as `Clip.of` makes them."""
    count, size = 0, (0, 0)
    for frame in clip.frames():
        size = (frame.height, frame.width) if count == 0 else size
        count += 1
    return count, *size
