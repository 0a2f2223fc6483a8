"""What a tiling makes of images of given sizes, at its published setting: views, tokens, and where each view lies."""

from __future__ import annotations

import json as jsonlib
import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from foveate.errors import FoveateError
from foveate.tilings import TILINGS, parse
from foveate.tokens import ImagePlan

_SHOWN = 12  # rows of views of one image


def tiling_named(text: str) -> bool:
    """Whether an argument names a tiling, and no file."""
    return text.partition(":")[0] in TILINGS and not os.path.exists(text)


def read_size(text: str) -> tuple[int, int]:
    """(width, height) of "1000x500"."""
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise FoveateError(f"image {text!r} is no size; give width and height in pixels, such as 1000x500")
    return int(width), int(height)


def main(spelled: str, sizes: Sequence[tuple[int, int]], *, json: bool = False, console: Console | None = None) -> None:
    """`foveate plan` of a tiling: the images stand in one prompt and share its budget."""
    tiling = parse(spelled)
    plans = tiling.plans(sizes)
    if json:
        print(jsonlib.dumps({"tiling": str(tiling), "images": [described(plan) for plan in plans]}, indent=2))
        return
    console = console or Console()
    if not console.is_terminal:
        console.width = max(console.width, 120)
    sight = tiling.sight
    seen = "patches in the image's own shape" if tiling.shapes else f"views of {sight.side} px"
    console.print(f"{tiling}: {seen}, patches of {sight.patch} px, {sight.merge} x {sight.merge} of them a token", highlight=False)
    total = table("image", "passes of the encoder", "visual tokens", "marks", "placeholders", "tags")
    for plan in plans:
        width, height = plan.size or (0, 0)
        total.add_row(
            f"{width} x {height}", *(str(n) for n in (len(plan.crops), plan.visual, len(plan.marks), plan.tokens, len(plan.tags)))
        )
    if len(plans) > 1:
        sums = [sum(of) for of in zip(*((len(p.crops), p.visual, len(p.marks), p.tokens, len(p.tags)) for p in plans), strict=True)]
        total.add_row("all", *map(str, sums), style="bold")
    console.print(total)
    for plan in plans:
        console.print(views_of(plan))


def views_of(plan: ImagePlan) -> Table:
    """The views of one image, as far as they fit."""
    width, height = plan.size or (0, 0)
    kinds = ", ".join(f"{kind} x {count}" for kind, count in Counter(crop.kind for crop in plan.crops).items())
    found = table(*("view", "kind", "pixels", "shows (left, top, right, bottom)", "tokens"), title=f"{width} x {height}: {kinds}")
    for number, crop in enumerate(plan.crops[:_SHOWN]):
        shown = ", ".join(map(str, box_of(plan, number)))
        found.add_row(str(number), crop.kind, "{} x {}".format(*crop.pixels), shown, str(crop.tokens))
    if len(plan.crops) > _SHOWN:
        found.add_row("…", *[""] * 4)
    return found


def box_of(plan: ImagePlan, number: int) -> tuple[int, int, int, int]:
    """What a view shows, in pixels of the image."""
    (width, height), (left, top, right, bottom) = plan.size or (0, 0), plan.crops[number].box
    return round(left * width), round(top * height), round(right * width), round(bottom * height)


def described(plan: ImagePlan) -> dict[str, Any]:
    views = [
        {"kind": crop.kind, "pixels": list(crop.pixels), "box": list(box_of(plan, i)), "tokens": crop.tokens}
        for i, crop in enumerate(plan.crops)
    ]
    counts = {"passes": len(plan.crops), "visual_tokens": plan.visual, "marks": len(plan.marks), "placeholders": plan.tokens}
    return {"size": list(plan.size or ()), **counts, "tags": list(plan.tags), "views": views}


def table(*columns: str, title: str | None = None) -> Table:
    found = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for column in columns:
        found.add_column(column, justify="left" if column in ("image", "view", "kind") else "right", overflow="fold")
    return found
