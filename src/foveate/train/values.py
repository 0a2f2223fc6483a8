"""Single values of a recipe that pydantic does not know: fractions, reducers, optimisers, chat templates, precisions of weights."""

from __future__ import annotations

import difflib
import logging
from fractions import Fraction
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field, PlainSerializer

from foveate.data.chat import read_template
from foveate.data.clips import parse as sampling
from foveate.errors import FoveateError
from foveate.machine import has_bfloat16
from foveate.model.configuration import read_tiling
from foveate.train.schedule import NONE

log = logging.getLogger(__name__)


def _fraction(value: Any) -> Any:
    if isinstance(value, Fraction):
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError("a share is a number or a fraction such as 1/3")
    try:
        return Fraction(str(value))
    except (ValueError, ZeroDivisionError):
        raise ValueError("a share is a number or a fraction such as 1/3") from None


Weight = Annotated[Fraction, BeforeValidator(_fraction), PlainSerializer(str, return_type=str), Field(gt=0)]
Share = Annotated[Weight, Field(le=1)]


def _reducer(value: Any) -> Any:
    """`none`, `null` and an empty string are no reducer; anything else has to be a reducer that exists and acts in the model."""
    if value is None or (isinstance(value, str) and value.strip().lower() in ("", NONE)):
        return NONE
    if isinstance(value, str):
        from foveate.reducers import before_processor, parse

        try:
            before = before_processor(parse(value))
        except FoveateError as error:
            raise ValueError(str(error)) from None
        if before:
            raise ValueError(f"{before[0].name} acts on the image, before the processor: in training say the stage's image_size instead")
    return value


def _tiling(value: Any) -> Any:
    """As the tiling itself is spelled: one that Foveate's model has all of."""
    if isinstance(value, str):
        try:
            return str(read_tiling(value))
        except FoveateError as error:
            raise ValueError(str(error)) from None
    return value


def _sampling(value: Any) -> Any:
    """As the sampling itself is spelled."""
    if isinstance(value, str):
        try:
            return str(sampling(value))
        except FoveateError as error:
            raise ValueError(str(error)) from None
    return value


def known_optimizer(value: Any) -> Any:
    from transformers.training_args import OptimizerNames

    known = [str(name.value) for name in OptimizerNames]
    if value not in known:
        near = ", ".join(difflib.get_close_matches(str(value), known, n=3))
        raise ValueError(f"not an optimizer of the Trainer{f' (close to it: {near})' if near else ''}")
    return value


def readable_template(value: Any) -> Any:
    """The template itself, so that the run's record of its recipe has it."""
    if not isinstance(value, str):
        return value
    try:
        return read_template(value)
    except FoveateError as error:
        raise ValueError(str(error)) from None


def named_loss(value: Any) -> Any:
    """A loss without a weight may stand there by itself."""
    return {"loss": value} if isinstance(value, str) else value


def trainable_dtype(value: Any) -> Any:
    if value == "float16":
        raise ValueError(
            "weights in float16 cannot be trained: the optimiser's steps and squares fall below its smallest number, losses become NaN. "
            "Use dtype: float32, with precision: fp16 where the device has no bfloat16, or dtype: bfloat16"
        )
    return value


def fitting_precision(value: Any) -> Any:
    """`auto` is the fastest here: bfloat16 where the device has it, on a processor by a copy of the weights, and float32 elsewhere. The run
    keeps it in its record, so that a run which goes on in another precision is noticed."""
    if value != "auto":
        return value
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return "fp32" if not has_bfloat16(device) else "bf16" if device == "cuda" else "bf16-copy"


def _micro_batch(value: Any) -> Any:
    if value is None or value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return value
    raise ValueError("a micro_batch is a number of samples above 0, or auto")


def _view_tokens(value: Any) -> Any:
    numbers = value if isinstance(value, list) and value else [value]
    if value in (None, "any") or all(isinstance(each, int) and not isinstance(each, bool) and each > 0 for each in numbers):
        return value
    raise ValueError("view_tokens is a number of visual tokens of each view; a list of them, or any, of which one is drawn for each step")


ReducerString = Annotated[str, BeforeValidator(_reducer)]
SamplingString = Annotated[str | None, BeforeValidator(_sampling)]
TilingString = Annotated[str, BeforeValidator(_tiling)]
ViewTokens = Annotated[int | list[int] | Literal["any"] | None, BeforeValidator(_view_tokens)]
MicroBatch = Annotated[int | Literal["auto"] | None, BeforeValidator(_micro_batch)]
