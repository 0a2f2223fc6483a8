"""What reducers keep of a picture, drawn: one panel for each reducer and budget, or for each layer at which the set changes.

Dropped patches are greyed, kept ones are clear. Patches that live on together in one merged token share an outline of one colour, also
where they lie apart in the picture; with more merged tokens than colours, only tokens that touch are sure to differ.

The pictures of the documentation are made by

    foveate look scene:27 --ask "what number is printed?" --reduce divprune --reduce fastv --reduce tome --keep 0.5,0.25,0.11 \\
        --out docs/pictures/kept.png
    foveate look scene:13 --ask "what digit is handwritten?" --reduce pyramiddrop --per-layer --out docs/pictures/pyramiddrop.png

Of a clip each panel is a strip of its frames. A model without videos is shown them as pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from foveate import inference
from foveate.anatomy import read
from foveate.data import conversations, pixels
from foveate.data.chat import Renderer, takes_videos
from foveate.data.clips import Clip, open_clip
from foveate.engine.attach import attach
from foveate.engine.run import Run
from foveate.errors import FoveateError
from foveate.inference import answering, loaded, model_inputs, prompts, retiled, strategies
from foveate.inspect.draw import Panel, draw
from foveate.inspect.fate import Raster, colours, patches, rasters
from foveate.inspect.paths import Path as Search
from foveate.inspect.paths import draw_paths
from foveate.inspect.words import answer_text
from foveate.reducers import Reducer, in_model, parse, prepare
from foveate.tokens import ImagePlan
from foveate.world.pictures import render, scene

SCENE = "scene:"
_MODEL = "asset:vlm"
_STRIP, _THUMBS = 8, 4  # frames of a clip side by side, and those that stand beside the question
_SIDE = 128  # px of an embedded scene, as in the world that the shipped models are trained on


@dataclass(frozen=True)
class _Asked:
    """What the model answered under some reducers, and what was seen on the way."""

    answer: str
    run: Run
    processor: Any
    inputs: Any
    images: list[Image.Image]
    clip: Clip | None = None


def main(
    words: Sequence[str],
    question: str,
    reducers: Sequence[str],
    keep: str | None,
    layers: Sequence[str],
    per_layer: bool,
    out: Path,
    tiling: str | None = None,
    searches: Sequence[str] = (),
    frames: str | None = None,
) -> Path:
    """The command: reads its lists, looks, and writes the figure as a PNG file. `words`: the model, which may be missing, and images; with
    `frames`, a sampling, one film. `searches`: strategies, whose paths are drawn in the place of what reducers keep."""
    if out.suffix.lower() != ".png":
        raise FoveateError(f"{out}: the picture is a PNG; name a file that ends in .png")
    budgets = [_share(text) for text in _listed("keep", [keep])] if keep is not None else []
    numbers = _listed("layer", layers)
    for number in numbers:
        if not number.isdecimal():
            raise FoveateError(f"--layer {number} is no layer; give numbers from 0 on, such as --layer 0,2,4")
    only_images = len(words) == 1 or words[0].startswith(SCENE) or Path(words[0]).is_file()
    model, images = (_MODEL, words) if only_images else (words[0], words[1:])
    drawn: dict[str, Any] = {"keep": budgets, "layers": [int(number) for number in numbers], "per_layer": per_layer, "tiling": tiling}
    if searches:
        if budgets or numbers or per_layer or frames is not None:
            raise FoveateError(
                "--strategy draws the way of a search in a picture; --keep, --layer, --per-layer and --frames are about what reducers keep"
            )
        figure = look_for(model, images, question, searches, reducers or ["none"], tiling=tiling)
    elif frames is not None and len(images) != 1:
        raise FoveateError(f"--frames is for one film, and {len(images)} are named")
    else:
        figure = look(model, images if frames is None else [open_clip(images[0], frames)], question, reducers, **drawn)
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
    images: Sequence[str | Path | Image.Image | Clip],
    question: str,
    reducers: Sequence[str],
    *,
    processor: Any = None,
    keep: Sequence[float] = (),
    layers: Sequence[int] = (),
    per_layer: bool = False,
    max_new_tokens: int = 32,
    tiling: str | None = None,
) -> Figure:
    """A figure of what `reducers`, each a spelling, leave of `images` when the model is asked `question`, with its answers.

    model_or_dir: a folder, hub name or "asset:" name, or a loaded model together with its `processor`.
    images: files, pictures, or "scene:7" for a test scene of the embedded world; the question is about all of them. Or one clip.
    keep: budgets, shares of the visual tokens; every reducer is drawn at each of them, in columns.
    layers: decoder layers in front of which to look; per_layer: every layer in front of which the set changes. Without either, what is
        left at the end.
    tiling: cut the images so, where the model is Foveate's own (`foveate.inference.retiled`).
    FoveateError for what cannot be: images that cannot be read, unknown reducers, methods that cannot be set to a budget, layers that the
    model does not have, a model whose visual tokens have no place in the picture.
    """
    if not question.strip():
        raise FoveateError("the question is empty: what is kept may depend on it, and an answer needs one")
    if not images or not reducers:
        raise FoveateError('nothing to look at: name at least one image and one reducer, such as "random:keep=0.25", or a strategy')
    if layers and per_layer:
        raise FoveateError("give either layers or per_layer, not both")
    methods = [(text, parse(text)) for text in reducers]
    rows = [[at_budget(parts, share) for share in keep] if keep else [(text, parts)] for text, parts in methods]
    clip = images[0] if len(images) == 1 and isinstance(images[0], Clip) else None
    pictures = [open_image(image) for image in images] if clip is None else list(clip.frames)  # type: ignore[arg-type]
    model, processor, name = loaded(model_or_dir, processor, "look(model, …, processor=...)")
    retiled(model, processor, tiling)
    if Path(name).is_dir():
        name = Path(name).resolve().name  # the picture is for others, who have no such folder
    depth = len(read(model).layers)
    for layer in layers:
        if not 0 <= layer < depth:
            raise FoveateError(f"there is no layer {layer}: the model has {depth} decoder layers, 0 to {depth - 1}")

    prompt = prompt_of(processor, question, len(pictures), clip)
    bare = _ask(model, processor, pictures, prompt, [], max_new_tokens, clip)
    total = bare.run.last.visual_tokens[0]
    asked = question.replace(conversations.MARKER, "").strip()
    head = asked, f"{name}, all {total} tokens: “{answer_text(bare.answer)}”"
    panels: list[list[Panel]] = []
    for row in rows:
        drawn = []
        for text, parts in row:
            seen = _ask(model, processor, pictures, prompt, parts, max_new_tokens, clip)
            counts, cuts = seen.run.last.visual_tokens, sorted(seen.run.last.maps)
            own: list[Panel] = []
            for layer in (cuts or [0]) if per_layer else layers or [depth - 1]:
                where = f"layer {layer}: " if per_layer or layers else ""
                since = f" from layer {cuts[-1]}" if not where and cuts and cuts[-1] else ""
                line = f"{where}{counts[layer]} of {total} tokens{since}, “{answer_text(seen.answer)}”"
                own.append(_panel(seen, layer, text, line, bare.answer, own[-1] if own else None))
            drawn.append(own)
        # Layers stand side by side, and budgets then one below the other.
        panels += drawn if per_layer or layers else [[panel for own in drawn for panel in own]]
    if clip is not None:
        few = pictures[:: -(-len(pictures) // _THUMBS)]
        return draw(*head, few, [[replace(panel, across=min(_STRIP, len(panel.rasters)))] for row in panels for panel in row])
    if all(len(row) == 1 for row in panels):
        return draw(*head, pictures, _rows_of(3, [[panel for row in panels for panel in row]]))
    return draw(*head, pictures, _rows_of(4, panels))


def look_for(
    model_or_dir: Any,
    images: Sequence[str | Path | Image.Image],
    question: str,
    searches: Sequence[str],
    reducers: Sequence[str] = ("none",),
    *,
    processor: Any = None,
    max_new_tokens: int = 32,
    tiling: str | None = None,
) -> Figure:
    """A figure of how strategies search an image for the answer to `question`, each a spelling, under each of the `reducers`.

    Arguments as those of `look`. FoveateError for what cannot be: more images than one, or none, unknown strategies and reducers, budgets
    below one answer."""
    found = [(search, strategies.parse(search), under, parse(under)) for search in searches for under in reducers]
    pictures = [open_image(image) for image in images]
    model, processor, name = loaded(model_or_dir, processor, "look_for(model, …, processor=...)")
    retiled(model, processor, tiling)
    if Path(name).is_dir():
        name = Path(name).resolve().name
    paths: list[Search] = []
    for search, strategy, under, parts in found:
        with strategies.opened(model, processor, parts) as eyes:
            seen = strategy.run(eyes, pictures, question, new_tokens=max_new_tokens)
        paths.append(Search(search if under == "none" else f"{search} + {under}", seen, False))
    with strategies.opened(model, processor) as eyes:
        bare, _ = eyes.say(eyes.write(pictures, question), max_new_tokens)
    paths = [replace(path, changed=path.found.answer != bare) for path in paths]
    return draw_paths(question, f"{name}, the whole picture: “{answer_text(bare)}”", pictures[0], paths)


def open_image(image: str | Path | Image.Image) -> Image.Image:
    """A picture as it is, a file, or the test scene that "scene:7" names."""
    if isinstance(image, Clip):
        raise FoveateError(f"{image.name}: a clip is looked at by itself, without other images")
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


def prompt_of(processor: Any, question: str, pictures: int, clip: Clip | None) -> str:
    """About so many pictures, or about a clip."""
    if clip is not None and takes_videos(processor):
        return Renderer(processor).prompt([{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question}]}])
    markers = (conversations.MARKER + "\n") * pictures
    return prompts(processor, [question if conversations.MARKER in question else markers + question])[0]


def _ask(
    model: Any, processor: Any, pictures: list[Image.Image], prompt: str, reducers: list[Reducer], new: int, clip: Clip | None = None
) -> _Asked:
    """Greedy, with the reducers attached. The pictures may be the frames of a clip."""
    pictures = [prepare(reducers, picture) for picture in pictures]
    if clip is not None and takes_videos(processor):
        inputs = model_inputs(processor, [[]], [prompt], [[replace(clip, frames=tuple(pictures))]])
    else:
        inputs = model_inputs(processor, [pictures], [prompt])
    inputs = inputs.to(model.device, model.dtype)
    with answering(model), attach(model, in_model(reducers)) as run:
        [said] = inference.answer(model, processor.tokenizer, inputs, end=Renderer(processor).end_id, max_new_tokens=new)
    return _Asked(said.text, run, processor, inputs, pictures, clip)


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
    names = _names(found, len(seen.images)) if seen.clip is None else [f"{seen.clip.times[at]:.1f} s" for at in _frames(seen, found)]
    return Panel(found, names, _pictures(seen, found), shades, title, line, seen.answer != bare)


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
    if seen.clip is not None:
        whole = [seen.images[at] for at in _frames(seen, found)]
    elif len(found) == len(seen.images):
        whole = [seen.images[raster.image] for raster in found]
    pixels, sizes = seen.inputs.get("pixel_values"), seen.inputs.get("image_sizes")
    if isinstance(pixels, Tensor) and isinstance(sizes, Tensor) and hasattr(seen.processor, "tiling"):  # a model of ours: by its plans
        config: Any = seen.run.anatomy.core.config
        frames = _views(pixels, config.plans_of(sizes, pixels.shape[-1], seen.inputs.get("view_tokens")), found)
    elif not isinstance(pixels, Tensor) or pixels.ndim < 4 or len(pixels.flatten(0, -4)) != len(found):
        return whole
    else:
        frames = list(pixels.flatten(0, -4).detach().to("cpu", torch.float32))
    how: Any = getattr(seen.processor, "image_processor", None)
    if getattr(how, "do_normalize", False):
        frames = [frame * torch.tensor(how.image_std).view(-1, 1, 1) + torch.tensor(how.image_mean).view(-1, 1, 1) for frame in frames]
    out: list[Image.Image | None] = []
    for frame, image in zip(frames, whole, strict=True):
        shown = Image.fromarray((frame.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())
        if image is not None:
            # Where the processor did no more than resize, the image itself is sharper.
            apart = np.abs(np.asarray(image.resize(shown.size, Image.Resampling.BICUBIC), np.float32) - np.asarray(shown, np.float32))
            shown = image if apart.mean() < 8 else shown
        out.append(shown)
    return out


def _frames(seen: _Asked, found: list[Raster]) -> list[int]:
    """Which frame of the clip each raster is; where a model makes one of two, the first of them."""
    return [number * len(seen.images) // len(found) for number in range(len(found))]


def _views(pixels: Tensor, plans: Sequence[ImagePlan], found: list[Raster]) -> list[Tensor]:
    """What the tower was shown of each raster, (channels, height, width)."""
    starts = [sum(len(plan.crops) for plan in plans[:i]) for i in range(len(plans))]
    views = []
    for raster in found:
        at = plans[raster.image].labels.index(raster.crop)
        wide, high = plans[raster.image].crops[at].pixels
        views.append(pixels[starts[raster.image] + at, :, :high, :wide].detach().to("cpu", torch.float32))
    return views


def _rows_of(most: int, rows: Sequence[Sequence[Panel]]) -> list[list[Panel]]:
    return [list(row[at : at + most]) for row in rows for at in range(0, len(row), most)]
