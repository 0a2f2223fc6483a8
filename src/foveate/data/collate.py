"""Conversations -> batches: tokens, labels, placeholders, pixels, padding."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import ProcessorMixin

from foveate.data.chat import Renderer, Spans, Tokenised, Turns
from foveate.data.conversations import Conversation
from foveate.data.features import FeatureStore, crop_digest
from foveate.data.spelled import BEGIN
from foveate.errors import FoveateError
from foveate.model.processing import FoveateProcessor, crop_counts, cut, token_counts
from foveate.tokens import ImagePlan

IGNORED = -100
SPECIAL = 4  # tokens that a tokenizer may add to a text

Share = Callable[[Sequence[tuple[int, int]]], Sequence[int | None]]


def expand(found: Tokenised, image_token_id: int, plans: Sequence[ImagePlan], max_length: int) -> Tokenised:
    """Every image token made the placeholders of its plan, and the end cut off after `max_length` tokens.

    FoveateError if there are more or fewer image tokens than images, or if an image or all answers would be lost with the end."""
    is_image, counts = found.ids == image_token_id, [run for plan in plans for run in plan.runs if isinstance(run, int)]
    if is_image.sum() != len(counts):
        raise FoveateError(f"has {len(plans)} images but the chat template makes {is_image.sum()} image tokens of its text")
    repeats = np.ones_like(found.ids)
    repeats[is_image] = counts
    ids, supervised = np.repeat(found.ids, repeats), np.repeat(found.supervised, repeats)
    if len(ids) > max_length:
        if (ids[max_length:] == image_token_id).any():
            visual = " + ".join(f"{len(list(alike))} x {tokens}" for tokens, alike in groupby(plan.tokens for plan in plans))
            raise FoveateError(f"has {len(ids)} tokens, {visual} of them visual; cutting it to max_length {max_length} would cut an image")
        ids, supervised = ids[:max_length], supervised[:max_length]
    if not supervised.any():
        raise FoveateError(f"has no token of an answer within max_length {max_length}")
    return Tokenised(ids, supervised)


def tagged(text: str, spans: Spans, marker: str, plans: Sequence[ImagePlan]) -> tuple[str, Spans]:
    """A text that the template has written with the tags of each image's plan in it, and one marker for each run of placeholders between
    them; and where the spans are then. As it is where no plan has tags, or their number is not that of the markers."""
    pieces = text.split(marker)
    if not any(plan.tags for plan in plans) or len(pieces) != len(plans) + 1:
        return text, spans
    written, moves, at = pieces[0], [], len(pieces[0])
    for plan, piece in zip(plans, pieces[1:], strict=True):
        own = "".join(run if isinstance(run, str) else marker for run in plan.runs)
        at += len(marker)
        moves.append((at, len(own) - len(marker)))
        written, at = written + own + piece, at + len(piece)

    def moved(place: int) -> int:
        return place + sum(move for end, move in moves if end <= place)

    return written, [(moved(start), moved(end)) for start, end in spans]


class Fit:
    """The check of a sample's text before training: whether the chat template can write it, and whether it can be cut to `max_length`
    without losing an image or all of its answers. `cut` says what samples that are only cut lose.

    Every sample is written by the template, which takes about half a millisecond; tokenised are only those whose text may be too long (a
    token is at least one byte), and those with spelled parts, which not every tokenizer can write. `plan_image` says what becomes of an
    image of a height and width, as far as that is known before training, `share` of how many views each of a sample's images may become,
    and `spells` whether the model learns spelled parts at all.
    """

    def __init__(
        self, renderer: Renderer, plan_image: Callable[..., ImagePlan], max_length: int, share: Share | None = None, spells: bool = True
    ) -> None:
        self.renderer, self.plan_image, self.max_length = renderer, lru_cache(maxsize=2**16)(plan_image), max_length
        self.share, self.spells = share, spells
        self.cut: list[Cut] = []

    def __call__(self, turns: Turns, sizes: Sequence[tuple[int, int]]) -> str:
        """What is wrong with a sample whose images have these heights and widths, "" if nothing is."""
        try:
            text, spans = self.renderer.render(turns)
            if BEGIN in text and not self.spells:
                return "has `spelled` answers, which Foveate's own models alone learn: the others tokenise by themselves"
            found = text.count(self.renderer.image_token)
            if found != len(sizes):
                raise FoveateError(f"has {len(sizes)} images but the chat template makes {found} image tokens of its text")
            shares = [None] * len(sizes) if self.share is None else self.share(sizes)
            given = [size if most is None else (*size, most) for size, most in zip(sizes, shares, strict=True)]
            plans = [self.plan_image(*of) for of in given]
            text, spans = tagged(text, spans, self.renderer.image_token, plans)
            if BEGIN not in text and len(text.encode()) + sum(plan.tokens for plan in plans) + SPECIAL <= self.max_length:
                return ""
            whole = self.renderer.encode(text, spans)
            kept = expand(whole, self.renderer.image_token_id, plans, self.max_length)
            self.cut += cuts(whole.supervised, kept.supervised)
        except FoveateError as error:
            return str(error)
        return ""


@dataclass(frozen=True)
class Cut:
    """What one sample loses after `max_length`: so many of its answers' tokens, and so many whole answers."""

    tokens: int
    of: int
    answers: int


def cuts(whole: np.ndarray, kept: np.ndarray) -> list[Cut]:
    """What is lost of the supervised tokens `whole`, as a list of one or none."""
    lost = int(whole.sum() - kept.sum())
    return [Cut(lost, int(whole.sum()), _runs(whole) - _runs(kept))] if lost else []


def _runs(flags: np.ndarray) -> int:
    return int((np.diff(flags.astype(np.int8), prepend=0) == 1).sum())


def told(cut: Sequence[Cut], name: str, samples: int, max_length: int) -> str:
    """What `max_length` costs, as a line for the log; "" if nothing."""
    if not cut:
        return ""
    whole = [one for one in cut if one.answers]
    more = f"; {len(whole)} of them lose {sum(one.answers for one in whole)} whole answers" if whole else ""
    tokens = f"{sum(one.tokens for one in cut)} of their {sum(one.of for one in cut)} answer tokens are lost"
    return f"{name}: max_length {max_length} cuts {len(cut)} of {samples} samples, {tokens}{more}"


class Collator:
    """Samples of a Foveate model -> `input_ids`, `attention_mask`, `labels` (batch, length), padded on the right, and `pixel_values` of
    the crops of all images, flat, with `image_crops` or `prompt_images` as the processor makes it. It fills in the samples' `plans`.

    Supervised (every label that is not -100) are the answers and their end tokens. A sample longer than `max_length` tokens loses its
    end; FoveateError if an image or all of its answers would be lost with it. `remember`: keep the tokens of every sample in memory, for
    data that is read more than once. `features`: images are outlines, and their crops' features are read from there, as `tower_features`
    (crops, levels, patches, width), in the place of pixels. Where samples say what their image shows where, `boxes` has for each of them a
    list of (word pieces of a name, box).
    """

    def __init__(self, processor: Any, max_length: int, remember: bool = False, features: FeatureStore | None = None) -> None:
        if isinstance(processor, ProcessorMixin) and not isinstance(processor, FoveateProcessor):
            raise FoveateError(f"{type(processor).__name__} says itself what stands for an image: use foveate.data.library.LibraryCollator")
        self.renderer = Renderer(processor)
        self.processor, self.image_processor = processor, processor.image_processor
        self.max_length, self.features = max_length, features
        self.pad = self.renderer.tokenizer.pad_token_id
        if self.pad is None:
            raise FoveateError("the tokenizer has no padding token: set tokenizer.pad_token")
        self._memory: dict[int, Tokenised] | None = {} if remember else None
        self._pieces: dict[str, Tensor] = {}

    def asking_for(self, view_tokens: int) -> Collator:
        """One that asks for so many visual tokens of each view, and shares what is remembered."""
        other = copy.copy(self)
        other.processor = self.processor.asking_for(view_tokens)
        return other

    def encode(self, sample: Conversation) -> Tokenised:
        """Tokens with the placeholders of every image in place, cut to `max_length`."""
        try:
            sample.plans[:] = planned(self.processor, sample.images)
        except FoveateError as error:
            raise FoveateError(f"sample {sample.id}: {error}") from None
        found = self._memory.get(sample.index) if self._memory is not None else None
        if found is None:
            text, spans = self.renderer.render(sample.turns)
            found = self.renderer.encode(*tagged(text, spans, self.renderer.image_token, sample.plans))
            if self._memory is not None:
                self._memory[sample.index] = found
        try:
            return expand(found, self.renderer.image_token_id, sample.plans, self.max_length)
        except FoveateError as error:
            raise FoveateError(f"sample {sample.id} {error}") from None

    def pieces(self, name: str) -> Tensor:
        """(W,) int64: the different word pieces of a name as it stands in the middle of a sentence."""
        if name not in self._pieces:
            encoded = self.renderer.tokenizer(f"a {name}", add_special_tokens=False, return_offsets_mapping=True)
            own = [piece for piece, (_, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True) if end > 2]
            self._pieces[name] = torch.tensor(own, dtype=torch.int64).unique()
        return self._pieces[name]

    def __call__(self, samples: Sequence[Conversation]) -> dict[str, Any]:
        encoded = [self.encode(sample) for sample in samples]
        length = max(len(one.ids) for one in encoded)
        ids = np.full((len(encoded), length), self.pad, dtype=np.int64)
        labels = np.full((len(encoded), length), IGNORED, dtype=np.int64)
        mask = np.zeros((len(encoded), length), dtype=np.int64)
        for row, one in enumerate(encoded):
            n = len(one.ids)
            ids[row, :n] = one.ids
            mask[row, :n] = 1
            labels[row, :n] = np.where(one.supervised, one.ids, IGNORED)
        batch: dict[str, Any] = {
            "input_ids": torch.from_numpy(ids),
            "attention_mask": torch.from_numpy(mask),
            "labels": torch.from_numpy(labels),
        }
        images, plans = [image for sample in samples for image in sample.images], [plan for sample in samples for plan in sample.plans]
        tiled = getattr(self.processor, "tiling", None) is not None
        if images and self.features is not None:
            batch["tower_features"] = read_features(self.features, images, plans)
        elif images and tiled:
            batch["pixel_values"] = self.processor.pixels(images, plans, return_tensors="pt")["pixel_values"]
        elif images:
            batch["pixel_values"] = self.image_processor(cut(images, plans), return_tensors="pt")["pixel_values"]
        if tiled:
            batch |= {"image_sizes": torch.tensor([plan.given for plan in plans])} if plans else {}
        else:
            batch |= {name: torch.tensor(counts) for name, counts in crop_counts(plans).items()}
        if images and getattr(self.processor, "weighs", False):
            batch["prompt_images"] = torch.tensor([len(sample.images) for sample in samples])
        if any(sample.boxes for sample in samples):
            batch["boxes"] = [[(self.pieces(name), torch.tensor(box)) for name, box in sample.boxes] for sample in samples]
        return batch | {name: torch.tensor(counts) for name, counts in token_counts(plans).items()}


def planned(processor: Any, images: Sequence[Any]) -> list[ImagePlan]:
    """What the images of one sample become."""
    sizes = [(image.height, image.width) for image in images]
    if hasattr(processor, "plan_images"):
        return list(processor.plan_images(sizes))
    return [processor.plan_image(*size) for size in sizes]


def read_features(store: FeatureStore, images: Sequence[Any], plans: Sequence[ImagePlan]) -> Tensor:
    """(crops, levels, patches, width) of images of which only the outline is known. FoveateError if one of them is not there."""
    try:
        return store.batch(
            [crop_digest(image.digest, crop.recipe) for image, plan in zip(images, plans, strict=True) for crop in plan.crops]
        )
    except KeyError:
        raise FoveateError("has an image whose features are not in the cache: it is another one than when the run began") from None
