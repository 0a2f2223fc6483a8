"""Conversations -> batches for the vision-language models of transformers, whose own processor decides what stands for an image."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from foveate.data.chat import Renderer, Spans, Tokenised
from foveate.data.clips import Clip
from foveate.data.collate import IGNORED, Cut, cuts
from foveate.data.conversations import MARKER, Conversation
from foveate.data.spelled import BEGIN
from foveate.errors import FoveateError
from foveate.tokens import Crop, ImagePlan, Kind

OWN = {"input_ids", "attention_mask", "labels", "offset_mapping", "text_replacement_offsets"}


@dataclass(frozen=True)
class Row:
    """One sample as the processor writes it: `extra` are its other inputs with one number a token, such as token_type_ids."""

    ids: np.ndarray
    supervised: np.ndarray
    extra: dict[str, np.ndarray] = field(default_factory=dict)


class LibraryCollator:
    """Samples -> what the processor makes of them, and `labels`: (batch, length), padded on the right; images and clips as the processor
    stacks them. It fills in the samples' `plans`: of each image and clip how many visual tokens the processor has made of it, in one crop
    of an unknown grid.

    What stands for an image or clip, and how many tokens that is, the processor says. Supervised are the answers and their end tokens,
    found in the text as the processor has expanded it. A sample longer than `max_length` tokens loses its end, noted in `cut`. FoveateError
    if an image or all of its answers would be lost with it, if the tokens are not those of the expanded text, and if the processor takes
    clips of one length alone and these have several. `image_token_id`: the model's placeholder of a visual token, where that is another
    than the token of an image in a text.
    """

    def __init__(self, processor: Any, max_length: int, image_token_id: int | None = None) -> None:
        self.processor, self.renderer, self.max_length = processor, Renderer(processor), max_length
        self.pad = self.renderer.tokenizer.pad_token_id
        if self.pad is None:
            raise FoveateError("the tokenizer has no padding token: set tokenizer.pad_token")
        self.sequences = {"token_type_ids", "mm_token_type_ids"} & set(processor.model_input_names)
        self.visual: str = self.renderer.tokenizer.convert_ids_to_tokens(
            self.renderer.image_token_id if image_token_id is None else image_token_id
        )
        self.videos: set[str] = {self.visual, self.renderer.video_token}  # what may stand for a visual token of a clip
        self.cut: list[Cut] = []

    def __call__(self, samples: Sequence[Conversation]) -> dict[str, Tensor]:
        rows: list[Row | None] = [None] * len(samples)
        for sample in samples:
            if any(BEGIN in text for _, text in sample.turns):
                name = type(self.processor).__name__
                raise FoveateError(f"sample {sample.id}: answers are `spelled` for Foveate's own models alone; {name} tokenises by itself")
        shown = [number for number, sample in enumerate(samples) if sample.images or sample.clips]
        kinds = {(bool(samples[number].images), bool(samples[number].clips)) for number in shown}
        # Processors want images in every row or in none; what several calls make of images is joined in the order of the rows.
        calls = [[number] for number in shown] if len(kinds) > 1 else [shown] if shown else []
        made: dict[str, list[Tensor]] = {}
        for numbers in calls:
            found, own = self._with_images([samples[number] for number in numbers])
            for number, row in zip(numbers, found, strict=True):
                rows[number] = row
            for name, value in own.items():
                made.setdefault(name, []).append(value)
        batch = {name: _joined(name, values) for name, values in made.items()}
        for number, sample in enumerate(samples):
            if not sample.images and not sample.clips:
                tokens = self.renderer.tokenise(sample.turns)
                rows[number] = self._cut(sample, Row(tokens.ids, tokens.supervised), 0)
        return self._padded([row for row in rows if row is not None]) | batch

    def _with_images(self, samples: Sequence[Conversation]) -> tuple[list[Row], dict[str, Tensor]]:
        written = [self.renderer.render(sample.turns) for sample in samples]
        shown: dict[str, Any] = {"images": [list(sample.images) for sample in samples]} if samples[0].images else {}
        shown |= videos([clip for sample in samples for clip in sample.clips])
        try:
            made = self.processor(
                text=[text for text, _ in written],
                **shown,
                add_special_tokens=not self.renderer.begins(written[0][0]),
                padding=True,
                padding_side="right",
                truncation=False,
                return_text_replacement_offsets=True,
                return_tensors="pt",
            )
        except (ValueError, TypeError) as error:
            names = ", ".join(sample.id for sample in samples)
            lengths = sorted({len(clip) for sample in samples for clip in sample.clips})
            if len(lengths) > 1:
                raise FoveateError(
                    f"sample {names}: {type(self.processor).__name__} does not take clips of {', '.join(map(str, lengths))} frames in one "
                    "batch; set micro_batch: 1, or choose frames of which every clip has as many"
                ) from None
            raise FoveateError(f"sample {names}: {type(self.processor).__name__} does not take it: {error}") from None
        shape = made["input_ids"].shape
        extra = {name for name, value in made.items() if isinstance(value, Tensor) and value.shape == shape} - OWN
        rows = []
        for number, (sample, (text, spans)) in enumerate(zip(samples, written, strict=True)):
            length = int(made["attention_mask"][number].sum())
            ids = made["input_ids"][number, :length].numpy()
            places = made.get("text_replacement_offsets") or [[]] * len(samples)
            whole = self._expanded(text, spans, places[number])
            if len(places[number]) != len(sample.images) + len(sample.clips) or not np.array_equal(whole.ids, ids):
                raise FoveateError(
                    f"sample {sample.id}: {type(self.processor).__name__} makes other tokens of the conversation than its text has with "
                    "the images put in, so its answers are not found"
                )
            sample.plans[:] = [ImagePlan.whole(self._visual(one)) for one in places[number]]
            row = Row(ids, whole.supervised, {name: made[name][number, :length].numpy() for name in extra})
            rows.append(self._cut(sample, row, self._behind(text, places[number])))
        return rows, {name: value for name, value in made.items() if isinstance(value, Tensor) and name not in OWN | extra}

    def _visual(self, place: dict[str, Any]) -> int:
        """The visual tokens of an image or clip."""
        kinds = self.videos if place["type"] == "video" else {self.visual}
        return sum(int(place["replacement"].count(token)) for token in kinds)

    def _expanded(self, text: str, spans: Spans, places: Sequence[dict[str, Any]]) -> Tokenised:
        """The text with every image's token as the processor has replaced it, tokenised; the spans move along."""
        whole, moved = _replaced(text, places), []
        for start, end in spans:
            gained = sum(len(one["replacement"]) - (one["span"][1] - one["span"][0]) for one in places if one["span"][1] <= start)
            moved.append((start + gained, end + gained))
        return self.renderer.encode(whole, moved)

    def _behind(self, text: str, places: Sequence[dict[str, Any]]) -> int:
        """How many tokens there are up to the end of the last image."""
        return len(self.renderer.encode(_replaced(text[: places[-1]["span"][1]], places), []).ids)

    def _cut(self, sample: Conversation, row: Row, last: int) -> Row:
        """The row's first `max_length` tokens; `last`: how many of them an image needs."""
        if last > self.max_length:
            raise FoveateError(
                f"sample {sample.id} has {len(row.ids)} tokens; cutting it to max_length {self.max_length} would cut an image"
            )
        n = self.max_length
        if not row.supervised[:n].any():
            raise FoveateError(f"sample {sample.id} has no token of an answer within max_length {n}")
        self.cut += cuts(row.supervised, row.supervised[:n])
        return Row(row.ids[:n], row.supervised[:n], {name: values[:n] for name, values in row.extra.items()})

    def _padded(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        names = self.sequences.union(*(row.extra for row in rows))
        shape = len(rows), max(len(row.ids) for row in rows)
        batch = {name: torch.zeros(shape, dtype=torch.int64) for name in ("attention_mask", *sorted(names))}
        batch |= {"input_ids": torch.full(shape, self.pad), "labels": torch.full(shape, IGNORED)}
        for number, row in enumerate(rows):
            n = len(row.ids)
            batch["input_ids"][number, :n] = torch.from_numpy(row.ids)
            batch["attention_mask"][number, :n] = 1
            batch["labels"][number, :n] = torch.from_numpy(np.where(row.supervised, row.ids, IGNORED))
            for name, values in row.extra.items():
                batch[name][number, :n] = torch.from_numpy(values)
        return batch


def videos(clips: Sequence[Clip]) -> dict[str, Any]:
    """Clips as a processor is given them, with the frames that they have; nothing for none."""
    if not clips:
        return {}
    how = {"video_metadata": [clip.metadata for clip in clips], "do_sample_frames": False}
    return {"videos": [list(clip.pixels) for clip in clips], "videos_kwargs": how}


def _joined(name: str, values: Sequence[Tensor]) -> Tensor:
    if len(values) > 1 and len({value.shape[1:] for value in values}) > 1:
        raise FoveateError(f"images and clips of these samples make {name} of several shapes, which no batch has; set micro_batch: 1")
    return torch.cat(list(values)) if len(values) > 1 else values[0]


def image_plan(processor: Any) -> ImagePlan | None:
    """What any image becomes, the tokens around it included; None where that depends on the image."""
    count = getattr(processor, "_get_num_multimodal_tokens", lambda image_sizes: {"num_image_tokens": [processor.num_image_tokens]})
    try:
        visual, *others = set(count(image_sizes=[[224, 224], [300, 600]])["num_image_tokens"])
    except (AttributeError, KeyError, TypeError, ValueError, NotImplementedError):  # it does not say
        return None
    if others:
        return None
    collator = LibraryCollator(processor, sys.maxsize)
    asked = Conversation(0, "probe", [("user", f"{MARKER}\nprobe"), ("assistant", "probe")], [Image.new("RGB", (224, 224))])
    length = collator([asked])["input_ids"].shape[1] - len(collator.renderer.tokenise(asked.turns).ids) + 1
    return ImagePlan((Crop(None, visual),), (Kind.TEXT,) * (length - visual))


def _replaced(text: str, places: Sequence[dict[str, Any]]) -> str:
    """`text`, or its beginning, with what `places` say in the place of each image."""
    out, at = [], 0
    for one in places:
        start, end = one["span"]
        if end <= len(text):
            out += [text[at:start], one["replacement"]]
            at = end
    return "".join([*out, text[at:]])
