"""Questions about pictures -> prompts -> inputs -> answers, as training writes them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from foveate.data import conversations
from foveate.data.chat import Renderer
from foveate.data.clips import Clip
from foveate.data.footage import CLIP
from foveate.data.library import videos
from foveate.errors import FoveateError
from foveate.inference.answering import answer
from foveate.reducers import Reducer, prepare

log = logging.getLogger(__name__)


def prompts(processor: Any, questions: Sequence[str], images: Sequence[int] | None = None) -> list[str]:
    """The prompts of questions about so many `images` each (one, unless told), as training writes them: image, line break, question.
    A thought that the template opens is closed, empty, where training writes it so.

    A question that says itself where its images and clips stand, by markers, is left as it is."""
    renderer = Renderer(processor)
    counts = [1] * len(questions) if images is None else images
    return [renderer.ask([("user", marked(text, count))]) for text, count in zip(questions, counts, strict=True)]


def marked(question: str, images: int, clips: int = 0) -> str:
    """A question with its images and clips in front of it, unless it says itself where they stand."""
    if conversations.MARKER in question or CLIP in question:
        return question
    return f"{conversations.MARKER}\n" * images + f"{CLIP}\n" * clips + question


def model_inputs(
    processor: Any, images: Sequence[Sequence[Image.Image]], texts: Sequence[str], clips: Sequence[Sequence[Clip]] = ()
) -> Any:
    """What the processor makes of prompts that `prompts` wrote, each about its own images and clips, padded on the left. The frames of
    clips are those that it is given."""
    given: dict[str, Any] = {"images": [list(own) for own in images]} if any(images) else {}
    given |= videos([clip for own in clips for clip in own])
    if begun(processor.tokenizer, texts[0]):
        given["add_special_tokens"] = False
    try:
        return processor(text=list(texts), padding=True, padding_side="left", return_tensors="pt", **given)
    except ValueError as error:
        raise FoveateError(f"{type(processor).__name__} does not take these images, videos and prompts: {error}") from error


def prepared(reducers: Sequence[Reducer], clip: Clip) -> Clip:
    """What the reducers make of a clip before the processor sees it, frame by frame."""
    return replace(clip, frames=tuple(prepare(reducers, frame) for frame in clip.frames))


def begun(tokenizer: Any, text: str) -> bool:
    """Whether a template has already written what the tokenizer would put in front of a prompt."""
    return bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)


def shrunk(processor: Any, reducers: Sequence[Reducer]) -> tuple[Any, Sequence[Reducer]]:
    """The processor to use where reducers make images smaller, and those of them that are still to `prepare` each image.

    A processor that makes all images one size would undo what they do; one that can be `resized` makes them all smaller instead."""
    if not hasattr(processor, "resized"):
        return processor, reducers
    side = prepare(reducers, Image.new("RGB", (processor.image_size, processor.image_size))).width
    return (processor if side == processor.image_size else processor.resized(side)), ()


@dataclass(frozen=True)
class Answers:
    """To a batch of prompts: the `texts`, how many tokens of images and clips stand in each prompt, the `lengths` of the prompts in tokens,
    visual ones included, and which answers are `thinking` yet, since their thoughts were cut off."""

    texts: list[str]
    placeholders: list[int]
    lengths: list[int]
    thinking: Sequence[bool] = ()


def ask(
    model: Any,
    processor: Any,
    images: Sequence[Image.Image],
    owners: Sequence[Sequence[int]],
    texts: Sequence[str],
    new: int,
    clips: Sequence[Sequence[Clip]] = (),
) -> Answers:
    """Greedy answers of at most `new` tokens to prompts that `prompts` wrote; prompt i is about images[k] for each k in owners[i], and
    about clips[i], where the processor takes clips.

    What several prompts share goes through tower and bridge once, where the model takes encoded images, one entry an image.
    FoveateError where the processor does not take them, and for logits that are not finite.
    """
    tokenizer = processor.tokenizer
    shown = [k for owner in owners for k in owner]
    inputs = model_inputs(processor, [[images[k] for k in owner] for owner in owners], texts, clips).to(model.device, model.dtype)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    written = [getattr(processor, "image_token", conversations.MARKER)]
    written += [processor.video_token] if any(clips) and getattr(processor, "video_token", None) in tokenizer.get_vocab() else []
    standing = torch.tensor(tokenizer.convert_tokens_to_ids(written), device=ids.device)
    plain = set(inputs) == {"input_ids", "attention_mask", "pixel_values"} and len(inputs["pixel_values"]) == len(shown)
    if plain and len(images) < len(shown) and hasattr(model, "get_image_features"):
        encoded = model.get_image_features(pixel_values=inputs["pixel_values"][[shown.index(k) for k in range(len(images))]])
        features = encoded.pooler_output
        if type(encoded) is BaseModelOutputWithPooling and features is not None and len(features) == len(images):
            repeated = features[shown] if isinstance(features, Tensor) else [features[k] for k in shown]
            inputs["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=repeated)}
            del inputs["pixel_values"]
    said = answer(model, tokenizer, inputs, end=Renderer(processor).end_id, max_new_tokens=new)
    thinking = [one.thinking for one in said]
    return Answers([one.text for one in said], torch.isin(ids, standing).sum(1).tolist(), mask.sum(1).tolist(), thinking)


def warn_of_cut_thoughts(count: int, total: int, new: int) -> None:
    """Say that answers are missing because their thoughts took all of the tokens."""
    if count:
        log.warning("%d of %d answers are still thoughts after %d tokens and count as empty; allow for more new tokens", count, total, new)
