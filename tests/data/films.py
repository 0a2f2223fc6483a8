"""Small films for the tests: each frame is of one colour, its number in the red channel."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

SIDE = 32
STEP = 20  # of red between two frames


def frame(number: int) -> Image.Image:
    return Image.new("RGB", (SIDE, SIDE), (STEP * number, 60, 60))


def number_of(image: Image.Image) -> int:
    """Which frame it is, whatever a lossy codec has made of it."""
    return round(float(np.asarray(image)[..., 0].mean()) / STEP)


def gif(path: Path, durations: list[int]) -> Path:
    """`durations` in milliseconds."""
    frames = [frame(number) for number in range(len(durations))]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations)
    return path


def folder(path: Path, count: int) -> Path:
    path.mkdir()
    for number in range(count):
        frame(number).save(path / f"shot{number}.png")
    return path


def video(path: Path, stamps: list[int], codec: str = "mpeg4", size: tuple[int, int] = (SIDE, SIDE), gop: int = 4) -> Path:
    """A film whose frames begin at `stamps` milliseconds."""
    av: Any = pytest.importorskip("av")
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=1000)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = *size, "yuv420p", gop
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for number, stamp in enumerate(stamps):
            shown = av.VideoFrame.from_image(frame(number).resize(size))
            shown.pts, shown.time_base = stamp, Fraction(1, 1000)
            out.mux(stream.encode(shown))
        out.mux(stream.encode())
    return path


def sound(path: Path) -> Path:
    av: Any = pytest.importorskip("av")
    with av.open(str(path), "w") as out:
        stream = out.add_stream("aac", rate=8000)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        silence.sample_rate, silence.pts = 8000, 0
        out.mux(stream.encode(silence))
        out.mux(stream.encode())
    return path
