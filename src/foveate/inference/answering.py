"""Inputs -> answers: greedy whatever generation configuration a model ships, cut at the end token, thoughts taken away."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from foveate.errors import FoveateError

# What models put around the thought in front of an answer: Qwen3, DeepSeek and most others; Magistral; Kimi-VL; Seed.
THOUGHTS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("◁think▷", "◁/think▷"), ("<seed:think>", "</seed:think>"))


class Broken(FoveateError):
    """What is wrong with the model or the data, whatever the reducers are."""


class Finite(LogitsProcessor):
    """Stops generation where the model itself is broken; greedy search would go on and answer token 0."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if bool((scores.isnan() | scores.isposinf()).any()):
            raise Broken("the model's logits are not finite (NaN or infinity): its weights or its features are broken")
        return scores


class Plain(GenerationConfig):
    """A configuration that stays as it is: `generate` fills what is left open in any other with the model's own."""

    def update(self, defaults_only: bool = False, allow_custom_entries: bool = False, **given: Any) -> dict[str, Any]:
        """As the library's, except that it leaves the model's entries out."""
        if defaults_only and allow_custom_entries:  # how `generate` hands over the model's configuration
            return {}
        left: dict[str, Any] = super().update(defaults_only=defaults_only, allow_custom_entries=allow_custom_entries, **given)
        return left


@dataclass(frozen=True)
class Said:
    """One answer.

    text       without the thought in front of it, space around it and the end token
    tokens     generated, thought and end token among them
    thinking   the thought was not at its end when the tokens were; `text` is empty then
    """

    text: str
    tokens: int
    thinking: bool


def ends(model: Any, tokenizer: Any, end: int | None = None) -> list[int]:
    """The tokens that end an answer: those of the model's generation configuration, the tokenizer's, and `end`, the chat template's."""
    own = model.generation_config.eos_token_id
    listed = own if isinstance(own, list | tuple) else [own]
    found = [int(token) for token in (*listed, tokenizer.eos_token_id, end) if token is not None]
    return list(dict.fromkeys(found))


def answer(
    model: Any,
    tokenizer: Any,
    inputs: Mapping[str, Any],
    *,
    end: int | None = None,
    skip_special_tokens: bool = False,
    processors: Sequence[LogitsProcessor] = (),
    **options: Any,
) -> list[Said]:
    """Answers to prompts that are padded on the left, `inputs` of `model.generate`, one for each row of `input_ids` (B, N).

    Greedy: of the model's own generation configuration only the tokens that begin, end and pad are used. `options` (max_new_tokens, and
    whatever a GenerationConfig has) are put over it. `processors` are given the logits of each token first. `end`: see `ends`. Location
    tokens may be special ones, so these are left in unless `skip_special_tokens`. Call it inside of `torch.inference_mode()`. FoveateError
    if the model's logits are not finite.
    """
    stops = ends(model, tokenizer, end)
    config = _greedy(model, tokenizer, stops, options)
    output = model.generate(**inputs, generation_config=config, logits_processor=LogitsProcessorList([*processors, Finite()]))
    return [read_answer(tokenizer, row, stops, skip_special_tokens) for row in output[:, inputs["input_ids"].shape[1] :].tolist()]


def read_answer(tokenizer: Any, row: list[int], stops: Sequence[int], skip_special_tokens: bool = False) -> Said:
    """What was said by the tokens that a model has generated, up to the first of `stops`; by whichever engine."""
    length = next((at for at, token in enumerate(row) if token in stops), len(row))
    plain = tokenizer.decode(row[:length], skip_special_tokens=False)
    text, thinking = without_thought(plain)
    if skip_special_tokens and text == plain.strip():
        text = tokenizer.decode(row[:length], skip_special_tokens=True).strip()
    elif skip_special_tokens:  # the thought's own tokens may be special, so the text had to be found with them
        for token in tokenizer.all_special_tokens:
            text = text.replace(token, "").strip()
    return Said(text, min(length + 1, len(row)), thinking)


def next_logits(model: Any, tokenizer: Any, inputs: Mapping[str, Any]) -> Tensor:
    """(B, vocabulary) float32: what the model says of the first token of each answer, to prompts as in `answer`."""
    config = _greedy(
        model, tokenizer, ends(model, tokenizer), {"max_new_tokens": 1, "output_logits": True, "return_dict_in_generate": True}
    )
    output = model.generate(**inputs, generation_config=config, logits_processor=LogitsProcessorList([Finite()]))
    logits: Tensor = output.logits[0].to(torch.float32)
    return logits


def _greedy(model: Any, tokenizer: Any, stops: list[int], options: Mapping[str, Any]) -> Plain:
    own, pad = model.generation_config, tokenizer.pad_token_id
    tokens = {
        "bos_token_id": own.bos_token_id,
        "decoder_start_token_id": own.decoder_start_token_id,
        "eos_token_id": stops or None,
        "pad_token_id": next(iter(stops), None) if pad is None else pad,
    }
    return Plain(**{**tokens, "do_sample": False, "num_beams": 1, **options})


def without_thought(text: str) -> tuple[str, bool]:
    """The text after the thought that it begins with, and whether that thought has no end ("" comes after it then).

    A prompt may have opened the thought, so the end of one counts without its beginning."""
    for opening, closing in THOUGHTS:
        _, closed, behind = text.partition(closing)
        if closed:
            return behind.strip(), False
        if text.lstrip().startswith(opening):
            return "", True
    return text.strip(), False


@contextmanager
def answering(model: Any) -> Iterator[None]:
    """Evaluation mode without gradients; after it the model is as it was."""
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(training)
