"""Conversations -> answers with their token counts. What lmms-eval hands over and wants back, without lmms-eval itself."""

from __future__ import annotations

import mimetypes
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import GenerationConfig

from foveate import inference
from foveate.data.chat import Renderer
from foveate.data.clips import Sampling, Uniform, open_clip
from foveate.data.conversations import MARKER
from foveate.data.pixels import PictureError, open_image
from foveate.engine.run import Run
from foveate.errors import FoveateError
from foveate.inference import model_inputs
from foveate.reducers import Reducer, prepare

Messages = list[dict[str, Any]]
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p")


@dataclass(frozen=True)
class Reply:
    """One request's answer.

    input_tokens   text and visual tokens of the prompt that went through the first decoder layer: after what is cut in front of it
    output_tokens  generated, the end token among them
    visual_tokens  of the prompt in each decoder layer; empty for a request without images
    """

    text: str
    input_tokens: int
    output_tokens: int
    visual_tokens: tuple[int, ...]


# ---- arguments


def spelling(text: str) -> str:
    """A reducer's spelling out of `--model_args`, which end at commas: a colon may stand for each comma, or quotes around all of it."""
    parts = [part.partition(":") for part in text.strip("\"'").split("+")]
    return "+".join(name + colon + re.sub(r":(?=[a-z]\w*=)", ",", options) for name, colon, options in parts)


def whole(name: str, value: Any) -> int:
    """A number that may have come as text. FoveateError if it is none, or less than 1."""
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = 0
    if number < 1:
        raise FoveateError(f"{name}={value!r} is not possible; give a whole number of at least 1")
    return number


def generation(task: Mapping[str, Any], max_new_tokens: int) -> dict[str, Any]:
    """The arguments of `generate` out of a task's generation_kwargs, greedy unless these ask for sampling.

    What `generate` does not know (`until`, or what is meant for one family of models, such as image_aspect_ratio) is left out.
    """
    known = vars(GenerationConfig())
    options = {"max_new_tokens": max_new_tokens, "num_beams": 1, **{k: v for k, v in task.items() if k in known and v is not None}}
    temperature = options.get("temperature")
    options["do_sample"] = temperature != 0 and bool(options.get("do_sample", temperature))
    if not options["do_sample"]:
        return {name: value for name, value in options.items() if name not in _SAMPLING}
    return options if temperature is None else {**options, "temperature": float(temperature)}


def cut(text: str, until: Any) -> str:
    """The text in front of the first of the stops `until`: one, several or None."""
    for stop in [until] if isinstance(until, str) else until or []:
        if stop:
            text = text.partition(str(stop))[0]
    return text.strip()


def batches(keys: Sequence[tuple[str, int]], size: int) -> list[list[int]]:
    """Requests, by number, that are answered together. A key is (options, length): a batch is of one sort of options and of neighbours in
    length, the longest first, so that what does not fit into memory fails at once."""
    order = sorted(range(len(keys)), key=lambda i: (keys[i][0], -keys[i][1]))
    found = []
    for _, group in groupby(order, key=lambda i: keys[i][0]):
        same = list(group)
        found += [same[at : at + size] for at in range(0, len(same), size)]
    return found


# ---- conversations


def question(text: str, visuals: Any) -> Messages:
    """A text and its images as a conversation: each image at its marker, or all in front of a text that does not have one for each. What
    names the file of a video is one."""
    images = [] if visuals is None else list(visuals) if isinstance(visuals, list | tuple) else [visuals]
    pieces = text.split(MARKER)
    if len(pieces) != len(images) + 1:
        pieces = [*[""] * len(images), text]
    content: list[dict[str, Any]] = []
    for number, piece in enumerate(pieces):
        if number:
            visual = images[number - 1]
            film = isinstance(visual, str) and str(mimetypes.guess_type(visual)[0]).startswith("video/")
            content.append({"type": "video" if film else "image", "url": visual})
            piece = piece.removeprefix("\n")  # chat templates write the line break after an image themselves
        if piece.strip():
            content.append({"type": "text", "text": piece})
    return [{"role": "user", "content": content}]


def conversation(
    messages: Sequence[Mapping[str, Any]],
    reducers: Sequence[Reducer] = (),
    frames: Sampling = Uniform(),  # noqa: B008
    videos: bool = True,
) -> Messages:
    """lmms-eval's messages as processors take them, images decoded and as the reducers prepare them, of videos so many `frames`, for a
    processor without `videos` as images.

    FoveateError for what is neither text nor an image or a video, and for what cannot be read.
    """
    found = []
    for message in messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        found.append(
            {"role": message["role"], "content": [one for part in parts for one in _shown_as(_part(part, reducers, frames), videos)]}
        )
    return found


def _part(part: Mapping[str, Any], reducers: Sequence[Reducer], frames: Sampling) -> dict[str, Any]:
    if part["type"] == "text":
        return {"type": "text", "text": part["text"]}
    image = part["url"]
    if part["type"] == "video" and isinstance(image, str | Path):
        clip = open_clip(image, frames)
        return {"type": "video", "video": replace(clip, frames=tuple(prepare(reducers, frame) for frame in clip.frames))}
    if part["type"] != "image":
        raise FoveateError(f"a request brings {part['type']}, but only images, files of videos and text are answered; leave its task out")
    what = repr(image) if isinstance(image, str) else f"a {type(image).__name__}"
    try:
        opened = open_image(image if isinstance(image, Image.Image) else Path(image))
    except (PictureError, TypeError) as error:
        raise FoveateError(
            f"a request brings {what}, which is no image ({error}); only images, files of videos and text are answered"
        ) from error
    return {"type": "image", "image": prepare(reducers, opened)}


def _shown_as(part: dict[str, Any], videos: bool) -> list[dict[str, Any]]:
    if videos or part["type"] != "video":
        return [part]
    return [{"type": "image", "image": frame} for frame in part["video"].frames]


def media(messages: Messages) -> frozenset[str]:
    """Of "image" and "video" what a conversation shows."""
    return frozenset(part["type"] for message in messages for part in message["content"]) - {"text"}


def check_template(processor: Any) -> None:
    """FoveateError if the processor's chat template is missing or would print a list of parts instead of reading it."""
    if not getattr(processor, "chat_template", None):
        raise FoveateError(f"{type(processor).__name__} has no chat template, so questions cannot be put to the model: set one and save it")
    text = processor.apply_chat_template([{"role": "user", "content": [{"type": "text", "text": "probe"}]}])
    if "probe" not in text or "'text'" in text:
        raise FoveateError(f"the chat template of {type(processor).__name__} takes no lists of parts, as conversations with images are")


# ---- answers


def answer(model: Any, processor: Any, run: Run | None, asked: Sequence[Messages], options: Mapping[str, Any]) -> list[Reply]:
    """Answers to a batch of conversations of the same `media`; `run` is what is attached to the model, and `options` are
    those of `generate`. Without it visual tokens are not known. FoveateError if the model's logits are not finite.

    Thoughts in front of answers are no part of them; questions are put with an empty one where the chat template writes thoughts."""
    images, clips = ([_shown(messages, kind) for messages in asked] for kind in ("image", "video"))
    chat = Renderer(processor)
    inputs = model_inputs(processor, images, [chat.prompt(messages) for messages in asked], clips).to(model.device, model.dtype)
    if run is not None:
        run.passes.clear()
    said = inference.answer(model, processor.tokenizer, inputs, end=chat.end_id, skip_special_tokens=True, **options)
    if run is not None and run.passes:
        layouts = run.last.layouts
        beams = layouts[0].shape[0] // len(asked)  # each of them has the prompt
        entered = layouts[0].valid.sum(1)[::beams].tolist()
        visual = list(zip(*(layout.visual.sum(1)[::beams].tolist() for layout in layouts), strict=True))
    else:
        entered, visual = inputs["attention_mask"].sum(1).tolist(), [()] * len(asked)
    return [Reply(one.text, entered[row], one.tokens, visual[row]) for row, one in enumerate(said)]


def _shown(messages: Messages, kind: str) -> list[Any]:
    return [part[kind] for message in messages for part in message["content"] if part["type"] == kind]
