"""Scenes of pasted pictures: which things lie where, with what labels under them, on what ground; and the picture of it.

Six to nine things of 40 to 88 px that do not touch, on a square of 384 px, one or two of them with a printed label of 13 to 18 px. Boxes
are pixels (left, top, right, bottom), half-open, of what is more opaque than not; labels have the box of their plate.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageDraw

from foveate.real.stock import Font, Picture, Stock, load, said
from foveate.real.things import akin, held_pair

SIZE = 384
Box = tuple[int, int, int, int]
Rgb = tuple[int, int, int]
Pairs = Literal["seen", "unseen", "any"]
"""Which things meet: "seen" none that are held apart in training, "unseen" at least one pair of those."""

_GAP = 5
_BESIDE = 5  # px of a plate on both sides of its text
_GROUNDS = ("plain", "fade", "clouds", "stripes", "checks", "dots")


@dataclass(frozen=True)
class Thing:
    """One pasted picture, `side` px long at its longer side and turned by `turn` degrees."""

    name: str
    picture: Picture
    side: int
    turn: int
    box: Box

    @property
    def centre(self) -> tuple[float, float]:
        """(x, y) in pixels."""
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


@dataclass(frozen=True)
class Label:
    """A text on a plate, below thing number `under`."""

    text: str
    under: int
    font: Font
    size: int
    ink: Rgb
    plate: Rgb
    box: Box


@dataclass(frozen=True)
class Ground:
    """What lies behind: two colours, a period in pixels, and a seed of its own."""

    kind: str
    colours: tuple[Rgb, Rgb]
    period: int
    seed: int


@dataclass(frozen=True)
class Scene:
    """What a picture shows. `counted` is the name that is asked for in number, also where there is none of it."""

    ground: Ground
    things: tuple[Thing, ...]
    labels: tuple[Label, ...]
    counted: str


# ---- choosing ------------------------------------------------------------------------------------------------------------------------


def make_scene(rng: random.Random, stock: Stock, fonts: Sequence[Font], number: int, pairs: Pairs = "any") -> Scene:
    """A scene of the stock's pictures with `number` of what is counted, and labels in the `fonts`."""
    while True:
        counted, chosen = _names(rng, stock, number, pairs)
        if pairs != "unseen" or any(held_pair(one, other) for one in chosen for other in chosen if one < other):
            break
    texts = [label_text(rng, stock) for _ in range(1 if rng.random() < 0.4 else 2)]
    labels = [(text, rng.choice(fonts), rng.randint(13, 18)) for text in texts]
    return _place(rng, stock, counted, chosen, labels)


def _names(rng: random.Random, stock: Stock, number: int, pairs: Pairs) -> tuple[str, list[str]]:
    """The counted name, and the names of all things, in random order. No two different ones could be called by the other's name."""
    counted = rng.choice(stock.countable)
    total = rng.randint(max(6, number + 5), 9)
    alike = stock.groups[said(counted).group]
    kinds = [counted]
    for pool, wanted in ((alike, 2 + rng.randint(0, 1)), ([*stock.pictures], 1 + total - number)):
        for name in rng.sample(pool, len(pool)):
            if len(kinds) == wanted:
                break
            clash = any(akin(name, other) or (pairs == "seen" and held_pair(name, other)) for other in kinds)
            if not clash:
                kinds.append(name)
    chosen = [counted] * number + kinds[1:]
    rng.shuffle(chosen)
    return counted, chosen


def label_text(rng: random.Random, stock: Stock) -> str:
    """What is printed on a label: a word or two, a price, a time, a code."""
    words = stock.words
    kind = rng.choices(("word", "two", "number", "price", "time", "code", "name"), (4, 3, 3, 1, 1, 1, 2))[0]
    if kind == "word":
        word = rng.choice(words.common)
        return word.upper() if rng.random() < 0.4 else word
    if kind == "two":
        return f"{rng.choice(words.common)} {rng.choice(words.common)}"
    if kind == "number":
        return f"{rng.choice(words.common).capitalize()} {rng.randint(2, 99)}"
    if kind == "price":
        return f"${rng.randint(1, 99)}.{rng.randint(0, 99):02d}"
    if kind == "time":
        return f"{rng.randint(7, 21)}:{rng.choice((0, 15, 30, 45)):02d}"
    if kind == "code":
        return f"{rng.choice('ABCEHKLMNPRTX')}{rng.choice('ABCEHKLMNPRTX')}-{rng.randint(100, 999)}"
    return rng.choice((rng.choice(words.first), rng.choice(words.last), rng.choice(words.cities)))


# ---- placing -------------------------------------------------------------------------------------------------------------------------


def _place(rng: random.Random, stock: Stock, counted: str, chosen: list[str], labels: list[tuple[str, Font, int]]) -> Scene:
    """Boxes at random that keep their distance. Where twenty layouts failed, the things get smaller."""
    once = [i for i, name in enumerate(chosen) if chosen.count(name) == 1]
    under = dict(zip(rng.sample(once, min(len(once), len(labels))), labels, strict=False))
    looks = [(_pick(rng, stock.pictures[name]), rng.randint(40, 88), rng.randint(-12, 12)) for name in chosen]
    dark = rng.random() < 0.3
    ground = Ground(rng.choice(_GROUNDS), (_colour(rng, dark), _colour(rng, dark)), rng.randint(14, 48), rng.getrandbits(32))
    for attempt in range(100):
        sides = [max(40, round(side * 0.95 ** (attempt // 20))) for _, side, _ in looks]
        sizes = [cut(picture, turn, side).size for (picture, _, turn), side in zip(looks, sides, strict=True)]
        plates = {i: plate_size(*label) for i, label in under.items()}
        blocks = [
            (max(width, plates[i][0]), height + 3 + plates[i][1] + _GAP) if i in plates else (width, height)
            for i, (width, height) in enumerate(sizes)
        ]
        corners = _corners(rng, blocks)
        if corners is not None:
            break
    else:
        raise AssertionError("nine things of 40 px find their places on 384 px")
    things, plated = [], []
    for i, name in enumerate(chosen):
        (left, top), (width, height), (picture, _, turn) = corners[i], sizes[i], looks[i]
        inset = (blocks[i][0] - width) // 2
        things.append(Thing(name, picture, sides[i], turn, (left + inset, top, left + inset + width, top + height)))
        if i in under:
            text, font, size = under[i]
            x, y = left + (blocks[i][0] - plates[i][0]) // 2, top + height + 3
            ink, plate = rng.choice((((20, 20, 25), (250, 250, 245)), ((250, 250, 250), (30, 35, 60)), ((35, 30, 10), (250, 225, 100))))
            plated.append(Label(text, i, font, size, ink, plate, (x, y, x + plates[i][0], y + plates[i][1])))
    return Scene(ground, tuple(things), tuple(plated), counted)


def _pick(rng: random.Random, pictures: Sequence[Picture]) -> Picture:
    """One picture of one style: a style with many is not shown more often."""
    style = rng.choice(sorted({picture.style for picture in pictures}))
    return rng.choice([picture for picture in pictures if picture.style == style])


def _colour(rng: random.Random, dark: bool) -> Rgb:
    low, high = (20, 90) if dark else (160, 245)
    return rng.randint(low, high), rng.randint(low, high), rng.randint(low, high)


def _corners(rng: random.Random, blocks: list[tuple[int, int]]) -> list[tuple[int, int]] | None:
    """Left and top of each block, the largest placed first; None where one found no place in forty tries."""
    taken: dict[int, Box] = {}
    for i in sorted(range(len(blocks)), key=lambda i: -blocks[i][0] * blocks[i][1]):
        width, height = blocks[i]
        for _ in range(40):
            left, top = rng.randint(3, SIZE - 3 - width), rng.randint(3, SIZE - 3 - height)
            box = (left, top, left + width, top + height)
            if not any(_near(box, other) for other in taken.values()):
                taken[i] = box
                break
        else:
            return None
    return [taken[i][:2] for i in range(len(blocks))]


def _near(a: Box, b: Box) -> bool:
    return a[0] < b[2] + _GAP and b[0] < a[2] + _GAP and a[1] < b[3] + _GAP and b[1] < a[3] + _GAP


# ---- drawing -------------------------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=256)
def cut(picture: Picture, turn: int, side: int) -> Image.Image:
    """The picture turned, cut to what is more opaque than not, `side` px long at its longer side."""
    image = load(picture).rotate(turn, Image.Resampling.BICUBIC, expand=True)
    image = image.crop(opaque(image).getbbox())
    scale = side / max(image.size)
    image = image.resize([max(1, round(edge * scale)) for edge in image.size], Image.Resampling.LANCZOS)
    return image.crop(opaque(image).getbbox())  # smoothing may have thinned an edge


def opaque(image: Image.Image) -> Image.Image:
    """255 where an RGBA image is more opaque than not, else 0."""
    return image.getchannel("A").point(lambda value: 255 * (value >= 128))


def plate_size(text: str, font: Font, size: int) -> tuple[int, int]:
    """Width and height in pixels of the plate round a text."""
    left, top, right, bottom = font.at(size).getbbox(text)
    return round(right - left) + 2 * _BESIDE, round(bottom - top) + 8


def letters(label: Label) -> list[tuple[str, Box]]:
    """The characters of a label but blanks, each with the part of the plate that it stands on, in whole pixels."""
    font, (left, top, _, bottom) = label.font.at(label.size), label.box
    start = left + _BESIDE - font.getbbox(label.text)[0]
    edges = [round(start + font.getlength(label.text[:end])) for end in range(len(label.text) + 1)]
    spans = zip(label.text, pairwise(edges), strict=True)
    return [(letter, (first, top, max(last, first + 1), bottom)) for letter, (first, last) in spans if not letter.isspace()]


def render(scene: Scene) -> tuple[Image.Image, Image.Image]:
    """The picture (RGB), and as large an image ("L") of the numbers of things, counted from 1, where they are more opaque than not."""
    image, numbers = draw_ground(scene.ground), Image.new("L", (SIZE, SIZE))
    for number, thing in enumerate(scene.things, start=1):
        piece = cut(thing.picture, thing.turn, thing.side)
        image.paste(piece, thing.box[:2], piece)
        numbers.paste(number, thing.box, opaque(piece))
    draw = ImageDraw.Draw(image)
    for label in scene.labels:
        draw.rounded_rectangle((label.box[0], label.box[1], label.box[2] - 1, label.box[3] - 1), 3, label.plate)
        font = label.font.at(label.size)
        left, top, _, _ = font.getbbox(label.text)
        draw.text((label.box[0] + _BESIDE - left, label.box[1] + 4 - top), label.text, label.ink, font)
    return image, numbers


def draw_ground(ground: Ground) -> Image.Image:
    """Its `SIZE` x `SIZE` pixels."""
    steps = np.arange(SIZE) / SIZE
    down, along = np.meshgrid(steps, steps, indexing="ij")
    rng = np.random.default_rng(ground.seed)
    waves = 2 * np.pi * SIZE / ground.period
    if ground.kind == "plain":
        mix: Any = np.zeros((SIZE, SIZE))
    elif ground.kind == "fade":
        angle = rng.uniform(0, 2 * np.pi)
        mix = (np.cos(angle) * (along - 0.5) + np.sin(angle) * (down - 0.5)) / 1.42 + 0.5
    elif ground.kind == "clouds":
        coarse = Image.fromarray(rng.uniform(0, 255, (9, 9)).astype(np.uint8))
        mix = np.asarray(coarse.resize((SIZE, SIZE), Image.Resampling.BICUBIC)) / 255
    elif ground.kind == "stripes":
        angle = rng.uniform(0, np.pi)
        mix = np.sin(waves * (np.cos(angle) * along + np.sin(angle) * down)) > 0
    elif ground.kind == "checks":
        mix = (np.sin(waves * along) > 0) ^ (np.sin(waves * down) > 0)
    else:
        mix = np.sin(waves * along) * np.sin(waves * down) > 0.6
    first, last = (np.array(colour, dtype=np.float32) for colour in ground.colours)
    share = (0.6 if mix.dtype == bool else 1.0) * mix[..., None].astype(np.float32)  # patterns are fainter than things
    return Image.fromarray((first + share * (last - first) + 0.5).clip(0, 255).astype(np.uint8))
