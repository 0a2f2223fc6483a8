"""Pictures as a viewer shows them: what training, evaluation, benchmarks, `look` and the lmms-eval harness put before a model.

| a picture | becomes |
|---|---|
| turned by its EXIF or XMP orientation | upright |
| with a colour profile (Adobe RGB, Display P3, a printer's CMYK) | sRGB; a profile that is broken or of another kind of colour is ignored |
| with transparency, of any kind | laid on `BACKGROUND` |
| 16-bit grey | its upper 8 bits; data that need fewer bits are taken to be of the first of `DEPTHS` that holds them, as 12-bit X-rays |
| 32-bit integers | as 16-bit grey where they lie in its range, else from the least value, black, to the largest, white |
| floating point | 0 black and 1 white where all values lie there, else from the least to the largest |
| of several frames or pages | the first one, which is said once |

Refused, as a `PictureError` with its reason: what is missing, torn or no picture, has more pixels than Pillow's limit
(`PIL.Image.MAX_IMAGE_PIXELS`), or has values without a range: NaN, infinity, all the same outside of 0 to 1.
"""

from __future__ import annotations

import hashlib
import io
import logging
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageCms

from foveate.errors import FoveateError, readable

log = logging.getLogger(__name__)

BACKGROUND = "white"
DEPTHS = (8, 12, 16)  # bits of grey values that files of 16 bits really have

_said: set[str] = set()
_DEEP = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
_SPACES = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}  # Pillow's mode: the profile's colour space
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_PNG_NOTES = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")  # of an orientation: names of chunks, and of texts
_SIDEWAYS = (Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_90)


class Held(NamedTuple):
    """A picture that lies within a data set: its encoded bytes, and a name for messages."""

    content: bytes
    name: str


Picture = Path | Held
"""Where an encoded picture is."""


class PictureError(FoveateError):
    """A picture that cannot be shown. `reason` reads on from its name: "is missing: ..."."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"cannot read the image {readable(name)}: it {reason}")
        self.reason = reason


def open_image(picture: Path | Held | bytes | Image.Image) -> Image.Image:
    """A picture as RGB, decoded, upright, in sRGB, as the module says; PictureError with the reason where that cannot be.

    What it returns carries no orientation or profile any more, so that opening it again changes nothing."""
    with _explained(picture):
        if isinstance(picture, Image.Image):
            return _shown(picture)
        content = picture if isinstance(picture, bytes) else picture[0] if isinstance(picture, tuple) else None
        with Image.open(_regular(picture) if isinstance(picture, Path) else io.BytesIO(content or b"")) as opened:
            if Image.MAX_IMAGE_PIXELS is not None and opened.width * opened.height > Image.MAX_IMAGE_PIXELS:
                raise Image.DecompressionBombError
            shown = _shown(opened)
            if opened.format not in ("MPO", "PSD") and getattr(opened, "is_animated", False):  # those hold one picture and its parts
                _say_once("of pictures with several frames or pages the first one is shown, such as of %s", readable(_name(picture)))
            return shown
    raise AssertionError


@contextmanager
def _explained(picture: Any) -> Iterator[None]:
    """Turns whatever goes wrong with a picture into a PictureError with the reason."""
    try:
        yield
        return
    except Image.DecompressionBombError:
        reason = f"is a decompression bomb: more than Pillow's limit of {Image.MAX_IMAGE_PIXELS} pixels; make it smaller"
    except (FileNotFoundError, NotADirectoryError):
        reason = f"is missing: there is no file {readable(_absolute(picture))}"
        if isinstance(picture, Path) and not picture.parent.is_dir():
            reason += f", nor the folder {readable(_absolute(picture.parent))}"
    except Exception as error:  # decoders raise anything at all for broken files
        reason = f"cannot be decoded: {readable(' '.join(str(error).split()))[:200] or type(error).__name__}"
    raise PictureError(_name(picture), reason) from None


class Outline(NamedTuple):
    """What is known of a picture that is not decoded: a hash of its encoded bytes, and its size in pixels as it is shown."""

    digest: bytes
    height: int
    width: int


def outline(picture: Picture) -> Outline:
    """A picture's outline, from its bytes and its header. PictureError where it is missing or no picture."""
    with _explained(picture):
        content = _regular(picture).read_bytes() if isinstance(picture, Path) else picture.content
        with Image.open(io.BytesIO(content)) as opened:
            width, height = opened.size
            noted = opened.format != "PNG" or any(note in content for note in _PNG_NOTES)  # behind its pixels, which would be decoded
            if noted and opened.format != "TIFF" and _turns(opened) in _SIDEWAYS:  # a TIFF's header already says the size after the turn
                width, height = height, width
        return Outline(hashlib.blake2b(content, digest_size=16).digest(), height, width)
    raise AssertionError


def shown_size(picture: Path | Held | bytes) -> tuple[int, int]:
    """(height, width) of a picture as it is shown, found by really decoding it. PictureError if it cannot be shown."""
    image = open_image(picture)
    return image.height, image.width


def _name(picture: Any) -> str:
    return str(picture) if isinstance(picture, Path) else picture[1] if isinstance(picture, tuple) else "that was given"


def _absolute(path: Any) -> str:
    return str(Path(path).absolute())


def _regular(path: Path) -> Path:
    """Of a pipe or a device nobody knows when it ends."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(f"{path} is a folder or device, not a file")
    return path


def _say_once(text: str, example: str) -> None:
    if text not in _said:
        _said.add(text)
        log.warning(text, example)


# ---- what a viewer does ----------------------------------------------------------------------------------------------------------------


def _shown(image: Image.Image) -> Image.Image:
    image.load()
    if not image.width * image.height:
        raise ValueError("it has no pixels")
    turn = _turns(image)
    profile = image.info.get("icc_profile")
    alpha = None
    if image.mode in _DEEP:
        image = _eight_bits(image)
    elif image.has_transparency_data:
        image = image.convert({"La": "LA", "RGBa": "RGBA"}.get(image.mode, image.mode))
        whole = image.convert("RGBA")
        alpha = whole.getchannel("A")
        image = image.getchannel("L") if image.mode == "LA" else whole.convert("RGB")
    if image.mode not in (*_SPACES, "LAB"):
        image = image.convert("RGB")
    transform = _to_srgb(profile, image.mode) if isinstance(profile, bytes) and image.mode in _SPACES else None
    shown = image.convert("RGB") if transform is None else transform(image)
    if alpha is not None:
        shown.putalpha(alpha)
        paper = Image.new("RGBA", shown.size, BACKGROUND)
        paper.alpha_composite(shown)
        shown = paper.convert("RGB")
    if turn is not None:
        shown = shown.transpose(turn)
    shown.info = {}
    return shown


def _turns(image: Image.Image) -> Image.Transpose | None:
    """What is still to be done to an image; Pillow turns TIFF files itself while it loads them, and their size with that."""
    try:
        return _TURNS.get(int(image.getexif().get(ExifTags.Base.Orientation, 1)))
    except Exception:  # a broken note does not spoil the picture
        return None


def _eight_bits(image: Image.Image) -> Image.Image:
    """Deep grey as 8-bit grey."""
    pixels = np.asarray(image)
    low, high = pixels.min(), pixels.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError("it has pixels that are not finite (NaN or infinity)")
    grey: NDArray[Any]
    if image.mode == "F" and low >= 0 and high <= 1:
        grey = np.rint(255 * pixels)
    elif image.mode != "F" and low >= 0 and high < 2**16:
        depth = next(bits for bits in DEPTHS if high < 2**bits)
        grey = pixels >> (depth - 8)
    elif low == high:
        raise ValueError(f"all its pixels are {low}, which says nothing about what is black and what is white")
    else:
        grey = np.rint(255 * ((pixels.astype(np.float64) - low) / (float(high) - float(low))))
    grey = grey.astype(np.uint8)
    if getattr(image, "tag_v2", {}).get(262) == 0:  # TIFF's WhiteIsZero, which Pillow heeds in 8 bits only
        grey = 255 - grey
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        grey = np.where(pixels == clear, np.uint8(255), grey)
    return Image.fromarray(grey)


@lru_cache(maxsize=8)
def _to_srgb(profile: bytes, mode: str) -> Callable[[Image.Image], Image.Image] | None:
    """From a profile's colours to sRGB; None where they are sRGB already, and where the profile is broken or not of this mode."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space.strip() != _SPACES[mode]:
            return None
        exact = ImageCms.Flags.NOOPTIMIZE if mode == "L" else ImageCms.Flags.NONE  # the short cut of grey is off by up to ten levels
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB", flags=exact)
    except (OSError, ValueError, TypeError, ImageCms.PyCMSError):
        return None
    if mode == "L":
        levels = np.asarray(transform.apply(Image.fromarray(np.arange(256, dtype=np.uint8)[None])))[0]
        return lambda image: Image.fromarray(levels[np.asarray(image)])
    if mode == "RGB":
        steps = np.linspace(0, 255, 8).astype(np.uint8)
        cube = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(8, 64, 3)
        there = np.asarray(transform.apply(Image.fromarray(cube)))
        if np.abs(there.astype(int) - cube).max() <= 2:  # sRGB by whatever name, but for rounding
            return None
    return transform.apply
