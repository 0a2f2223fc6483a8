"""A folder of pictures that others have made: each is shown as an ordinary viewer shows it, or refused with one message.

    pip download --no-deps --no-binary :all: pillow==13.0.0 && tar xf pillow-13.0.0.tar.gz
    python -m pytest tests/situations/test_foreign_pictures.py --pictures pillow-13.0.0/Tests/images

The image library's own test files are a thousand of them, of nearly all kinds that it reads, some broken on purpose. Without a folder this
is skipped.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from foveate.data.pixels import PictureError, open_image, outline

PLAIN = ("1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr", "PA", "RGBX", "La", "RGBa")
OFF = 2  # levels: what rounding may make of a colour on its way through another mode


@pytest.fixture(scope="module")
def pictures(request: pytest.FixtureRequest) -> list[Path]:
    folder = request.config.getoption("--pictures", None)
    if folder is None:
        pytest.skip("needs a folder: --pictures pillow-13.0.0/Tests/images")
    found = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    assert found, folder
    return found


def viewed(path: Path) -> Image.Image | None:
    """By Pillow's own means alone; None for what has deep or floating values, or colours of its own, of which viewers differ."""
    with Image.open(path) as image:
        image.load()
        if image.mode not in PLAIN or image.info.get("icc_profile"):
            return None
        upright = ImageOps.exif_transpose(image)
        whole = upright.convert({"La": "LA", "RGBa": "RGBA"}.get(upright.mode, upright.mode))
        if not whole.has_transparency_data:
            return whole.convert("RGB")
        paper = Image.new("RGBA", whole.size, "white")
        paper.alpha_composite(whole.convert("RGBA"))
        return paper.convert("RGB")


def opened(path: Path) -> Image.Image | PictureError:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return open_image(path)
        except PictureError as error:
            return error


def test_each_is_shown_or_refused_with_one_message(pictures: list[Path]) -> None:
    counts, wrong = Counter[str](), list[str]()
    for path in pictures:
        found = opened(path)
        if isinstance(found, PictureError):
            counts["refused"] += 1
            if re.fullmatch(r"cannot read the image .*: it [^\n]{5,400}", str(found)) is None:
                wrong.append(f"{path.name}: {found}")
            continue
        assert found.mode == "RGB"
        assert (found.height, found.width) == (outline(path).height, outline(path).width), path
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            right = viewed(path)
        counts["shown" if right is None else "compared"] += 1
        if right is not None and not alike(found, right):
            wrong.append(f"{path.name}: another picture")
    print(dict(counts))
    assert not wrong
    assert counts["compared"] > counts["refused"]


def alike(one: Image.Image, other: Image.Image) -> bool:
    if one.size != other.size:
        return False
    return bool(np.abs(np.asarray(one).astype(int) - np.asarray(other).astype(int)).max() <= OFF)


def test_what_pillow_opens_is_refused_for_a_reason(pictures: list[Path]) -> None:
    """A file that Pillow opens and decodes is only refused where its values have no range, or it has no pixels or too many."""
    wrong = []
    for path in pictures:
        found = opened(path)
        if not isinstance(found, PictureError) or re.search("bomb|not finite|says nothing about|has no pixels", found.reason):
            continue
        with contextlib.suppress(Exception), warnings.catch_warnings(), Image.open(path) as image:
            warnings.simplefilter("ignore")
            image.load()
            wrong.append(f"{path.name}: {found.reason}")
    assert not wrong
