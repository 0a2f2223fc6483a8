"""Views as pictures: a plan carried out on an image."""

from __future__ import annotations

import numpy as np
from PIL import Image

from foveate.tokens import WHOLE, Canvas, ImagePlan

BICUBIC = int(Image.Resampling.BICUBIC)


def cut(picture: Image.Image, plan: ImagePlan, resample: int = BICUBIC) -> list[Image.Image]:
    """The crops of an image, in order, each as a picture of its own. Those of one canvas are cut from one resized picture, by the filter
    `resample`; a crop without a canvas is left in the image's own pixels, and one that is seen whole as it is."""
    drawn: dict[Canvas, Image.Image] = {}
    found = []
    for crop in plan.crops:
        if crop.canvas is None:
            found.append(picture if crop.box == WHOLE else picture.crop(_pixels(crop.box, picture)))
            continue
        if crop.canvas not in drawn:
            drawn[crop.canvas] = _drawn(picture, crop.canvas, resample)
        view = drawn[crop.canvas].crop(crop.window)
        found.append(view if crop.every == 1 else Image.fromarray(np.asarray(view)[:: crop.every, :: crop.every]))
    return found


def _pixels(box: tuple[float, float, float, float], picture: Image.Image) -> tuple[int, int, int, int]:
    left, top, right, bottom = box
    return round(left * picture.width), round(top * picture.height), round(right * picture.width), round(bottom * picture.height)


def _drawn(picture: Image.Image, canvas: Canvas, resample: int) -> Image.Image:
    picture = picture if picture.mode == "RGB" else picture.convert("RGB")
    picture = picture.resize(canvas.picture, Image.Resampling(resample))
    if canvas.picture == canvas.size:
        return picture
    ground = Image.new("RGB", canvas.size, (canvas.fill,) * 3)
    ground.paste(picture, canvas.at)
    return ground
