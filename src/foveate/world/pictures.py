"""Scenes of the embedded world: what is in a picture, its pixels, and its dense labels. Deterministic by seed; no files, no network.

A scene holds one to five coloured shapes that do not touch, and in most cases one piece of writing: a printed number, a printed word from
a closed list, or a handwritten digit (scikit-learn's, the first half of its 1,797 images for training scenes and the second for test
scenes). Coordinates are (row0, col0, row1, col1) in units of the picture's side, half-open, on a grid of 1/128, or as many times finer as
things are smaller.
"""

import functools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Split = Literal["train", "test"]
Box = tuple[float, float, float, float]
Rgb = tuple[int, int, int]
Wanted = dict[str, str | int]
"""Kind and name of a thing, and its colour, size or sample, before it has a place."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 35, 40),
    "green": (40, 150, 60),
    "blue": (45, 85, 225),
    "yellow": (240, 205, 35),
    "purple": (150, 50, 185),
    "cyan": (45, 195, 210),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = ("small", "large")
WORDS = ("cat", "dog", "sun", "map", "bus", "key", "box", "pen", "tree", "fish", "moon", "bird", "milk", "road", "lamp", "ship")

KINDS = ("background", *SHAPES, "number", "word", "digit")
"""Classes of a patch: `Labels.kind` indexes this."""
GLYPHS = (*(f"printed {d}" for d in range(10)), *(f"word {w}" for w in WORDS), *(f"handwritten {d}" for d in range(10)))
"""Classes of a patch with writing on it: `Labels.glyph` indexes this."""
IGNORE = -100
"""Label of a patch that has no such property (torch's `ignore_index`)."""

RASTER = 128  # boxes lie on this grid, so that a picture of 128 px shows them exactly
_SIDES = {"small": (25, 28), "large": (40, 46)}  # in 1/128; 25 is the smallest that a ruler of 16 cells still boxes with IoU >= 0.5
_HEIGHTS = {"number": (28, 34), "word": (24, 27), "digit": (36, 44)}
_MARGIN = 3


@dataclass(frozen=True)
class Thing:
    """One thing in a scene. `name` is the shape, or the text of a number, word or handwritten digit."""

    kind: Literal["shape", "number", "word", "digit"]
    name: str
    box: Box
    rgb: tuple[int, int, int]
    colour: str | None = None  # shapes only
    size: str | None = None  # shapes only
    sample: int = -1  # handwritten digits: index into scikit-learn's images

    @property
    def centre(self) -> tuple[float, float]:
        """(row, column) of the box's middle, unit coordinates."""
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


@dataclass(frozen=True)
class Scene:
    """What a picture shows. `background` is a pair of colours that fade into each other downwards or sideways."""

    seed: int | str
    things: tuple[Thing, ...]
    background: tuple[tuple[int, int, int], tuple[int, int, int]]
    sideways: bool

    @property
    def shapes(self) -> list[Thing]:
        return [thing for thing in self.things if thing.kind == "shape"]


@dataclass(frozen=True)
class Labels:
    """Dense ground truth on a grid of g x g patches, raster order; `IGNORE` where a property does not apply."""

    kind: NDArray[np.int64]  # (g*g,) index into KINDS
    colour: NDArray[np.int64]  # (g*g,) index into COLOURS
    size: NDArray[np.int64]  # (g*g,) index into SIZES
    glyph: NDArray[np.int64]  # (g*g,) index into GLYPHS
    centre: NDArray[np.int64]  # (g*g,) 1 where a thing's centre lies in the patch
    box: NDArray[np.float32]  # (g*g, 4) box of the patch's thing relative to the patch's centre, unit coordinates; 0 on background


@functools.cache
def handwritten() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """scikit-learn's digits as ink (1797, 8, 8) in 0..255 and their classes (1797,)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return np.asarray(digits.images * (255 / 16)).round().astype(np.uint8), np.asarray(digits.target, dtype=np.int64)


@functools.cache
def digit_pool(split: Split) -> dict[int, tuple[int, ...]]:
    """Indices of the handwritten digits of a split, by class. The two splits share no image."""
    targets = handwritten()[1]
    half = len(targets) // 2
    indices = range(half) if split == "train" else range(half, len(targets))
    return {digit: tuple(i for i in indices if targets[i] == digit) for digit in range(10)}


# --- making ---------------------------------------------------------------------------------------------------------------------------


def scene(seed: int | str, split: Split = "train", detail: int = 1) -> Scene:
    """The scene of a seed. The same seed gives another scene in the other split, and at another `detail`: all things are so many times
    smaller than usual, so that their picture needs as many times the pixels a side, of which most show none of them."""
    rng = random.Random(f"scene/{split}/{seed}")
    dark, tints = ground(rng)
    wanted = writing(rng, split)
    for _ in range(rng.choices((1, 2, 3, 4, 5), (12, 24, 28, 24, 12))[0]):
        earlier = [item for item in wanted if item["kind"] == "shape"]
        # Things that share a colour or a shape are what makes counting and pointing questions worth asking.
        colour = rng.choice(earlier)["colour"] if earlier and rng.random() < 0.3 else rng.choice(list(COLOURS))
        shape = rng.choice(earlier)["name"] if earlier and rng.random() < 0.3 else rng.choice(SHAPES)
        wanted.append({"kind": "shape", "name": shape, "colour": colour, "size": rng.choice(SIZES)})
    ink = ink_on(rng, dark)
    things = []
    for item, box in zip(wanted, placed(rng, [extent(rng, item) for item in wanted], RASTER * detail), strict=True):
        if box is not None:
            rgb = shade(rng, str(item["colour"])) if item["kind"] == "shape" else ink
            things.append(Thing(box=box, rgb=rgb, **item))  # type: ignore[arg-type]
    return Scene(seed, tuple(sorted(things, key=lambda thing: thing.centre)), tints, rng.random() < 0.5)


def _jitter(rng: random.Random, rgb: Rgb, by: int) -> Rgb:
    r, g, b = (min(255, max(0, value + rng.randint(-by, by))) for value in rgb)
    return r, g, b


def ground(rng: random.Random) -> tuple[bool, tuple[Rgb, Rgb]]:
    """Whether a background is dark, and the two colours that fade into each other in it."""
    dark = rng.random() < 0.5
    level = rng.randint(15, 60) if dark else rng.randint(205, 240)
    one, other = (_jitter(rng, (level, level, level), 14) for _ in range(2))
    return dark, (one, other)


def ink_on(rng: random.Random, dark: bool) -> Rgb:
    """The colour of writing."""
    return _jitter(rng, (235, 235, 235) if dark else (20, 20, 20), 15)


def shade(rng: random.Random, colour: str) -> Rgb:
    """One of the shades that go by the name of a colour."""
    return _jitter(rng, COLOURS[colour], 14)


def writing(rng: random.Random, split: Split) -> list[Wanted]:
    """A piece of writing, in an eighth of the scenes none."""
    chance = rng.random()
    if chance < 0.35:
        return [{"kind": "number", "name": str(rng.randint(0, 9) if rng.random() < 0.3 else rng.randint(10, 99))}]
    if chance < 0.62:
        return [{"kind": "word", "name": rng.choice(WORDS)}]
    if chance < 0.87:
        digit = rng.randint(0, 9)
        return [{"kind": "digit", "name": str(digit), "sample": rng.choice(digit_pool(split)[digit])}]
    return []


def extent(rng: random.Random, item: Wanted) -> tuple[int, int]:
    """(height, width) of a thing that is wanted, in 1/128 of the side."""
    if item["kind"] == "shape":
        side = rng.randint(*_SIDES[str(item["size"])])
        return side, side
    height = rng.randint(*_HEIGHTS[str(item["kind"])])
    wide, high = _master(str(item["kind"]), str(item["name"]), int(item.get("sample", -1))).size
    return height, max(8, round(height * wide / high))


def placed(rng: random.Random, extents: Sequence[tuple[int, int]], raster: int = RASTER) -> list[Box | None]:
    """Boxes of these heights and widths that keep a distance, drawn at random; after twenty layouts that do not fit, None for what found
    no place."""
    order = sorted(range(len(extents)), key=lambda i: -extents[i][0] * extents[i][1])
    for attempt in range(20):
        taken: dict[int, tuple[int, int, int, int]] = {}
        for i in order:
            height, width = extents[i]
            for _ in range(25):
                row, col = rng.randint(2, raster - 2 - height), rng.randint(2, raster - 2 - width)
                box = (row, col, row + height, col + width)
                if not any(_near(box, other) for other in taken.values()):
                    taken[i] = box
                    break
            else:
                if attempt < 19:
                    break
        if len(taken) == len(extents) or attempt == 19:
            break
    return [_unit(taken[i], raster) if i in taken else None for i in range(len(extents))]


def _near(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> bool:
    return a[0] < b[2] + _MARGIN and b[0] < a[2] + _MARGIN and a[1] < b[3] + _MARGIN and b[1] < a[3] + _MARGIN


def _unit(box: tuple[int, int, int, int], raster: int) -> Box:
    return box[0] / raster, box[1] / raster, box[2] / raster, box[3] / raster


# --- drawing --------------------------------------------------------------------------------------------------------------------------


def render(scene: Scene, size: int = 128) -> NDArray[np.uint8]:
    """Pixels of a scene: (size, size, 3) RGB. Boxes are exact where `size` is a multiple of 128, and rounded to pixels elsewhere."""
    first, last = (np.array(colour, dtype=np.float32) for colour in scene.background)
    fade = first + np.linspace(0, 1, size, dtype=np.float32)[:, None] * (last - first)
    picture = np.broadcast_to(fade[None] if scene.sideways else fade[:, None], (size, size, 3)).copy()
    for thing in scene.things:
        (top, left, bottom, right), alpha = _stamp(thing, size)
        area = picture[top:bottom, left:right]
        area += alpha * (np.array(thing.rgb, dtype=np.float32) - area)
    noise = np.random.default_rng(random.Random(f"noise/{scene.seed}").getrandbits(64))
    # Sparse specks instead of noise everywhere: PNG files stay a third as large, and are written and read three times as fast.
    specks = noise.integers(0, size, size=(2, size * size // 64))
    picture[specks[0], specks[1]] += noise.integers(-40, 41, size=(specks.shape[1], 1))
    return picture.clip(0, 255).astype(np.uint8)


def labels(scene: Scene, grid: int) -> Labels:
    """Labels of a grid x grid partition. A patch belongs to the thing that covers most of it, if that is at least an eighth of it.

    Shapes count by their own pixels, writing by its box (by each digit's part of it in a number).
    """
    if RASTER % grid:
        raise ValueError(f"grid {grid} does not divide {RASTER}")
    kind, glyph, things = [0], [IGNORE], [scene.things[0]]
    owner = np.zeros((RASTER, RASTER), dtype=np.int64)
    centre = np.zeros((grid, grid), dtype=np.int64)
    for thing in scene.things:
        (top, left, bottom, right), alpha = _stamp(thing, RASTER)
        centre[int(thing.centre[0] * grid), int(thing.centre[1] * grid)] = 1
        if thing.kind == "shape":
            owner[top:bottom, left:right][alpha[..., 0] > 0.5] = len(kind)
            kind.append(KINDS.index(thing.name))
            glyph.append(IGNORE)
            things.append(thing)
            continue
        bounds = _number(thing.name)[1] if thing.kind == "number" else ((0.0, 1.0),)
        for (start, stop), text in zip(bounds, thing.name if thing.kind == "number" else [thing.name], strict=True):
            owner[top:bottom, left + round(start * (right - left)) : left + round(stop * (right - left))] = len(kind)
            kind.append(KINDS.index(thing.kind))
            glyph.append(GLYPHS.index({"number": "printed ", "word": "word ", "digit": "handwritten "}[thing.kind] + text))
            things.append(thing)
    patch = RASTER // grid
    blocks = owner.reshape(grid, patch, grid, patch)
    cover = np.stack([(blocks == i).sum((1, 3)) for i in range(len(kind))])  # (things + 1, g, g)
    cover[0] = patch * patch // 8  # background wins below an eighth
    winner = cover.argmax(0).reshape(-1)
    colours, sizes = list(COLOURS), list(SIZES)
    colour = [IGNORE] + [colours.index(t.colour) if t.colour else IGNORE for t in things[1:]]
    size = [IGNORE] + [sizes.index(t.size) if t.size else IGNORE for t in things[1:]]
    middle = (np.stack(np.divmod(np.arange(grid * grid), grid), 1) + 0.5) / grid
    box = np.array([t.box for t in things])[winner] - np.tile(middle, 2)
    box[winner == 0] = 0
    of = [np.array(values, dtype=np.int64)[winner] for values in (kind, colour, size, glyph)]
    return Labels(of[0], of[1], of[2], of[3], centre.reshape(-1), box.astype(np.float32))


def _stamp(thing: Thing, size: int) -> tuple[tuple[int, int, int, int], NDArray[np.float32]]:
    """Pixel box of a thing and its opacity (height, width, 1) in 0..1."""
    top, left, bottom, right = (round(edge * size) for edge in thing.box)
    return (top, left, bottom, right), _opacity(thing.kind, thing.name, thing.sample, max(1, bottom - top), max(1, right - left))


@functools.lru_cache(maxsize=8192)
def _opacity(kind: str, name: str, sample: int, height: int, width: int) -> NDArray[np.float32]:
    how = Image.Resampling.BICUBIC if kind == "digit" else Image.Resampling.BOX
    mask = _master(kind, name, sample).resize((width, height), how)
    opacity = np.asarray(mask, dtype=np.float32)[..., None] / np.float32(255)
    opacity.flags.writeable = False
    return opacity


@functools.lru_cache(maxsize=4096)
def _master(kind: str, name: str, sample: int) -> Image.Image:
    """A large mask of a thing, cropped to it; every size is scaled down from here."""
    if kind == "shape":
        return _shape(name)
    if kind == "digit":
        mask = Image.fromarray(handwritten()[0][sample])
        return mask.crop(mask.point(lambda value: 255 if value > 40 else 0).getbbox())
    return _number(name)[0] if kind == "number" else _text(name.upper())


def _shape(name: str) -> Image.Image:
    side = 256
    mask = Image.new("L", (side, side))
    draw = ImageDraw.Draw(mask)
    if name in ("circle", "ring"):
        draw.ellipse((0, 0, side - 1, side - 1), fill=255)
        if name == "ring":
            draw.ellipse((side * 0.27, side * 0.27, side * 0.73, side * 0.73), fill=0)
    elif name == "square":
        draw.rectangle((0, 0, side, side), fill=255)
    elif name == "triangle":
        draw.polygon([(side / 2, 0), (side, side), (0, side)], fill=255)
    elif name == "cross":
        draw.rectangle((side * 0.34, 0, side * 0.66, side), fill=255)
        draw.rectangle((0, side * 0.34, side, side * 0.66), fill=255)
    else:  # star, stretched to fill its box
        angles = [math.pi * i / 5 for i in range(10)]
        points = [((0.42 if i % 2 else 1) * math.sin(a), -(0.42 if i % 2 else 1) * math.cos(a)) for i, a in enumerate(angles)]
        xs, ys = [p[0] for p in points], [p[1] for p in points]
        scaled = [((x - min(xs)) / (max(xs) - min(xs)) * side, (y - min(ys)) / (max(ys) - min(ys)) * side) for x, y in points]
        draw.polygon(scaled, fill=255)
    return mask


@functools.cache
def _text(text: str) -> Image.Image:
    """Printed text in Pillow's own font, in bold, cropped to its ink."""
    mask = Image.new("L", (120 * len(text) + 80, 200))
    ImageDraw.Draw(mask).text((40, 30), text, fill=255, font=ImageFont.load_default(100), stroke_width=4)
    return mask.crop(mask.getbbox())


@functools.cache
def _number(text: str) -> tuple[Image.Image, tuple[tuple[float, float], ...]]:
    """A printed number and the columns (start, stop) of each digit as shares of its width."""
    digits, gap = [_text(character) for character in text], 14
    mask = Image.new("L", (sum(d.width for d in digits) + gap * (len(digits) - 1), max(d.height for d in digits)))
    left, bounds = 0, []
    for digit in digits:
        mask.paste(digit, (left, 0))
        bounds.append((left / mask.width, (left + digit.width) / mask.width))
        left += digit.width + gap
    return mask, tuple(bounds)
