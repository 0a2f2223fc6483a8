"""What reducers keep of a picture, drawn: one panel for each reducer and budget, or for each layer at which the set changes.

Dropped patches are greyed, kept ones are clear. Patches that live on together in one merged token share an outline of one colour, also
where they lie apart in the picture; with more merged tokens than colours, only tokens that touch are sure to differ.

The pictures of the documentation are made by

    foveate look scene:27 --ask "what number is printed?" --reduce divprune --reduce fastv --reduce tome --keep 0.5,0.25,0.11 \\
        --out docs/pictures/kept.png
    foveate look scene:13 --ask "what digit is handwritten?" --reduce pyramiddrop --per-layer --out docs/pictures/pyramiddrop.png
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from foveate import inference
from foveate.anatomy import read
from foveate.data import conversations, pixels
from foveate.data.chat import Renderer
from foveate.engine.attach import attach
from foveate.engine.run import Run
from foveate.errors import FoveateError
from foveate.inference import answering, load_model, model_inputs, prompts
from foveate.reducers import Reducer, in_model, parse, prepare
from foveate.report import figures
from foveate.report.demo import spell as said
from foveate.tokens import TokenMap
from foveate.world.pictures import render, scene

COLOURS = ("#e69f00", "#56b4e9", "#d55e00", "#009e73", "#cc79a7", "#f0e442", "#0072b2")
"""Of merged tokens: Okabe and Ito's, which colour-blind readers can tell apart."""
SCENE = "scene:"
_MODEL = "asset:vlm"
_SIDE = 128  # px of an embedded scene, as in the world that the shipped models are trained on
_GREY, _LEFT = 128, 0.22  # a dropped patch is this grey, but for this share of its own brightness
_CHANGED = "#b3400e"
_DPI = 150

Cell = tuple[int, int]
Pixels = NDArray[np.uint8]


# ---- what became of the patches ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Patch:
    """A visual token as it came to the language model: its place, and the slot of the token that it lives in, None where it was dropped.
    What went into several tokens lives in the first."""

    image: int
    crop: int
    frame: int
    row: int
    column: int
    token: int | None


@dataclass(frozen=True)
class Raster:
    """The patches of one image, or of one crop or frame of it. `shape`: (rows, columns); cells without a patch are not in `cells`."""

    image: int
    crop: int
    frame: int
    shape: tuple[int, int]
    cells: dict[Cell, int | None]


def patches(whole: TokenMap, row: int = 0) -> list[Patch]:
    """The patches of a batch row under a map, such as `run.last.provenance(layer)`, in sequence order."""
    members = whole.member[row].tolist()
    weights = None if whole.weight is None else whole.weight[row].tolist()
    lives: dict[int, int] = {}
    for slot, sources in enumerate(members):
        for at, source in enumerate(sources):
            if source >= 0 and (weights is None or weights[slot][at] != 0):
                lives.setdefault(source, slot)
    found = []
    for source in whole.source.visual[row].nonzero()[:, 0].tolist():
        image, crop, frame, line, column = whole.source.place[row, source].tolist()
        found.append(Patch(image, crop, frame, line, column, lives.get(source)))
    return found


def rasters(found: Sequence[Patch]) -> list[Raster]:
    """Patches by image, crop and frame, in the order in which they come. FoveateError if one has no row and column."""
    if any(patch.row < 0 or patch.column < 0 for patch in found):
        raise FoveateError("its visual tokens have no rows and columns, so what was kept of a picture cannot be drawn")
    cells: dict[tuple[int, int, int], dict[Cell, int | None]] = {}
    shapes: dict[int, tuple[int, int]] = {}
    base: dict[int, tuple[int, int]] = {}
    for patch in found:
        if patch.crop <= 0:
            rows, columns = base.get(patch.image, (0, 0))
            base[patch.image] = max(rows, patch.row + 1), max(columns, patch.column + 1)
    for patch in found:
        own = cells.setdefault((patch.image, patch.crop, patch.frame), {})
        # Tiles have their places in the mosaic, and each of them the shape of the whole picture's crop.
        rows, columns = base.get(patch.image, (0, 0)) if patch.crop > 0 else (0, 0)
        at = patch.row % rows if rows else patch.row, patch.column % columns if columns else patch.column
        own[at] = patch.token if patch.token is not None else own.get(at)
        # A tile whose padding was cut off still has the shape of the image's other tiles.
        rows, columns = shapes.get(patch.image, (0, 0))
        shapes[patch.image] = max(rows, at[0] + 1), max(columns, at[1] + 1)
    return [Raster(*key, shapes[key[0]], own) for key, own in cells.items()]


def colours(found: Sequence[Raster], before: Sequence[Raster] = (), shades: dict[int, str] | None = None) -> dict[int, str]:
    """A colour for every token that holds more than one patch; tokens that touch have different ones.

    before, shades: the rasters of an earlier layer and their colours, which tokens keep where they can.
    """
    held: dict[int, list[tuple[int, Cell]]] = {}
    touching: dict[int, set[int]] = {}
    for number, raster in enumerate(found):
        for (row, column), token in raster.cells.items():
            if token is None:
                continue
            held.setdefault(token, []).append((number, (row, column)))
            for down, right in ((0, 1), (1, -1), (1, 0), (1, 1)):
                other = raster.cells.get((row + down, column + right))
                if other is not None and other != token:
                    touching.setdefault(token, set()).add(other)
                    touching.setdefault(other, set()).add(token)
    given: dict[int, str] = {}
    used: Counter[str] = Counter()
    for token, own in held.items():
        if len(own) == 1:
            continue
        near = {given[other] for other in touching.get(token, ()) if other in given}
        earlier = [before[number].cells.get(cell) for number, cell in own if number < len(before)]
        kept = Counter(shades[t] for t in earlier if t is not None and t in shades) if shades else Counter[str]()
        # The rarest that no neighbour has; where the neighbours have all seven, the rarest.
        colour = min(COLOURS, key=lambda c: (c in near, -kept[c], used[c], COLOURS.index(c)))
        given[token] = colour
        used[colour] += 1
    return given


# ---- asking --------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Panel:
    """One drawing: its rasters, their names, the picture under each where that is known, the colours of merged tokens, and what is
    written above; `changed`: the answer is not the bare model's."""

    rasters: list[Raster]
    names: list[str]
    pictures: list[Image.Image | None]
    shades: dict[int, str]
    title: str
    line: str
    changed: bool = False


@dataclass(frozen=True)
class _Asked:
    """What the model answered under some reducers, and what was seen on the way."""

    answer: str
    run: Run
    processor: Any
    inputs: Any
    images: list[Image.Image]


def main(
    words: Sequence[str], question: str, reducers: Sequence[str], keep: str | None, layers: Sequence[str], per_layer: bool, out: Path
) -> Path:
    """The command: reads its lists, looks, and writes the figure as a PNG file. `words`: the model, which may be missing, and images."""
    if out.suffix.lower() != ".png":
        raise FoveateError(f"{out}: the picture is a PNG; name a file that ends in .png")
    budgets = [_share(text) for text in _listed("keep", [keep])] if keep is not None else []
    numbers = _listed("layer", layers)
    for number in numbers:
        if not number.isdecimal():
            raise FoveateError(f"--layer {number} is no layer; give numbers from 0 on, such as --layer 0,2,4")
    only_images = len(words) == 1 or words[0].startswith(SCENE) or Path(words[0]).is_file()
    model, images = (_MODEL, words) if only_images else (words[0], words[1:])
    figure = look(model, images, question, reducers, keep=budgets, layers=[int(number) for number in numbers], per_layer=per_layer)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, format="png", metadata={"Software": None}, pil_kwargs={"optimize": True})
    except OSError as error:
        raise FoveateError(f"cannot write {out}: {error}") from error
    return out


def _share(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise FoveateError(f"keep={text!r} is not possible; give shares of the visual tokens in (0, 1]") from error


def _listed(option: str, texts: Sequence[str]) -> list[str]:
    """The entries of an option that may be given more than once, each time with several between commas."""
    entries = [entry.strip() for text in texts for entry in text.split(",")]
    if not all(entries):
        raise FoveateError(f"--{option} {','.join(texts)} has an empty entry; put one comma between two of them")
    return entries


def look(
    model_or_dir: Any,
    images: Sequence[str | Path | Image.Image],
    question: str,
    reducers: Sequence[str],
    *,
    processor: Any = None,
    keep: Sequence[float] = (),
    layers: Sequence[int] = (),
    per_layer: bool = False,
    max_new_tokens: int = 32,
) -> Figure:
    """A figure of what `reducers`, each a spelling, leave of `images` when the model is asked `question`, with its answers.

    model_or_dir: a folder, hub name or "asset:" name, or a loaded model together with its `processor`.
    images: files, pictures, or "scene:7" for a test scene of the embedded world; the question is about all of them.
    keep: budgets, shares of the visual tokens; every reducer is drawn at each of them, in columns.
    layers: decoder layers in front of which to look; per_layer: every layer in front of which the set changes. Without either, what is
        left at the end.
    FoveateError for what cannot be: images that cannot be read, unknown reducers, methods that cannot be set to a budget, layers that the
    model does not have, a model whose visual tokens have no place in the picture.
    """
    if not question.strip():
        raise FoveateError("the question is empty: what is kept may depend on it, and an answer needs one")
    if not images or not reducers:
        raise FoveateError('nothing to look at: name at least one image and one reducer, such as "random:keep=0.25"')
    if layers and per_layer:
        raise FoveateError("give either layers or per_layer, not both")
    methods = [(text, parse(text)) for text in reducers]
    rows = [[at_budget(parts, share) for share in keep] if keep else [(text, parts)] for text, parts in methods]
    pictures = [open_image(image) for image in images]
    name = str(model_or_dir)
    if isinstance(model_or_dir, str | Path):
        model, processor = load_model(model_or_dir)
    else:
        model, name = model_or_dir, str(model_or_dir.config.name_or_path or type(model_or_dir).__name__)
    if Path(name).is_dir():
        name = Path(name).resolve().name  # the picture is for others, who have no such folder
    if processor is None:
        raise FoveateError("look needs the processor of a model that is already loaded: look(model, …, processor=...)")
    depth = len(read(model).layers)
    for layer in layers:
        if not 0 <= layer < depth:
            raise FoveateError(f"there is no layer {layer}: the model has {depth} decoder layers, 0 to {depth - 1}")

    markers = (conversations.MARKER + "\n") * len(pictures)
    prompt = prompts(processor, [question if conversations.MARKER in question else markers + question])[0]
    bare = _ask(model, processor, pictures, prompt, [], max_new_tokens)
    total = bare.run.last.visual_tokens[0]
    asked = question.replace(conversations.MARKER, "").strip()
    head = asked, f"{name}, all {total} tokens: “{said(bare.answer)}”"
    panels: list[list[Panel]] = []
    for row in rows:
        drawn = []
        for text, parts in row:
            seen = _ask(model, processor, pictures, prompt, parts, max_new_tokens)
            counts, cuts = seen.run.last.visual_tokens, sorted(seen.run.last.maps)
            own: list[Panel] = []
            for layer in (cuts or [0]) if per_layer else layers or [depth - 1]:
                where = f"layer {layer}: " if per_layer or layers else ""
                since = f" from layer {cuts[-1]}" if not where and cuts and cuts[-1] else ""
                line = f"{where}{counts[layer]} of {total} tokens{since}, “{said(seen.answer)}”"
                own.append(_panel(seen, layer, text, line, bare.answer, own[-1] if own else None))
            drawn.append(own)
        # Layers stand side by side, and budgets then one below the other.
        panels += drawn if per_layer or layers else [[panel for own in drawn for panel in own]]
    if all(len(row) == 1 for row in panels):
        return draw(*head, pictures, _rows_of(3, [[panel for row in panels for panel in row]]))
    return draw(*head, pictures, _rows_of(4, panels))


def open_image(image: str | Path | Image.Image) -> Image.Image:
    """A picture as it is, a file, or the test scene that "scene:7" names."""
    if isinstance(image, Image.Image):
        return pixels.open_image(image)
    if not str(image).startswith(SCENE):
        return pixels.open_image(Path(image))
    seed = str(image).removeprefix(SCENE)
    if not seed.isdecimal():
        raise FoveateError(f"{image}: a scene is named by a number, such as {SCENE}7")
    return Image.fromarray(render(scene(int(seed), "test"), _SIDE))


def at_budget(reducers: Sequence[Reducer], keep: float) -> tuple[str, list[Reducer]]:
    """The methods at a share of the visual tokens, and their spelling with what it sets. FoveateError where one cannot be set to it."""
    if not 0 < keep <= 1:
        raise FoveateError(f"keep={keep:g} is not possible; give shares of the visual tokens in (0, 1]")
    if not reducers:
        raise FoveateError(f"the bare model has no budget, so it cannot be drawn at keep={keep:g}")
    found = [part.at(keep) for part in reducers]
    return "+".join(part.spelled(always=part.amounts) for part in found), found


def _ask(model: Any, processor: Any, pictures: list[Image.Image], prompt: str, reducers: list[Reducer], new: int) -> _Asked:
    """Greedy, with the reducers attached."""
    pictures = [prepare(reducers, picture) for picture in pictures]
    inputs = model_inputs(processor, [pictures], [prompt]).to(model.device, model.dtype)
    with answering(model), attach(model, in_model(reducers)) as run:
        [said] = inference.answer(model, processor.tokenizer, inputs, end=Renderer(processor).end_id, max_new_tokens=new)
    return _Asked(said.text, run, processor, inputs, pictures)


def _panel(seen: _Asked, layer: int, title: str, line: str, bare: str, earlier: Panel | None) -> Panel:
    """What is left in front of a layer. `bare`: the bare model's answer; `earlier`: the panel of an earlier layer."""
    core: Any = seen.run.anatomy.core
    try:
        found = rasters(patches(seen.run.last.provenance(layer)))
    except FoveateError as error:
        bridge = getattr(core, "bridge", None)
        if bridge is None:
            raise FoveateError(f"{type(core).__name__}: {error}") from error
        raise FoveateError(
            f"the {bridge.kind} bridge makes its tokens by learned queries that look at whole windows of patches, so that none of them has "
            "a place of its own in the picture: what was kept of it cannot be drawn. foveate profile counts it, layer by layer"
        ) from error
    shades = colours(found) if earlier is None else colours(found, earlier.rasters, earlier.shades)
    return Panel(found, _names(found, len(seen.images)), _pictures(seen, found), shades, title, line, seen.answer != bare)


def _names(found: list[Raster], images: int) -> list[str]:
    """What rasters are called; one that is alone needs no name."""
    if len(found) == 1:
        return [""]
    items = len({raster.image for raster in found})
    names = []
    for raster in found:
        # Some models take the tiles of an image for images of their own.
        parts = [f"{'image' if items == images else 'part'} {raster.image + 1}"] if items > 1 else []
        parts += [f"crop {raster.crop + 1}"] if raster.crop >= 0 else []
        parts += [f"frame {raster.frame + 1}"] if raster.frame >= 0 else []
        names.append(", ".join(parts))
    return names


def _pictures(seen: _Asked, found: list[Raster]) -> list[Image.Image | None]:
    """For each raster the picture under it: what the tower was shown, so that the processor's cropping and padding is in it. None where
    it is not known which part of an image a raster covers."""
    whole: list[Image.Image | None] = [None] * len(found)
    if len(found) == len(seen.images):
        whole = [seen.images[raster.image] for raster in found]
    pixels = seen.inputs.get("pixel_values")
    if not isinstance(pixels, Tensor) or pixels.ndim < 4 or len(pixels.flatten(0, -4)) != len(found):
        return whole
    frames = pixels.flatten(0, -4).detach().to("cpu", torch.float32)
    how: Any = getattr(seen.processor, "image_processor", None)
    if getattr(how, "do_normalize", False):
        frames = frames * torch.tensor(how.image_std).view(-1, 1, 1) + torch.tensor(how.image_mean).view(-1, 1, 1)
    out: list[Image.Image | None] = []
    for frame, image in zip(frames, whole, strict=True):
        shown = Image.fromarray((frame.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())
        if image is not None:
            # Where the processor did no more than resize, the image itself is sharper.
            apart = np.abs(np.asarray(image.resize(shown.size, Image.Resampling.BICUBIC), np.float32) - np.asarray(shown, np.float32))
            shown = image if apart.mean() < 8 else shown
        out.append(shown)
    return out


# ---- drawing -------------------------------------------------------------------------------------------------------------------------


def draw(question: str, answer: str, images: Sequence[Image.Image], panels: Sequence[Sequence[Panel]]) -> Figure:
    """On top the images, the question and the bare model's answer, under them the panels in rows. Sizes are in inches, for a page 1,000 px
    wide."""
    columns = max(len(row) for row in panels)
    width = min(10.0, max(6.5, 3.4 * columns))
    margin, gap, small, large = 0.1, 0.2, 0.17, 0.23  # the last two: lines of text
    side = min((width - 2 * margin - gap * (columns - 1)) / columns, 4.2)
    sizes = [_places(panel.rasters, side)[1:] for row in panels for panel in row]
    tall = side * min(1.5, max(high / wide for wide, high in sizes))
    letters = int(side * 13)
    written = [[(_spelling(panel.title, letters), _wrapped(panel.line, letters)) for panel in row] for row in panels]
    above = [small * max(len(title) + len(lines) for title, lines in row) + 0.07 for row in written]
    shapes = [image.width / image.height for image in images]
    thumb = min(0.85, 0.45 * width / sum(shapes))
    left = margin + sum(thumb * shape + 0.05 for shape in shapes) + 0.1
    room = width - left - margin
    asked, told = textwrap.wrap(question, int(room * 8)), _wrapped(answer, int(room * 11.5))
    key = textwrap.wrap(_key(panels), int(room * 15))
    top = max(thumb, large * len(asked) + 0.19 * len(told) + small * len(key) + 0.06) + 2 * margin
    height = top + sum(above) + (tall + gap) * len(panels)
    with figures.style():
        figure = Figure(figsize=(width, height), dpi=_DPI, facecolor="white")

        def add(left: float, down: float, wide: float, high: float) -> Any:
            axes = figure.add_axes((left / width, 1 - (down + high) / height, wide / width, high / height))
            axes.set_axis_off()
            return axes

        def write(left: float, down: float, lines: list[str], **how: Any) -> None:
            figure.text(left / width, 1 - down / height, "\n".join(lines), va="top", parse_math=False, **how)

        at = margin
        for image, shape in zip(images, shapes, strict=True):
            add(at, margin, thumb * shape, thumb).imshow(image, aspect="auto")
            at += thumb * shape + 0.05
        write(left, margin, asked, fontsize=13, fontweight="bold")
        write(left, margin + large * len(asked) + 0.03, told, fontsize=10)
        write(left, margin + large * len(asked) + 0.19 * len(told) + 0.09, key, fontsize=8, color="#606060")
        down = top
        for row, texts, own in zip(panels, written, above, strict=True):
            for column, (panel, (title, lines)) in enumerate(zip(row, texts, strict=True)):
                left = margin + column * (side + gap)
                axes = add(left, down + own, side, tall)
                below = small * len(lines)
                axes.set_title("\n".join(title), loc="left", fontsize=9, fontweight="bold", pad=72 * below + 6, parse_math=False)
                write(left, down + own - below - 0.02, lines, fontsize=9, color=_CHANGED if panel.changed else None)
                _draw_panel(axes, panel, side)
            down += own + tall + gap
    return figure


def _key(panels: Sequence[Sequence[Panel]]) -> str:
    """What the drawings mean, as far as it is seen in them."""
    every = [panel for row in panels for panel in row]
    words = []
    if any(token is None for panel in every for raster in panel.rasters for token in raster.cells.values()):
        words.append("grey: dropped")
    if any(panel.shades for panel in every):
        repeated = any(len(panel.shades) > len(COLOURS) for panel in every)
        words.append("outlined: merged into one token; " + ("tokens apart may share a colour" if repeated else "one colour, one token"))
    if any(panel.changed for panel in every):
        words.append("orange text: another answer")
    return " · ".join(words)


def _rows_of(most: int, rows: Sequence[Sequence[Panel]]) -> list[list[Panel]]:
    return [list(row[at : at + most]) for row in rows for at in range(0, len(row), most)]


def _spelling(text: str, letters: int) -> list[str]:
    """A reducer's spelling, broken behind commas where it is too long for one line."""
    return [text] if len(text) <= letters else textwrap.wrap(text.replace(",", ", "), letters, break_on_hyphens=False)


def _wrapped(text: str, letters: int) -> list[str]:
    return textwrap.wrap(text, letters, max_lines=3, placeholder=" …”", break_on_hyphens=False)


def _places(found: Sequence[Raster], inches: float) -> tuple[list[tuple[float, float]], float, float]:
    """Left and upper edge of each raster, in cells, side by side in as many rows as make a square; width and height of it all, which is
    to be `inches` wide."""
    each = ceil(sqrt(len(found)))
    cell = max(raster.shape[1] for raster in found)
    gap = 0.04 * cell
    wide = each * (cell + gap) - gap
    name = 0.0 if len(found) == 1 else 0.17 * wide / inches
    places: list[tuple[float, float]] = []
    high = 0.0
    for start in range(0, len(found), each):
        own = found[start : start + each]
        places += [(number * (cell + gap), high + name) for number in range(len(own))]
        high += name + max(raster.shape[0] for raster in own) + gap
    return places, wide, high - gap


def _draw_panel(axes: Any, panel: Panel, inches: float) -> None:
    places, wide, high = _places(panel.rasters, inches)
    axes.set_xlim(0, wide)
    axes.set_ylim(high, 0)
    axes.set_aspect("equal", anchor="NW")
    points = 72 * inches / wide  # of one cell
    stroke = min(2.4, max(0.7, 0.08 * points))
    for raster, (left, top), name, picture in zip(panel.rasters, places, panel.names, panel.pictures, strict=True):
        rows, columns = raster.shape
        axes.imshow(_pixels(raster, picture), extent=(left, left + columns, top + rows, top), interpolation="antialiased", zorder=1)
        for shade, width in (("#202020", 1.0), ("#ffffff", 0.5)):
            edges = [[(left + x, top + y) for x, y in edge] for edge in _edges(raster)]
            axes.add_collection(LineCollection(edges, colors=shade, linewidths=width, capstyle="butt", zorder=2))
        outlines = {
            token: [[(left + x, top + y) for x, y in edge] for edge in _outline(raster, token, (stroke / 2 + 0.6) / points)]
            for token in panel.shades
        }
        # All dark lines go under all coloured ones, or they would cut them where two segments meet.
        dark = [edge for edges in outlines.values() for edge in edges]
        axes.add_collection(LineCollection(dark, colors="#202020", linewidths=stroke + 1.0, capstyle="projecting", zorder=3))
        for token, edges in outlines.items():
            axes.add_collection(LineCollection(edges, colors=panel.shades[token], linewidths=stroke, capstyle="projecting", zorder=4))
        axes.text(left, top - 0.04 * wide / inches, name, fontsize=8, va="bottom", ha="left")
    axes.set_xlim(0, wide)
    axes.set_ylim(high, 0)


def _pixels(raster: Raster, picture: Image.Image | None) -> Pixels:
    """The picture stretched over the raster, grey where a patch was dropped and white where there is none."""
    rows, columns = raster.shape
    cell = max(8, 640 // max(rows, columns))
    if picture is None:
        picture = Image.new("RGB", (columns, rows), (226, 226, 226))
    clear = np.asarray(picture.resize((columns * cell, rows * cell), Image.Resampling.BICUBIC), np.float32)
    brightness = clear @ np.array([0.299, 0.587, 0.114], np.float32)
    grey = (_LEFT * brightness + (1 - _LEFT) * _GREY)[..., None]
    state = np.full((rows, columns), 2)
    for at, token in raster.cells.items():
        state[at] = 1 if token is None else 0
    state = state.repeat(cell, 0).repeat(cell, 1)[..., None]
    out: Pixels = np.where(state == 0, clear, np.where(state == 1, grey, 255)).round().astype(np.uint8)
    return out


def _edges(raster: Raster) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Where kept patches meet dropped ones."""
    for (row, column), token in raster.cells.items():
        for down, right in ((1, 0), (0, 1)):
            other = row + down, column + right
            if other in raster.cells and (raster.cells[other] is None) != (token is None):
                yield (column + right, row + down), (column + 1, row + 1)


def _outline(raster: Raster, token: int, inset: float) -> Iterator[tuple[tuple[float, float], tuple[float, float]]]:
    """The boundary of a token's patches, a little inside of it, so that two tokens' lines do not cover each other."""
    own = {at for at, lives in raster.cells.items() if lives == token}
    for row, column in own:
        for down, right in ((-1, 0), (1, 0), (0, -1), (0, 1)):
            if (row + down, column + right) in own:
                continue
            ends = []
            for sign in (-1, 1):
                # Along the side: it turns inwards at a corner of the region, runs on, or meets the side that comes in from a bend.
                along = row + sign * abs(right), column + sign * abs(down)
                beyond = along[0] + down, along[1] + right
                end = 0.5 - inset if along not in own else 0.5 + inset if beyond in own else 0.5
                out = 0.5 - inset
                ends.append((column + 0.5 + right * out + sign * end * abs(down), row + 0.5 + down * out + sign * end * abs(right)))
            yield ends[0], ends[1]
