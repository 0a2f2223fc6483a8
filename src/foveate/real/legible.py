"""Whether printed text can be read: judged by PP-OCR, a trained reader of lines of text, before a picture enters a data set."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from difflib import SequenceMatcher
from importlib.util import find_spec
from typing import Any

import numpy as np
from PIL import Image

from foveate.real.scenes import Box

HEIGHT = 48  # of the lines that the reader was trained on
_ALIKE = str.maketrans("oil|", "0111")


def can_judge(model: str) -> bool:
    """Whether there is a reader: its file, and ONNX Runtime."""
    return bool(model) and find_spec("onnxruntime") is not None


def illegible(model: str, image: Image.Image, texts: Iterable[tuple[str, Box]]) -> list[str]:
    """Those of the texts that the reader does not find in their boxes, each with what it found instead."""
    found = []
    for text, box in texts:
        said = read(model, image.crop((box[0] - 4, box[1] - 4, box[2] + 4, box[3] + 4)))
        if not same(said, text):
            found.append(f"{text} ({said})")
    return found


def same(said: str, text: str) -> bool:
    """Equal but for case, spaces, points and signs that even people mix up (0 and O, 1, l and I); one slip is let pass in seven letters,
    none in numbers."""
    plain, wanted = (re.sub(r"[\s.,:'’]", "", item.lower()).translate(_ALIKE) for item in (said, text))
    if any(character.isdigit() for character in text):
        return plain == wanted
    common = sum(block.size for block in SequenceMatcher(None, plain, wanted, autojunk=False).get_matching_blocks())
    return max(len(plain), len(wanted)) - common <= len(wanted) // 7


def read(model: str, line: Image.Image) -> str:
    """What the reader makes of a picture of one line."""
    session, characters = _reader(model)
    width = max(HEIGHT, round(line.width * HEIGHT / line.height))
    pixels = np.asarray(line.convert("RGB").resize((width, HEIGHT), Image.Resampling.BILINEAR), dtype=np.float32)[..., ::-1]
    scores = session.run(None, {session.get_inputs()[0].name: (pixels.transpose(2, 0, 1)[None] / 127.5 - 1)})[0][0]
    best = scores.argmax(-1)
    return "".join(characters[i] for i, before in zip(best, [0, *best[:-1]], strict=True) if i not in (0, before))


@functools.cache
def _reader(model: str) -> tuple[Any, list[str]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1  # pictures are made in processes side by side
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return session, ["", *session.get_modelmeta().custom_metadata_map["character"].splitlines(), " "]
