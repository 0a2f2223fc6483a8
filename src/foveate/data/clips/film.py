"""Films: moving pictures on disk, whose frames are decoded one by one when they are asked for.

| what | read by | times of the frames |
|---|---|---|
| mp4, webm, mov, mkv and whatever else FFmpeg knows | PyAV, the optional extra `foveate[video]` | their own timestamps, from 0 on |
| an animated gif, webp, png or avif | Pillow | their own durations; a frame of no duration is shown for 0.1 s, as browsers do |
| a folder of pictures, in the order of the numbers in their names | Pillow | 1 / `rate` apart |
| one picture | Pillow | 0 |

Refused, as a `ClipError` with its reason: what is missing, torn or no film, has no frames or nothing but sound, or frames of more pixels
than Pillow's limit. One frame at a time is held, whatever the film's length.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from foveate.data.pixels import PictureError, open_image
from foveate.errors import FoveateError, readable

_STILL = 0.1  # seconds for which a frame that says nothing is shown
_LATE = ("WEBP", "AVIF")  # of which Pillow knows how long a frame is shown once it is decoded
_PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".avif"}


class ClipError(FoveateError):
    """A clip that cannot be shown. `reason` reads on from its name: "is missing: ..."."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"cannot read the clip {readable(name)}: it {reason}")
        self.reason = reason


class Film(ABC):
    """A film whose frames are still on disk.

    name   for messages
    times  seconds at which each frame begins to be shown, ascending, the first at 0
    end    seconds at which the last one ends
    """

    def __init__(self, name: str, times: Sequence[float], end: float) -> None:
        if not times:
            raise ClipError(name, "has no frames")
        self.name = name
        self.times = tuple(time - times[0] for time in times)
        self.end = max(end - times[0], self.times[-1])

    def __len__(self) -> int:
        return len(self.times)

    @property
    def rate(self) -> float:
        """Frames a second, on the average; 0 of one that does not last."""
        return len(self) / self.end if self.end else 0.0

    def at(self, time: float) -> int:
        """The frame that is shown at a time; before the first one that, behind the last one this."""
        return max(0, bisect_right(self.times, time) - 1)

    def frames(self, wanted: Sequence[int]) -> Iterator[Image.Image]:
        """Some frames, by their numbers, which ascend: upright RGB, each decoded when it is asked for. ClipError for what is torn."""
        if any(b <= a for a, b in pairwise(wanted)) or (wanted and not 0 <= wanted[0] <= wanted[-1] < len(self)):
            raise FoveateError(f"frames {list(wanted)[:8]} of {self.name}: give ascending numbers from 0 to {len(self) - 1}")
        found = 0
        with _explained(self.name):
            for image in self._decoded(wanted):
                found += 1
                yield image
        if found < len(wanted):
            raise ClipError(self.name, f"is torn: its frame {wanted[found]} of {len(self)} is not there")

    @abstractmethod
    def _decoded(self, wanted: Sequence[int]) -> Iterator[Image.Image]: ...


def open_film(path: str | Path, rate: float = 1.0) -> Film:
    """A film from its file, or from a folder of pictures that are `rate` frames a second. ClipError with the reason where it is none."""
    path = Path(path)
    if not (math.isfinite(rate) and rate > 0):
        raise FoveateError(f"rate={rate!r} is not possible; give frames a second, more than 0")
    with _explained(str(path)):
        if path.is_dir():
            return _Folder(path, rate)
        try:
            with Image.open(path) as opened:
                return _Animation(path, opened)
        except UnidentifiedImageError:
            return _Video(path)
    raise AssertionError


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turns whatever goes wrong with a film into a ClipError with the reason."""
    try:
        yield
        return
    except (FoveateError, GeneratorExit):
        raise
    except Image.DecompressionBombError:
        reason = f"has frames of more than Pillow's limit of {Image.MAX_IMAGE_PIXELS} pixels; make it smaller"
    except (FileNotFoundError, NotADirectoryError):
        reason = f"is missing: there is no {readable(str(Path(name).absolute()))}"
    except Exception as error:  # decoders raise anything at all for broken files
        reason = f"cannot be decoded: {readable(' '.join(str(error).split()))[:200] or type(error).__name__}"
    raise ClipError(name, reason) from None


class _Folder(Film):
    def __init__(self, path: Path, rate: float) -> None:
        found = [file for file in path.iterdir() if file.suffix.lower() in _PICTURES and not file.name.startswith(".")]
        self._files = sorted(found, key=lambda file: [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", file.name)])
        super().__init__(str(path), [i / rate for i in range(len(found))], len(found) / rate)

    def _decoded(self, wanted: Sequence[int]) -> Iterator[Image.Image]:
        for number in wanted:
            try:
                yield open_image(self._files[number])
            except PictureError as error:
                raise ClipError(self.name, f"has a frame {readable(self._files[number].name)} that {error.reason}") from None


class _Animation(Film):
    def __init__(self, path: Path, opened: Image.Image) -> None:
        self._path, times, end = path, [], 0.0
        count = int(getattr(opened, "n_frames", 1))
        for number in range(count):
            opened.seek(number)
            if opened.format in _LATE:
                opened.load()
            times.append(end)
            end += (float(opened.info.get("duration", 0)) / 1000 or _STILL) if count > 1 else 0.0
        super().__init__(str(path), times, end)

    def _decoded(self, wanted: Sequence[int]) -> Iterator[Image.Image]:
        with Image.open(self._path) as opened:
            for number in wanted:
                opened.seek(number)
                yield open_image(opened.copy())


class _Video(Film):
    """By PyAV. The timestamps are those of the packets, for which nothing is decoded; decoding begins at the key frame in front of what is
    wanted."""

    def __init__(self, path: Path) -> None:
        self._av, self._path = _pyav(path), path
        packets: dict[int, bool] = {}
        with self._av.open(str(path)) as container:
            stream = self._stream(container)
            width, height = stream.codec_context.width, stream.codec_context.height
            if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
                raise Image.DecompressionBombError
            last = 0.0
            for packet in container.demux(stream):
                if packet.pts is not None and packet.size and not packet.is_discard:
                    packets[packet.pts] = packet.is_keyframe
                    last = max(last, packet.pts + (packet.duration or 0))
            if packets and stream.frames > len(packets):
                raise ClipError(str(path), f"is torn: it says that it has {stream.frames} frames, and {len(packets)} are there")
            self._unit = float(stream.time_base)
        self._stamps = sorted(packets)
        self._keys = [number for number, stamp in enumerate(self._stamps) if packets[stamp]]
        times = [stamp * self._unit for stamp in self._stamps]
        if len(times) > 1 and last <= self._stamps[-1]:  # the last packet does not say how long it is shown
            last = self._stamps[-1] + (self._stamps[-1] - self._stamps[0]) / (len(times) - 1)
        super().__init__(str(path), times, last * self._unit)

    def _stream(self, container: Any) -> Any:
        for stream in container.streams.video:
            if not stream.disposition & self._av.stream.Disposition.attached_pic:  # the cover of a record is no film
                return stream
        sound = bool(container.streams.audio)
        raise ClipError(str(self._path), "holds sound and no pictures" if sound else "has no stream of pictures; it may be torn")

    def _decoded(self, wanted: Sequence[int]) -> Iterator[Image.Image]:
        with self._av.open(str(self._path)) as container:
            stream, at = self._stream(container), -1
            decoded: Iterator[Any] = container.decode(stream)
            for number in wanted:
                key = bisect_right(self._keys, number) - 1
                if key >= 0 and self._keys[key] > at + 1:
                    container.seek(self._stamps[self._keys[key]], stream=stream)
                    decoded = container.decode(stream)
                frame = next((frame for frame in decoded if frame.pts is not None and frame.pts >= self._stamps[number]), None)
                if frame is None or frame.pts != self._stamps[number]:
                    return  # which the caller says
                at = number
                image = open_image(frame.to_image())
                yield image.rotate(frame.rotation, expand=True) if frame.rotation % 360 else image


def _pyav(path: Path) -> Any:
    try:
        import av
    except ImportError:
        raise ClipError(str(path), "is no picture and no folder of pictures; films need PyAV: pip install 'foveate[video]'") from None
    return av
