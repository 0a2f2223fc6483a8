"""A stock of made-up pictures, with fonts that come with Pillow and Matplotlib: all that real data are made of, in little."""

from __future__ import annotations

import io
import random
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from foveate.real.stock import Font, Picture, Stock, Words
from foveate.real.things import names

GROUPS = ("fruit", "bird", "mammal", "vehicle")


def picture(path: Path, seed: str) -> None:
    """A blot in one colour, transparent around."""
    rng = random.Random(seed)
    image = Image.new("RGBA", (48, 48))
    corners = [(rng.randint(4, 44), rng.randint(4, 44)) for _ in range(5)]
    ImageDraw.Draw(image).polygon([(2, 24), (24, 2), *corners, (46, 30)], fill=(*(rng.randint(0, 255) for _ in range(3)), 255))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def little_stock(folder: Path, styles: tuple[str, ...] = ("fluent", "twemoji", "noto", "photograph")) -> Stock:
    """Things of four groups in the styles, photographs of every other one."""
    pictures = {}
    for number, name in enumerate(name for name in names().values() if name.group in GROUPS):
        mine = [style for style in styles if style != "photograph" or number % 2]
        for style in mine:
            picture(folder / style / f"{name.name}.png", f"{style}/{name.name}")
        pictures[name.name] = tuple(Picture(style, str(folder / style / f"{name.name}.png")) for style in mine)
    own = ImageFont.load_default(20)
    assert isinstance(own, ImageFont.FreeTypeFont)
    assert isinstance(own.path, io.BytesIO)
    (folder / "Aileron.ttf").write_bytes(own.path.getvalue())
    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    pools = [
        tuple(f"{start}{end}" for start in ("Al", "Ber", "Cor", "Dan") for end in ends) for ends in (("a", "en", "o"), ("by", "son", "ell"))
    ]
    words = Words(
        pools[0],
        pools[1],
        ("Northam", "Southam", "Westby", "Eastby"),
        ("Mill Lane", "High Street", "Park Row"),
        ("paper", "stone", "water", "cloth", "metal", "brick"),
    )
    return Stock(
        pictures,
        (
            Font("sans", str(fonts / "DejaVuSans.ttf")),
            Font("serif", str(fonts / "DejaVuSerif.ttf")),
            Font("own", str(folder / "Aileron.ttf"), True),
        ),
        words,
        ("little: made up. Blots.",),
        versions={"little": "1"},
    )
