"""What a tower's features are worth without any training: how often the nearest picture in another drawing style shows the same thing.

Of two styles the things that both have are taken. A picture is laid on white, as large as fits, and becomes the mean of the tower's last
states over its patches, less the mean of all pictures of its style; the nearest is that of the greatest cosine. "pixels" are 16 x 16 of
them, compared in the same way. Chance is 1 in as many as there are things.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.progress import track
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoConfig, AutoImageProcessor, AutoModel

from foveate.errors import FoveateError
from foveate.files import write
from foveate.real import PREFIX, real
from foveate.real.efficientnet import EfficientNetLite
from foveate.real.lcnet import LCNet
from foveate.real.stock import Stock, load, open_stock
from foveate.real.things import hashed

SIDE, TOGETHER = 224, 32
PIXELS = "pixels"
Encode = Callable[[Sequence[Image.Image]], Tensor]
"""Pictures -> (pictures, width)."""


@dataclass(frozen=True)
class Row:
    """Of `n` things, by tower the share whose picture in the style `sought` has that of the same thing in the style `among` nearest."""

    sought: str
    among: str
    n: int
    right: Mapping[str, float]


def shown(stock: Stock, style: str, name: str) -> Image.Image | None:
    """The first picture of a thing in a style, on white; None where there is none."""
    picture = next((one for one in stock.pictures.get(name, ()) if one.style == style), None)
    if picture is None:
        return None
    image = load(picture)
    ground = Image.new("RGBA", (round(1.15 * max(image.size)),) * 2, "white")
    ground.alpha_composite(image, ((ground.width - image.width) // 2, (ground.height - image.height) // 2))
    return ground.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def pixels(images: Sequence[Image.Image]) -> Tensor:
    """16 x 16 pixels of each."""
    small = [np.asarray(image.resize((16, 16), Image.Resampling.BOX), dtype=np.float32).ravel() for image in images]
    return torch.from_numpy(np.stack(small))


def open_tower(name: str) -> Encode:
    """The mean of the last states over the patches, by a tower that a folder or a name such as real:vit has."""
    folder = real(name.removeprefix(PREFIX)) if name.startswith(PREFIX) else Path(name)
    if not (folder / "config.json").is_file():
        raise FoveateError(f"{name} is no tower: there is no {folder / 'config.json'}")
    own: dict[str, Any] = {kind.config_class.model_type: kind for kind in (EfficientNetLite, LCNet)}
    for kind in own.values():
        AutoConfig.register(kind.config_class.model_type, kind.config_class, exist_ok=True)
    model = own.get(AutoConfig.from_pretrained(folder).model_type, AutoModel).from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    patches = (SIDE // model.config.patch_size) ** 2

    @torch.no_grad()
    def encode(images: Sequence[Image.Image]) -> Tensor:
        states: Tensor = model(processor(list(images), return_tensors="pt", do_resize=False)["pixel_values"]).last_hidden_state
        return states[:, states.shape[1] - patches :].mean(1)  # without [CLS]

    return encode


def encoded(encode: Encode, images: Sequence[Image.Image]) -> Tensor:
    """(images, width) float32 of length 1, less their mean."""
    parts = [encode(images[start : start + TOGETHER]) for start in range(0, len(images), TOGETHER)]
    found = torch.cat(parts).float()
    return normalize(found - found.mean(0), dim=-1)


def share(sought: Tensor, among: Tensor) -> float:
    """Of rows (n, width), the share whose nearest row (by cosine) has the same number."""
    return float(((sought @ among.T).argmax(1) == torch.arange(len(sought))).float().mean())


def retrieval(stock: Stock, encoders: Mapping[str, Encode], most: int = 500, progress: bool = True) -> list[Row]:
    """A row for each ordered pair of the stock's styles that have at least two things in common, of at most `most` things, always the
    same ones. FoveateError where no two styles have."""
    styles = sorted(stock.styles())
    images: dict[str, dict[str, Image.Image]] = {}
    for style in styles:
        every = ((name, shown(stock, style, name)) for name in sorted(stock.pictures))
        images[style] = {name: image for name, image in every if image is not None}
    pairs = [(a, b) for a, b in permutations(styles, 2) if len(images[a].keys() & images[b].keys()) > 1]
    if not pairs:
        raise FoveateError(f"no two of the styles {', '.join(styles)} show the same things; give several styles")
    rows = []
    for a, b in track(pairs, "seeking", disable=not progress):
        common = sorted(images[a].keys() & images[b].keys(), key=hashed)[:most]
        right = {
            name: share(*(encoded(encode, [images[style][thing] for thing in common]) for style in (a, b)))
            for name, encode in encoders.items()
        }
        rows.append(Row(a, b, len(common), right))
    return rows


def markdown(rows: Sequence[Row]) -> str:
    """A row a pair of styles, and the mean over them."""
    towers = list(rows[0].right)
    lines = [f"| sought | among | things | chance | {' | '.join(towers)} |", f"|---|---|---:|---:|{'---:|' * len(towers)}"]
    for row in rows:
        cells = [f"{100 * row.right[tower]:.1f} %" for tower in towers]
        lines.append(f"| {row.sought} | {row.among} | {row.n} | {100 / row.n:.1f} % | {' | '.join(cells)} |")
    means = [f"{100 * sum(row.right[tower] for row in rows) / len(rows):.1f} %" for tower in towers]
    lines.append(f"| mean | | | | {' | '.join(means)} |")
    return "\n".join(lines) + "\n"


def tell(towers: Sequence[str], styles: Sequence[str], most: int, out: Path | None) -> None:
    """Run the command, and print the table."""
    encoders = {PIXELS: pixels, **{name: open_tower(name) for name in towers}}
    table = markdown(retrieval(open_stock(styles), encoders, most))
    if out is not None:
        write(out, table)
    print(table)
